"""Start the student from the teacher: each matrix by least squares on the teacher's activations.

The teacher is a BERT (norms behind each sum, biases, GELU, learned positions), the student a
Mistral (norms in front, no biases, SwiGLU, rotary positions). No matrix can be copied, but each
has a counterpart, and what the student's should put out is known: it is what the teacher's does.
So layer by layer the student is run as far as it stands, and its next matrix is the ridge
regression of the teacher's activation on what the student sees there. Errors made before are
corrected as far as a matrix can; biases are taken up by directions that hardly vary.

Residual stream: the teacher scales the sum by ``gamma / sigma`` after each sublayer, the student
never does. With ``A_0 = 1, A_s = A_{s-1} sigma_{s-1} / gamma_{s-1}`` (per channel, sigma the mean
over tokens) the student's stream ``A_s * sum_s`` needs no scaling, and is the target.

GELU as SwiGLU: ``gelu(x) = silu(1.702 x) / 1.702`` (Hendrycks & Gimpel, arXiv 1606.08415, section
2), the second branch a constant to begin with.

Narrower students: the channels are scaled so that the stream ends as a multiple of the teacher's
last hidden state, and everything is projected onto the directions in which that has most of its
length.

Shared keys: attention heads that share one head of keys and values get the directions in which
their own keys (values) vary most, and queries projected to match.

Groups: where one of our layers stands for several of the teacher's, heads and units of all of them
are candidates, those that write most are kept, and the last matrix aims at the group's result.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from recipe import Recipe
from teacher import EPS, HEADS, PackedTeacher
from torch import Tensor
from torch.nn import functional as F

from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import PackedBatch

SILU_SCALE = 1.702


class _Reached(Exception):
    """The place whose input was wanted."""


def fit(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Ridge regression: W (out, in) with ``x W^T ~ y``."""
    x, y = x.double(), y.double()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y).T.float()


def choose_units(active: Tensor, aim: Tensor, size: int, ridge: float) -> Tensor:
    """Positions of the `size` columns that write most; in steps, as the rest takes over."""
    gram, moment = active.T @ active, active.T @ aim
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    kept = torch.arange(active.shape[1])
    variance = active.var(0)
    while len(kept) > size:
        out = torch.linalg.solve(gram[kept][:, kept], moment[kept])
        written = variance[kept] * out.square().sum(1)
        best = written.argsort(descending=True)[: max(size, int(len(kept) * 0.75))]
        kept = kept[best.sort().values]
    return kept


def rest(x: Tensor, y: Tensor, weight: Tensor) -> float:
    """Share of the variance of y that ``x W^T`` leaves."""
    error = (y - x @ weight.T).square().sum()
    return float(error / (y - y.mean(0)).square().sum())


def principal_directions(x: Tensor, count: int) -> Tensor:
    """The `count` directions (D, count) in which x (T, D) has most of its length."""
    return torch.linalg.eigh(x.T @ x).eigenvectors[:, -count:]


