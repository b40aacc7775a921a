"""Embeddings of more texts than fit into memory: written shard by shard, resumed after a stop.

The way of a run: lock the path -> read the source block by block, one block a shard -> check its
texts and add them to the running digest -> a shard that the manifest names is compared and skipped;
any other is embedded, written through to the disk and put into the manifest.
"""

from skembed.streaming.stream import StreamReport, open_embeddings

__all__ = ["StreamReport", "open_embeddings"]
