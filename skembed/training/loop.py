"""The training loop of a LoRA adapter.

`run_training` -> `BatchPlan` (which texts meet) -> `_Learner.accumulate` (gradient cache over
chunks of packed texts) -> AdamW. All randomness is a function of the seed and the step, so a run
resumed from a checkpoint ends in the same adapter as one that was never interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from skembed.adapters.adapter import Adapter
from skembed.adapters.lora import DropoutMasks, TrainablePooling, insert_lora, share_weights
from skembed.distributed import Processes
from skembed.exceptions import TrainingError
from skembed.history import STEP_COLUMNS, TrainingHistory
from skembed.model.loaded import LoadedModel
from skembed.model.network import load_pooling
from skembed.progress import progress_bar
from skembed.training.batches import Batch, BatchPlan, TaskSampler, TextTable
from skembed.training.losses import backward_in_chunks, batch_loss
from skembed.training.state import Checkpoints, check_tensors, check_values
from skembed.training.trainer import ContrastiveTrainer
from skembed.training.validation import Embed, Validation

__all__ = [
    "CPU_CHUNK_TOKENS",
    "CPU_KEPT_TOKENS",
    "GATHERED_CHUNKS",
    "N_VALIDATIONS",
    "compute_learning_rate",
    "run_training",
]

logger = logging.getLogger(__name__)
CPU_CHUNK_TOKENS = 2_048
# Tokens whose activations are held at once, where the chunk's size is left to us: a batch up to
# this many is embedded once instead of twice.
CPU_KEPT_TOKENS = 4_096
N_VALIDATIONS = 10
GATHERED_CHUNKS = 8  # of each process, whose vectors are exchanged at once


@dataclass
class _Progress:
    """State of a run beside the weights."""

    step: int = 0
    history: TrainingHistory = field(default_factory=TrainingHistory)
    best_score: float = -np.inf
    n_worse: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    done: bool = False


class _Learner:
    """A view of the base model whose adapter has gradients, and its optimiser."""

    def __init__(
        self,
        base: LoadedModel,
        table: TextTable,
        trainer: ContrastiveTrainer,
        initial: Adapter,
        *,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        self.base, self.table, self.trainer, self.initial = base, table, trainer, initial
        self.seed = seed
        self.processes = Processes() if processes is None else processes
        self.masks = DropoutMasks(initial.settings.lora_dropout)
        self.model = share_weights(base.model)
        self.model.requires_grad_(False)
        lora = {name: tensor.to(base.device, copy=True) for name, tensor in initial.lora.items()}
        self.lora = insert_lora(self.model, initial.settings, lora, masks=self.masks)
        self.pooling: dict[str, Tensor] = {}
        if initial.pooling:
            weights = {n: t.to(base.device, copy=True) for n, t in initial.pooling.items()}
            layer = load_pooling(base.config, weights).requires_grad_(True)
            self.pooling = dict(layer.named_parameters())
            self.model.latent_attention_model = TrainablePooling(layer)
        if trainer.gradient_checkpointing:
            self.model.train()
            backbone: Any = self.model.embedding_model
            # Renamed during transformers 5; the old name warns.
            renamed = getattr(backbone, "activation_checkpointing_enable", None)
            enable = renamed or backbone.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.lora.values()), "weight_decay": trainer.weight_decay},
                {"params": list(self.pooling.values()), "weight_decay": 0.0},
            ],
            lr=trainer.learning_rate,
            fused=True,
        )
        self.parameters = {**self.lora, **{f"pooling.{n}": p for n, p in self.pooling.items()}}
        # oneDNN pays for each new size of a product in half precision: pad batches to few sizes.
        self.on_grid = base.device.type == "cpu" and base.key.dtype != "float32"

    def embed(self, rows: np.ndarray) -> Tensor:
        """Return unit vectors of rows of the table, of one prefix: (n, D) float32."""
        batch = self.table.pack(rows, on_grid=self.on_grid).to(self.base.device)
        return F.normalize(self.model(batch)[: len(rows)], dim=-1)

    def embed_all(self, rows: np.ndarray) -> np.ndarray:
        """Return unit vectors of any rows, without gradients and dropout, (n, D) on the host."""
        out = np.empty((len(rows), self.base.config.hidden_size), dtype=np.float32)
        chunks, _ = self._agree_on_chunks(rows)
        size = GATHERED_CHUNKS * self.processes.size
        active, self.masks.active = self.masks.active, False
        try:
            with torch.no_grad():
                for block in (chunks[k : k + size] for k in range(0, len(chunks), size)):
                    local_chunks, positions = self._share(rows, block)
                    vectors = [self.embed(rows[block[k]]) for k in local_chunks]
                    vectors = vectors or [self._no_rows()]
                    counts = [len(part) for part in positions]
                    pieces = self.processes.gather_rows(torch.cat(vectors), counts)
                    for part, piece in zip(positions, pieces, strict=True):
                        out[part] = piece.cpu().numpy()
        finally:
            self.masks.active = active
        if not np.isfinite(out).all():
            raise _divergence_error("A vector of the model in training is not finite", self.trainer)
        return out

    def _agree_on_chunks(self, rows: np.ndarray) -> tuple[list[np.ndarray], int]:
        """Return chunks of rows of the table, and how many of them may keep their graph."""
        chunk_tokens, kept_tokens = self.processes.min_over_processes(*self.chunk_budget())
        n_kept = max(1, kept_tokens // chunk_tokens)
        if self.trainer.batch_tokens == "auto":
            total = int(self.table.lengths[rows].sum())
            chunk_tokens = self.processes.fair_budget(total, chunk_tokens)
        return self.table.cut(rows, chunk_tokens), n_kept

    def _share(
        self, rows: np.ndarray, chunks: list[np.ndarray]
    ) -> tuple[list[int], list[np.ndarray]]:
        """Return numbers of this process's chunks, and positions of each process's texts.

        Shares are even in tokens; positions follow chunk by chunk.
        """
        lengths = self.table.lengths[rows]
        shares = self.processes.share([int(lengths[chunk].sum()) for chunk in chunks])
        none = np.empty(0, dtype=np.int64)
        positions = [np.concatenate([none, *(chunks[k] for k in share)]) for share in shares]
        return shares[self.processes.rank], positions

    def _no_rows(self) -> Tensor:
        """Return the vectors of a process without chunks, (0, D)."""
        return torch.empty((0, self.base.config.hidden_size), device=self.base.device)

    def chunk_budget(self) -> tuple[int, int]:
        """Return tokens of a chunk, and tokens whose activations may be held at once."""
        if self.trainer.batch_tokens != "auto":
            return int(self.trainer.batch_tokens), int(self.trainer.batch_tokens)
        if self.base.device.type != "cuda":
            return CPU_CHUNK_TOKENS, CPU_KEPT_TOKENS
        # An estimate: for the backward pass a token keeps `width` values of 2 bytes: a layer about
        # 4 vectors of the MLP's width and 14 of the model's. They get a third of the free memory:
        # other parts of a step need some too. A chunk stays between 256 and 65,536 tokens.
        backbone = self.base.model.embedding_model.config
        width = 4 * backbone.intermediate_size + 14 * backbone.hidden_size
        if not self.trainer.gradient_checkpointing:
            width *= backbone.num_hidden_layers
        free, _ = torch.cuda.mem_get_info(self.base.device)
        tokens = int(np.clip(free // 3 // (2 * width), 256, 65_536))
        return tokens, tokens

    def accumulate(self, batch: Batch, step: int) -> Tensor:
        """Add the gradient of a batch's loss to the parameters; return the loss, detached."""
        chunks, n_kept = self._agree_on_chunks(batch.texts)
        local_chunks, positions = self._share(batch.texts, chunks)
        counts = [len(part) for part in positions]
        # Back to the order of batch.texts; chunks, and shares of them, are one after the other.
        order = torch.from_numpy(np.argsort(np.concatenate(positions))).to(self.base.device)

        def prepare(k: int) -> None:
            self.masks.key = (self.seed, step, local_chunks[k])

        def embed(k: int) -> Tensor:
            return self.embed(batch.texts[chunks[local_chunks[k]]])

        def compute_loss(embeddings: Tensor) -> Tensor:
            rows = self.processes.join_rows(embeddings, counts)
            return batch_loss(rows[order], batch, self.trainer.temperature)

        sizes = [len(chunks[k]) for k in local_chunks]
        if sizes:
            loss = backward_in_chunks(embed, sizes, compute_loss, n_kept=n_kept, prepare=prepare)
        else:
            loss = compute_loss(self._no_rows())
        self.processes.sum_gradients(list(self.parameters.values()))
        return loss

    def update(self, rate: float) -> float:
        """Take one step of the optimiser at a learning rate; return the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parameters = list(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.trainer.max_grad_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the trained weights on the CPU."""
        return {n: p.detach().cpu().clone() for n, p in self.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """Return copies of weights and the optimiser's moments, flat."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.weights().items()}
        for name, parameter in self.parameters.items():
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"{kind}/{name}"] = value.detach().cpu().clone()
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"weights/{name}"])
            state = {
                kind: tensors[f"{kind}/{name}"].to(self.base.device)
                for kind in ("step", "exp_avg", "exp_avg_sq")
                if f"{kind}/{name}" in tensors
            }
            if state:
                self.optimizer.state[parameter] = state


def run_training(
    base: LoadedModel,
    plan: BatchPlan,
    initial: Adapter,
    *,
    validation: Validation | None = None,
    mine: Callable[[TaskSampler, Embed], np.ndarray] | None = None,
    checkpoints: Checkpoints | None = None,
    show_progress: bool = False,
    processes: Processes | None = None,
) -> tuple[Adapter, TrainingHistory]:
    """Train an adapter: return the last one, or with `early_stopping` the best, and the history.

    `mine` gives the mined negatives of a task at the start of the run, and of each epoch if the
    trainer says `remine`. `checkpoints` is None except in the first of several `processes`. Raises
    TrainingError if the loss or its gradient is not finite, or a batch has nothing to compare.
    """
    trainer, n_steps = plan.trainer, plan.n_steps
    learner = _Learner(base, plan.table, trainer, initial, seed=plan.seed, processes=processes)
    processes = learner.processes
    saved = processes.on_first(lambda: None if checkpoints is None else checkpoints.read())
    progress = _Progress() if saved is None else _resume(learner, saved, plan)
    history = progress.history
    show = show_progress and not progress.done
    bar = progress_bar(show, total=n_steps, initial=progress.step, unit="step", desc="training")
    try:
        if validation is not None and progress.step == 0:
            _validate(learner, validation, progress)
        for step, batch_rows in plan.iterate_steps(n_steps if progress.done else progress.step):
            if mine is not None and plan.starts_epoch(step) and (step == 0 or trainer.remine):
                for task in plan.tasks:
                    if task.examples.loss == "infonce":
                        task.mined = processes.broadcast(mine(task, learner.embed_all))
            row = _take_step(learner, plan, step, batch_rows)
            history.steps.append(row)
            progress.step = step + 1
            bar.update()
            loss, speed = f"{row['loss']:.3f}", f"{row['examples_per_s']:.0f}"
            bar.set_postfix(loss=loss, examples_per_s=speed, refresh=False)
            if validation is not None and _is_due(progress.step, n_steps):
                _validate(learner, validation, progress)
                if trainer.early_stopping and progress.n_worse >= trainer.patience:
                    history.stopped = "early"
                    break
            if checkpoints is not None:
                checkpoints.offer(progress.step, lambda: _snapshot(learner, progress, plan))
        progress.done = True
    except KeyboardInterrupt:
        if processes.size > 1:  # the others may be at another step
            raise
        history.stopped = "interrupted"
        logger.warning("training was interrupted after %d of %d steps", progress.step, n_steps)
    finally:
        bar.close()
    return _finish(learner, progress, plan, checkpoints), history


def _finish(
    learner: _Learner, progress: _Progress, plan: BatchPlan, checkpoints: Checkpoints | None
) -> Adapter:
    """Return the last adapter or the best one, and write the last state."""
    learner.processes.broadcast_tensors(list(learner.parameters.values()))
    if plan.trainer.early_stopping and progress.best:
        weights = progress.best
    else:
        weights = learner.weights()
        learner.embed_all(np.zeros(1, dtype=np.int64))  # raises if the last update diverged
    if checkpoints is not None and progress.done:
        checkpoints.write(*_snapshot(learner, progress, plan))
    pooling = {n.removeprefix("pooling."): t for n, t in weights.items() if n not in learner.lora}
    lora = {name: weights[name] for name in learner.lora}
    return Adapter(learner.initial.settings, lora, pooling, learner.initial.base_fingerprint)


def _take_step(
    learner: _Learner, plan: BatchPlan, step: int, batch_rows: np.ndarray
) -> dict[str, float]:
    """Take one step of the optimiser; return its row of the history."""
    began = time.perf_counter()
    batch = plan.build(step, batch_rows)
    loss = learner.accumulate(batch, step)
    rate = compute_learning_rate(plan.trainer, step, plan.n_steps)
    norm = learner.update(rate)
    if not (torch.isfinite(loss) and np.isfinite(norm)):
        quantity = "gradient" if torch.isfinite(loss) else "loss"
        raise _divergence_error(
            f"The {quantity} is not finite at step {step + 1} of {plan.n_steps}: loss "
            f"{float(loss)}, gradient norm {norm}",
            plan.trainer,
        )
    speed = batch.n_examples / (time.perf_counter() - began)
    epoch = (step + 1) / plan.n_batches
    values = (step + 1, epoch, float(loss), float(rate), norm, speed)
    return dict(zip(STEP_COLUMNS, values, strict=True))


def compute_learning_rate(trainer: ContrastiveTrainer, step: int, n_steps: int) -> float:
    """Return the rate of a step: linear warm-up, then linear decay to zero at the last step."""
    n_warmup = round(trainer.warmup_ratio * n_steps)
    if step < n_warmup:
        return trainer.learning_rate * ((step + 1) / n_warmup)
    return trainer.learning_rate * ((n_steps - step) / max(1, n_steps - n_warmup))


def _is_due(step: int, n_steps: int) -> bool:
    """Return whether a validation is due after so many steps."""
    done, before = (n * N_VALIDATIONS // n_steps for n in (step, step - 1))
    return step == n_steps or done > before


def _validate(learner: _Learner, validation: Validation, progress: _Progress) -> None:
    """Score the model, and keep its weights if it is the best so far."""
    score = learner.processes.broadcast(validation.score(learner.embed_all))
    progress.history.validation_metric = validation.metric
    progress.history.validation.append({"step": progress.step, "score": score})
    if score > progress.best_score:
        progress.best_score, progress.n_worse = score, 0
        if learner.trainer.early_stopping:
            progress.best, progress.history.best_step = learner.weights(), progress.step
    else:
        progress.n_worse += 1


def _divergence_error(problem: str, trainer: ContrastiveTrainer) -> TrainingError:
    """Return the error of a run that cannot go on."""
    return TrainingError(
        f"{problem} (learning_rate={trainer.learning_rate}, temperature={trainer.temperature}). "
        "Lower `learning_rate`, raise `temperature`, or use dtype='bfloat16' or 'float32' where "
        "it is float16. The model is as it was before `fit`."
    )


def _snapshot(
    learner: _Learner, progress: _Progress, plan: BatchPlan
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all that a resumed run needs: tensors, and plain values."""
    tensors = learner.state()
    tensors.update({f"best/{name}": value for name, value in progress.best.items()})
    for number, task in enumerate(plan.tasks):
        if task.mined is not None:
            tensors[f"mined/{number}"] = torch.from_numpy(task.mined)
    values = {
        "step": progress.step,
        "n_worse": progress.n_worse,
        "best_score": None if np.isinf(progress.best_score) else progress.best_score,
        "done": progress.done,
        "history": asdict(progress.history),
    }
    return tensors, values


def _resume(
    learner: _Learner, saved: tuple[dict[str, Tensor], dict[str, Any]], plan: BatchPlan
) -> _Progress:
    """Put the saved state into the learner and the plan; return the progress.

    Raises CheckpointError if the state is not one of this run.
    """
    tensors, values = saved
    trainer = plan.trainer
    check_values(values, n_steps=plan.n_steps, may_stop=trainer.early_stopping)
    mining = {
        f"mined/{number}": task
        for number, task in enumerate(plan.tasks)
        if trainer.mine_negatives and task.examples.loss == "infonce"
    }
    integers = {}
    for name, task in mining.items():
        shape = len(task.examples.columns), trainer.n_negatives
        texts = np.flatnonzero(task.documents >= 0)
        integers[name] = shape, torch.from_numpy(np.append(texts, -1))
    check_tensors(tensors, values, learner.parameters, integers)
    for name, task in mining.items():
        task.mined = tensors[name].numpy()
    learner.restore(tensors)
    best = {n.removeprefix("best/"): t for n, t in tensors.items() if n.startswith("best/")}
    logger.info("resumed at step %d of %d", values["step"], plan.n_steps)
    return _Progress(
        step=values["step"],
        history=TrainingHistory(**values["history"]),
        best_score=-np.inf if values["best_score"] is None else values["best_score"],
        n_worse=values["n_worse"],
        best=best,
        done=values["done"],
    )
