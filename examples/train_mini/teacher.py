"""all-MiniLM-L6-v2 on packed tokens: the vectors, and the inner states that a student inherits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from corpus import teacher_folder
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from skembed.model.cpu_kernels import ProductAttention
from skembed.model.tokenization import PackedBatch

HEADS = 12
LAYERS = 6
EPS = 1e-12
Watch = Callable[[str, Tensor], None]


def _ignore(name: str, value: Tensor) -> None:
    """Look at nothing."""


class PackedTeacher:
    """The teacher's own arithmetic without padding; weights in one type."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        state = load_file(teacher_folder() / "model.safetensors")
        state = {name.removeprefix("bert."): value for name, value in state.items()}
        self.weights = {k: v.to(dtype) for k, v in state.items() if v.is_floating_point()}
        self.hidden_size: int = self.weights["embeddings.LayerNorm.weight"].shape[0]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    @torch.no_grad()
    def hidden_states(
        self, input_ids: Tensor, batch: PackedBatch, watch: Watch = _ignore
    ) -> Tensor:
        """Last hidden states (T, D) of a pack.

        `watch` is shown, by name, what a student inherits: ``sum.S`` before the norm of sublayer S
        (0 the word vectors, then attention and feed-forward in turn), and ``query.L``, ``key.L``,
        ``value.L``, ``attended.L`` and ``inner.L`` of layer L.
        """
        words = self.weights["embeddings.word_embeddings.weight"][input_ids]
        places = self.weights["embeddings.position_embeddings.weight"][batch.position_ids]
        x = words + places + self.weights["embeddings.token_type_embeddings.weight"][0]
        watch("sum.0", x)
        x = self._norm(x, "embeddings.LayerNorm")
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}"
            parts = []
            for part in ("query", "key", "value"):
                parts.append(self._linear(x, f"{name}.attention.self.{part}"))
                watch(f"{part}.{layer}", parts[-1])
            q, k, v = (part.unflatten(1, (HEADS, -1)).transpose(0, 1) for part in parts)
            scale = q.shape[2] ** -0.5
            attended = ProductAttention.apply(q, k, v, batch.lengths, scale).flatten(1)
            watch(f"attended.{layer}", attended)
            x = x + self._linear(attended, f"{name}.attention.output.dense")
            watch(f"sum.{2 * layer + 1}", x)
            x = self._norm(x, f"{name}.attention.output.LayerNorm")
            inner = self._linear(x, f"{name}.intermediate.dense")
            watch(f"inner.{layer}", inner)
            x = x + self._linear(F.gelu(inner), f"{name}.output.dense")
            watch(f"sum.{2 * layer + 2}", x)
            x = self._norm(x, f"{name}.output.LayerNorm")
        return x
