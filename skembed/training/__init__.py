"""Contrastive training: examples, batches, losses, the loop, mining, state."""
