"""`skembed.model.pooling` under its documented path."""

from skembed.model.pooling import FoldedLatentAttention, LatentAttention, MeanPooling

__all__ = ["FoldedLatentAttention", "LatentAttention", "MeanPooling"]
