"""Embeddings of more texts than fit into memory: written shard by shard, resumed after a stop.

A run locks the path and reads the source block by block, one block a shard. It checks the texts and
adds them to the running digest. A shard that the manifest names is compared and skipped; any other
is embedded, written through to the disk and put into the manifest.
"""

from skembed.streaming.stream import StreamReport, open_embeddings

__all__ = ["StreamReport", "open_embeddings"]
