"""`Reranker` and its `Ranking` under their documented path."""

from skembed import Reranker
from skembed.similarity import Ranking

__all__ = ["Ranking", "Reranker"]
