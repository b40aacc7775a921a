"""Estimators for classification, clustering, STS, retrieval and reranking."""
