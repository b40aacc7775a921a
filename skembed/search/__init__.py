"""Exact and approximate search among vectors, and the storage of vectors."""
