"""LoRA adapters (arXiv 2106.09685) on a backbone that several estimators share.

An `Adapter` is what one estimator learned: the LoRA matrices and, where it was trained, the pooling
layer. It never touches the model in the registry. `Adapter.bind` builds a *view* of that model: a
module tree of its own whose parameters are the registered model's own tensors, with `LoraLinear`
in the place of the adapted layers. So any number of adapters run on one copy of the base weights,
also at once in several threads; a view goes with its adapter, and the base is never written to.

peft decides which layers `target_modules` means and owns the file format
(``adapter_config.json``, ``adapter_model.safetensors``). The layer is our own: peft's draws its
dropout from torch's global state, which a gradient cache cannot replay under threads, and keeps its
masks in memory.
"""

from skembed.adapters.adapter import Adapter

__all__ = ["Adapter"]
