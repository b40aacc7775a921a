"""LoRA adapters (arXiv 2106.09685) on a backbone that several estimators share.

peft decides which layers `target_modules` means and owns the file format. The layer is our own:
peft's draws its dropout from torch's global state, which a gradient cache cannot replay under
threads, and keeps its masks in memory.
"""

from skembed.adapters.adapter import Adapter

__all__ = ["Adapter"]
