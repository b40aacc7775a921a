"""Exact and approximate search among vectors, and how they are stored."""
