"""AdamW on float32 masters of bfloat16 weights."""

from __future__ import annotations

from typing import Any

import torch
from recipe import Recipe
from torch import Tensor, nn

from skembed.model.network import NVEmbedModel


class MasterAdamW:
    """The model runs in bfloat16; sums too small for it are kept in float32 copies.

    Word vectors have a rate of their own; norms, biases and word vectors no decay.
    """

    def __init__(self, model: NVEmbedModel, recipe: Recipe) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in model.parameters()]
        model.to(torch.bfloat16)
        self.weights = list(model.parameters())
        self.max_norm = recipe.max_grad_norm
        table = self.names.index("embedding_model.embed_tokens.weight")
        others = [p for k, p in enumerate(self.masters) if k != table]
        rate = recipe.embedding_learning_rate
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.masters[table]], "lr": rate, "weight_decay": 0.0},
                {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
                {"params": [p for p in others if p.ndim > 1]},
            ],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, scale: float) -> None:
        """One step at `scale` times the recipe's rates; gradients are used up."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, self.max_norm)
        self.optimizer.step()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Masters, rounded, into the model."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            weight.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Masters by name, and the optimizer's state."""
        return {"model": self.named(), "optimizer": self.optimizer.state_dict()}

    def named(self) -> dict[str, Tensor]:
        """The float32 weights by name."""
        return dict(zip(self.names, (p.detach() for p in self.masters), strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.write_back()
