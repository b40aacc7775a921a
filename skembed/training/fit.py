"""Training of an adapter from checked examples: seed, mining and resuming."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from skembed.adapters.adapter import Adapter
from skembed.adapters.lora import LoraSettings
from skembed.adapters.targets import start_lora
from skembed.distributed import Processes, active_processes
from skembed.history import TrainingHistory
from skembed.model.checkpoint import read_pooling
from skembed.model.loaded import LoadedModel
from skembed.model.network import without_autocast
from skembed.model.sources import ModelSource
from skembed.search.negatives import select_negatives
from skembed.training.batches import BatchPlan, ClassIndex, TaskSampler, TextTable
from skembed.training.examples import Examples, find_comparable
from skembed.training.loop import run_training
from skembed.training.state import Checkpoints, check_folder, hold_folder
from skembed.training.trainer import OWNER, ContrastiveTrainer
from skembed.training.validation import (
    Embed,
    join_validations,
    split_validation,
    validation,
)

__all__ = ["FitResult", "check_run", "fit_adapter"]


@dataclass(frozen=True)
class FitResult:
    """An adapter, its history, and how many texts were cut at `max_length`, of how many."""

    adapter: Adapter
    history: TrainingHistory
    n_truncated: int
    n_texts: int


def check_run(examples: Sequence[Examples], trainer: ContrastiveTrainer) -> None:
    """Refuse what cannot be trained on, and a split or checkpoint folder that cannot be used.

    Before a model is loaded, and whatever the seed.
    """
    if trainer.validation_fraction:
        for task in examples:
            split_validation(task, trainer.validation_fraction, trainer.random_state)
    for number, task in enumerate(examples):
        alone = len(examples) == 1 or not trainer.blend_tasks
        own = task.columns.shape[1] > 2 or trainer.mine_negatives is not None
        if task.kind == "rows" and alone and not own and not find_comparable(task).any():
            where = "" if len(examples) == 1 else f" of tasks[{number}]"
            raise ValueError(
                f"The pairs{where} must hold an anchor and a positive that do not belong together, "
                "so that there is something to tell apart; every anchor belongs to every positive "
                f"({len(np.unique(task.columns[:, 1]))} different). Add pairs with other positives,"
                " or give negatives: (anchor, positive, negative)."
            )
    folder = trainer.checkpoint_dir
    if folder is not None:
        identity = _identify_data(examples, trainer)
        active_processes().on_first(lambda: check_folder(folder, identity))


@without_autocast()
def fit_adapter(
    base: LoadedModel,
    source: ModelSource,
    examples: Sequence[Examples],
    trainer: ContrastiveTrainer,
    *,
    max_length: int,
    initial: Adapter | None = None,
    progress: bool = False,
) -> FitResult:
    """Train an adapter on one or several tasks, from `initial` if given; `base` does not change.

    `source` has the pooling weights in their published form. `progress` shows a bar. Raises
    ValueError, CheckpointError and OSError before training starts, TrainingError if it cannot
    continue.
    """
    processes = active_processes()
    identity = {}
    if trainer.checkpoint_dir is not None or processes.size > 1:
        identity = _identify(base, examples, trainer, max_length, initial)
        processes.check_same(identity, owner="NVEmbedVectorizer")
    with contextlib.ExitStack() as stack:
        checkpoints, seed = _open_checkpoints(identity, trainer, processes, stack)
        table = TextTable(
            base.tokenizer, max_length=max_length, mask_prefix=base.config.is_mask_instruction
        )
        tasks, validations = [], []
        for task in examples:
            training = held = None
            if trainer.validation_fraction:
                training, held = split_validation(task, trainer.validation_fraction, seed)
            sampler = TaskSampler(task, table, training)
            tasks.append(sampler)
            if training is not None and held is not None:
                texts = sampler.queries, sampler.documents
                validations.append(validation(task, training, held, *texts, seed))
        table.freeze()
        adapter, history = run_training(
            base,
            BatchPlan(tasks, table, trainer, seed),
            _start_adapter(base, source, trainer, initial, seed),
            validation=join_validations(validations) if validations else None,
            mine=partial(_mine_task, trainer=trainer) if trainer.mine_negatives else None,
            checkpoints=checkpoints,
            show_progress=progress and processes.is_first,
            processes=processes,
        )
    return FitResult(adapter, history, table.n_truncated, len(table.ids))


def _start_adapter(
    base: LoadedModel,
    source: ModelSource,
    trainer: ContrastiveTrainer,
    initial: Adapter | None,
    seed: int,
) -> Adapter:
    """Return the LoRA and pooling weights to begin with: fresh ones, or those of `initial`."""
    targets = trainer.target_modules
    settings = LoraSettings(
        int(trainer.r),
        float(trainer.lora_alpha),
        float(trainer.lora_dropout),
        targets if isinstance(targets, str) else tuple(targets),
    )
    lora = start_lora(base.config, settings, np.random.SeedSequence((seed, 2)))
    pooling: dict[str, Tensor] = {}
    if initial is not None:
        initial.check_base(base.key.fingerprint)
        _check_start(initial, settings, lora, trainer)
        lora, pooling = initial.lora, initial.pooling
    if trainer.train_pooling and not pooling:
        pooling = read_pooling(source, base.config)
    return Adapter(settings, lora, pooling, base.key.fingerprint)


def _check_start(
    initial: Adapter, settings: LoraSettings, fresh: dict[str, Tensor], trainer: ContrastiveTrainer
) -> None:
    """Refuse to continue from an adapter of other sizes, or with a pooling that would be lost."""
    shapes = {name: tuple(tensor.shape) for name, tensor in initial.lora.items()}
    fresh_shapes = {name: tuple(tensor.shape) for name, tensor in fresh.items()}
    if shapes != fresh_shapes or initial.settings.scaling != settings.scaling:
        raise ValueError(
            f"Training goes on from an adapter with r={initial.settings.r}, "
            f"lora_alpha={initial.settings.lora_alpha:g} and {len(initial.targets)} layers, but "
            f"the `{OWNER}` asks for r={settings.r}, lora_alpha={settings.lora_alpha:g} and "
            f"{len(fresh_shapes) // 2} layers. Use the same values, or merge the adapter first "
            "(`save_pretrained(path, merge=True)`) and train on the result."
        )
    if initial.pooling and not trainer.train_pooling:
        raise ValueError(
            "Training goes on from an adapter that trained the pooling layer; "
            f"`train_pooling=False` of `{OWNER}` would lose it. Pass True, or merge the adapter "
            "first (`save_pretrained(path, merge=True)`)."
        )


def _open_checkpoints(
    identity: dict[str, str],
    trainer: ContrastiveTrainer,
    processes: Processes,
    stack: contextlib.ExitStack,
) -> tuple[Checkpoints | None, int]:
    """Return the saved states, None without a folder, and the seed: the saved run's, or a new one.

    Only the first of several processes has the states. It holds their folder until `stack` ends.
    """
    checkpoints: Checkpoints | None = None

    def open_first() -> int:
        nonlocal checkpoints
        seed = trainer.random_state
        if trainer.checkpoint_dir is not None:
            every = trainer.checkpoint_steps
            stack.enter_context(hold_folder(trainer.checkpoint_dir))
            checkpoints = Checkpoints(trainer.checkpoint_dir, identity, every=every)
            seed = checkpoints.seed if seed is None else seed
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint32)[0])
        seed = int(seed)
        if checkpoints is not None:
            checkpoints.seed = seed
        return seed

    seed = processes.on_first(open_first)
    return checkpoints, seed


def _identify(
    base: LoadedModel,
    examples: Sequence[Examples],
    trainer: ContrastiveTrainer,
    max_length: int,
    initial: Adapter | None,
) -> dict[str, str]:
    """Return what tells a run from others."""
    return {
        "model": base.key.fingerprint + (f"+{initial.fingerprint}" if initial else ""),
        "pooling": base.key.pooling,
        "data type or device": f"{base.key.dtype} on {base.key.device.split(':')[0]}",
        "max_length": str(max_length),
        **_identify_data(examples, trainer),
    }


def _identify_data(examples: Sequence[Examples], trainer: ContrastiveTrainer) -> dict[str, str]:
    """Return what tells a run from others without its model."""
    ignored = {"checkpoint_dir", "checkpoint_steps", "verbose"}
    values = {n: v for n, v in trainer.get_params(deep=False).items() if n not in ignored}
    data = [task.fingerprint() for task in examples]
    return {"trainer": _digest(values), "set of examples or instruction": _digest(data)}


def _digest(values: Any) -> str:
    """Return a hash of plain values."""

    def plain(value: Any) -> Any:  # numpy's numbers, from a grid of parameters
        return value.item() if isinstance(value, np.generic) else str(value)

    text = json.dumps(values, sort_keys=True, default=plain)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _mine_task(task: TaskSampler, embed: Embed, trainer: ContrastiveTrainer) -> np.ndarray:
    """Return negatives (n, k) of a task's examples as indices into its texts; -1 for none."""
    columns = task.examples.columns
    anchors = embed(task.queries[columns[:, 0]])
    rule: dict[str, Any] = {
        "n_negatives": trainer.n_negatives,
        "strategy": str(trainer.mine_negatives),
    }
    if task.classes is not None:
        texts, counts = np.unique(columns[:, 0], return_counts=True)
        candidates = texts[counts == 1]  # a text of two classes is nobody's negative
        if not len(candidates):
            return np.full((len(columns), trainer.n_negatives), -1)
        positives = _other_members(anchors, task.classes.labels)
        rule["anchor_groups"] = task.classes.labels
        rule["candidate_groups"] = task.classes.of_text[candidates]
    else:
        candidates = np.unique(columns[:, 1])
        positives = embed(task.documents[columns[:, 1]])
        rule["known_positives"] = task.forbidden_candidates(candidates)
    index, _ = select_negatives(anchors, positives, embed(task.documents[candidates]), **rule)
    mined = np.where(index >= 0, candidates[np.maximum(index, 0)], -1)
    return mined if task.classes is None else _drop_shared(mined, columns[:, 0], task.classes)


def _drop_shared(mined: np.ndarray, anchors: np.ndarray, classes: ClassIndex) -> np.ndarray:
    """Drop the negatives (n, k) of a class that an anchor's text has in another example."""
    pairs = anchors * classes.n_classes + classes.labels
    mined_pairs = anchors[:, None] * classes.n_classes + classes.of_text[mined]
    return np.where(np.isin(mined_pairs, pairs), -1, mined)


def _other_members(vectors: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return for each row the direction of the mean of the other rows of its class, (n, D)."""
    sums = np.zeros((groups.max() + 1, vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, groups, vectors)
    others = sums[groups] - vectors
    norms = np.linalg.norm(others, axis=1, keepdims=True)
    return others / np.maximum(norms, np.finfo(np.float32).tiny)