def share_keys(aims: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Queries (H, T, d) for keys and values (H / size, T, d) that `size` heads share each."""
    width = aims["key"].shape[2]
    shared: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
    for first in range(0, len(aims["key"]), size):
        heads = slice(first, first + size)
        for part in ("key", "value"):
            joint = torch.cat(list(aims[part][heads]), 1)
            joint = joint - joint.mean(0)  # the same for all keys: the softmax drops it
            basis = principal_directions(joint, width)
            shared[part].append(joint @ basis)
            if part == "key":
                shared["query"] += list(aims["query"][heads] @ basis.unflatten(0, (size, width)))
    return {part: torch.stack(values) for part, values in shared.items()}


class Inheritance:
    """A student in the making: float32 models, and the teacher's id of each of its tokens."""

    def __init__(
        self,
        model: NVEmbedModel,
        teacher: PackedTeacher,
        teacher_ids: np.ndarray,
        batch: PackedBatch,
        recipe: Recipe,
    ) -> None:
        self.model, self.recipe, self.batch = model, recipe, batch
        model.fuse = False  # `capture` needs the modules one by one
        self.weights = teacher.weights
        ids = torch.from_numpy(teacher_ids)
        self.seen: dict[str, Tensor] = {}
        self.last = teacher.hidden_states(ids[batch.input_ids], batch, self.seen.__setitem__)
        self.word_ids = ids
        self.scales = self._stream_scales(teacher.hidden_size)
        self.basis: Tensor | None = None  # (teacher's dimension, ours) where ours is smaller
        if recipe.hidden_size < teacher.hidden_size:
            self.basis = principal_directions(self.last, recipe.hidden_size)
        self.report: dict[str, dict[str, float]] = defaultdict(dict)

    def _stream_scales(self, width: int) -> list[Tensor]:
        """A_s of the module's docstring for every sublayer."""
        names = ["embeddings"]
        for layer in range(6):
            names += [f"encoder.layer.{layer}.attention.output", f"encoder.layer.{layer}.output"]
        scales = [torch.ones(width)]
        for s, name in enumerate(names):
            sigma = (self.seen[f"sum.{s}"].var(1, correction=0) + EPS).sqrt().mean()
            gamma = self.weights[f"{name}.LayerNorm.weight"]
            scale = scales[-1] * sigma / gamma.abs().clamp(min=0.1)
            scales.append(scale)
        last = scales.pop()
        if self.recipe.hidden_size == width:
            return scales
        # The stream ends as the last hidden state, the place to choose directions, but for one
        # factor that leaves word vectors their size, on which the learning rates are set.
        return [scale * last.mean() / last for scale in scales]

    def project(self, stream: Tensor) -> Tensor:
        """The teacher's stream (..., D) in our directions."""
        return stream if self.basis is None else stream @ self.basis

    def target(self, sublayer: int) -> Tensor:
        """What the student's stream should be behind a sublayer of the teacher, (T, D)."""
        total = self.seen[f"sum.{sublayer}"]
        return self.project((total - total.mean(1, keepdim=True)) * self.scales[sublayer])

    def capture(self, module: torch.nn.Module) -> Tensor:
        """Input of a module when the student runs on the calibration texts, (T, ...)."""
        kept: list[Tensor] = []

        def stop(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept.append(inputs[0])
            raise _Reached

        handle = module.register_forward_pre_hook(stop)
        try:
            self.model.hidden_states(self.batch)
        except _Reached:
            pass
        finally:
            handle.remove()
        return kept[0][0]

    @torch.no_grad()
    def run(self) -> None:
        """Fill every matrix of the student."""
        self._words()
        for k, group in enumerate(self.recipe.layer_groups):
            layer = self.model.embedding_model.layers[k]
            self._attention(k, layer, group)
            self._feed_forward(k, layer, group)
        self._head()
        self.model.fuse = True

    def _words(self) -> None:
        """Word vectors with the mean place, centred as the teacher's norm does."""
        words = self.weights["embeddings.word_embeddings.weight"][self.word_ids]
        places = self.weights["embeddings.position_embeddings.weight"]
        shared = self.weights["embeddings.token_type_embeddings.weight"][0]
        table = words + shared + places[1:40].mean(0)
        table[1] = words[1] + shared + places[0]  # <s> always stands first
        table = (table - table.mean(1, keepdim=True)) * self.scales[0]
        self.model.embedding_model.embed_tokens.weight.copy_(self.project(table))

    def _attention(self, k: int, layer: torch.nn.Module, group: tuple[int, ...]) -> None:
        """Queries, keys and values of the heads that write most; then the output matrix."""
        recipe, attention = self.recipe, layer.self_attn
        stream = self.capture(layer)
        x = self.capture(attention.q_proj)
        # The student's stream goes on from where it stands: aim at the rest of the way.
        aim = self.target(2 * group[0] + 1) - stream
        if len(group) > 1:
            steps = [self.target(2 * j + 1) - self.target(2 * j) for j in group]
            aim = aim + sum(steps[1:])
        heads = self._choose_heads(group)
        aims = {
            part: torch.stack([self._of_head(part, j, h) for j, h in heads])
            for part in ("query", "key", "value")
        }
        if recipe.heads_per_key > 1:
            aims = share_keys(aims, recipe.heads_per_key)
        for part, matrix in (
            ("query", attention.q_proj),
            ("key", attention.k_proj),
            ("value", attention.v_proj),
        ):
            y = aims[part].transpose(0, 1).flatten(1)
            matrix.weight.copy_(fit(x, y, recipe.ridge))
            self.report[f"layer {k}"][part] = rest(x, y, matrix.weight)
        self._calm_pairs_last(attention, x)
        z = self.capture(attention.o_proj)
        attention.o_proj.weight.copy_(fit(z, aim, recipe.ridge))
        self.report[f"layer {k}"]["attention"] = rest(z, aim, attention.o_proj.weight)

    def _of_head(self, part: str, layer: int, head: int) -> Tensor:
        """Activation (T, d) of one of the teacher's heads."""
        return self.seen[f"{part}.{layer}"].unflatten(1, (HEADS, -1))[:, head]

    def _choose_heads(self, group: tuple[int, ...]) -> list[tuple[int, int]]:
        """The heads of a group that write most into the stream."""
        written = {}
        for j in group:
            name = f"encoder.layer.{j}.attention.output.dense.weight"
            out = self.weights[name].unflatten(1, (HEADS, -1))
            scale = self.scales[2 * j + 1]
            for h in range(HEADS):
                z = self._of_head("attended", j, h)
                z = z - z.mean(0)
                change = self.project((z @ out[:, h].T) * scale)
                written[j, h] = float(change.square().sum())
        best = sorted(written, key=lambda key: -written[key])
        return sorted(best[: self.recipe.num_attention_heads])

    def _calm_pairs_last(self, attention: torch.nn.Module, x: Tensor) -> None:
        """Turn each head's basis so that quickly rotating pairs carry the least of the scores."""
        d = self.recipe.head_dim
        k_rows = attention.k_proj.weight.unflatten(0, (-1, d))
        q_rows = attention.q_proj.weight.unflatten(0, (len(k_rows), -1, d))
        places = torch.stack([torch.arange(d // 2), torch.arange(d // 2) + d // 2], 1).flatten()
        for h in range(len(k_rows)):
            key = x @ k_rows[h].T
            energy = key.T @ key / key.square().sum()
            for rows in q_rows[h]:
                q = x @ rows.T
                energy += q.T @ q / q.square().sum()
            basis = torch.linalg.eigh(energy).eigenvectors  # ascending
            turned = torch.empty_like(basis)
            turned[:, places] = basis
            q_rows[h] = turned.T @ q_rows[h]
            k_rows[h] = turned.T @ k_rows[h]

    def _feed_forward(self, k: int, layer: torch.nn.Module, group: tuple[int, ...]) -> None:
        """The units that write most, of all layers of the group; then the output matrix."""
        recipe, mlp = self.recipe, layer.mlp
        stream = self.capture(layer.post_attention_layernorm)
        x = self.capture(mlp.gate_proj)
        aim = self.target(2 * group[-1] + 2) - stream
        inner = torch.cat([self.seen[f"inner.{j}"] for j in group], 1) * SILU_SCALE
        gate = fit(x, inner, recipe.ridge)
        up = fit(x, torch.full((len(x), 1), 1 / SILU_SCALE), recipe.ridge).expand(len(gate), -1)
        active = F.silu(x @ gate.T) * (x @ up.T)
        kept = choose_units(active, aim, recipe.intermediate_size, recipe.ridge)
        mlp.gate_proj.weight.copy_(gate[kept])
        mlp.up_proj.weight.copy_(up[kept])
        mlp.down_proj.weight.copy_(fit(active[:, kept], aim, recipe.ridge))
        self.report[f"layer {k}"]["gate"] = rest(x, inner, gate)
        self.report[f"layer {k}"]["feed-forward"] = rest(active[:, kept], aim, mlp.down_proj.weight)

    def _head(self) -> None:
        """Final norm channel by channel; the latent layer begins as a mean with a bias."""
        norm, pooling = self.model.embedding_model.norm, self.model.latent_attention_model
        x = self.model.hidden_states(self.batch)
        y = self.project(self.last)
        x_mean, y_mean = x.mean(0), y.mean(0)
        slope = ((x - x_mean) * (y - y_mean)).sum(0) / (x - x_mean).square().sum(0)
        norm.weight.copy_(norm.weight * slope)
        pooling.start_as_mean()
        pooling.cross_attend_blocks[1].fn.net["2"].bias.copy_(y_mean - slope * x_mean)
        fitted = self.model.hidden_states(self.batch) + y_mean - slope * x_mean
        self.report["end"]["token vectors"] = float(
            (fitted - y).square().sum() / (y - y_mean).square().sum()
        )
