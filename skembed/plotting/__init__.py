"""Maps of texts: their embeddings in two dimensions, coloured by label, cluster or prediction."""

from skembed.plotting.display import EmbeddingMapDisplay

__all__ = ["EmbeddingMapDisplay"]
