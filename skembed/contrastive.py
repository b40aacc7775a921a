"""Training tasks and a `ContrastiveTrainer` -> a trained adapter.

Everything between an estimator's `fit` and the training loop: what is refused before it starts,
the validation split and its score, mining, the seed, resuming.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from skembed.adapters import Adapter, read_pooling, start_lora
from skembed.batches import BatchPlan, ClassIndex, TaskPlan, TextTable
from skembed.checkpoint import ModelSource
from skembed.distributed import Processes, active_processes
from skembed.examples import Examples, split_validation
from skembed.history import TrainingHistory
from skembed.lora import LoraSettings
from skembed.mining import select_negatives
from skembed.registry import LoadedModel
from skembed.trainer import OWNER, ContrastiveTrainer
from skembed.training import TrainingSettings, Validation, run_training
from skembed.training_state import Checkpoints, check_folder

Embed = Callable[[np.ndarray], np.ndarray]
CENTROID_TEXTS = 4_096  # of the training part, for the validation of classes
MRR_DEPTH = 10
BLOCK_SCORES = 1 << 22  # cosines of the validation of rows held at once


@dataclass(frozen=True)
class TaskRequest:
    """One task as an estimator hands it over.

    Attributes
    ----------
    examples : Examples
        Parsed.
    query_prefix, document_prefix : str
        The instruction inside its template, for each side.
    in_batch_negatives : bool or None
        None takes the trainer's.
    weight : float
        Draws relative to the number of examples.
    name : str
        For messages; "" where there is one task only.
    """

    examples: Examples
    query_prefix: str
    document_prefix: str
    in_batch_negatives: bool | None = None
    weight: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class FitResult:
    """An adapter, its history, and how many texts were cut at `max_length`, of how many."""

    adapter: Adapter
    history: TrainingHistory
    n_truncated: int
    n_texts: int


def check_requests(requests: Sequence[TaskRequest], trainer: ContrastiveTrainer) -> list[str]:
    """Refuse what cannot be learned from, before a model is loaded; the loss of each task."""
    losses = _check_losses(requests, trainer)
    if trainer.validation_fraction:
        for request in requests:
            split_validation(request.examples, trainer.validation_fraction, trainer.random_state)
    folder = trainer.checkpoint_dir
    if folder is not None:
        identity = _identify_data(requests, trainer)
        active_processes().on_first(lambda: check_folder(folder, identity))
    return losses


def _check_losses(requests: Sequence[TaskRequest], trainer: ContrastiveTrainer) -> list[str]:
    """The loss of each task, or the reason why one has none."""
    places = [f" (tasks[{i}])" if request.name else "" for i, request in enumerate(requests)]
    return [
        _check_request(request, trainer, where)
        for request, where in zip(requests, places, strict=True)
    ]


def _check_request(request: TaskRequest, trainer: ContrastiveTrainer, where: str) -> str:
    """The loss of a task, or the reason why it has none."""
    examples = request.examples
    loss = trainer.loss
    if loss == "auto":
        loss = "cosent" if examples.kind == "scores" else "infonce"
    if (loss == "cosent") != (examples.kind == "scores"):
        raise ValueError(
            f"The `loss` parameter of `{OWNER}` must be 'auto' or fit the examples: 'cosent' "
            f"takes pairs with graded scores, 'infonce' all else; got {loss!r} with "
            f"{examples.kind}{where}."
        )
    if loss == "cosent":
        own = False
    elif examples.kind == "labels":
        own = not _uses_in_batch(request, trainer) or trainer.mine_negatives is not None
    else:
        own = examples.columns.shape[1] > 2 or trainer.mine_negatives is not None
    own = own and trainer.n_negatives > 0
    if trainer.batch_size == 1 and not own:
        raise ValueError(
            f"The `batch_size` parameter of `{OWNER}` must be above 1 where an example has no "
            f"negatives of its own{where}: alone in a batch it has nothing to be told from; got 1."
        )
    if loss == "infonce" and not own and not _uses_in_batch(request, trainer):
        raise ValueError(
            f"With `in_batch_negatives=False` every example needs negatives of its own{where}: "
            "pass rows (anchor, positive, negative, ...), `mine_negatives='perc_pos'`, or an "
            "`n_negatives` above 0 for class labels."
        )
    return loss


def _uses_in_batch(request: TaskRequest, trainer: ContrastiveTrainer) -> bool:
    """The task's setting, else the trainer's."""
    if request.in_batch_negatives is None:
        return bool(trainer.in_batch_negatives)
    return request.in_batch_negatives


def fit_adapter(
    base: LoadedModel,
    source: ModelSource,
    requests: Sequence[TaskRequest],
    trainer: ContrastiveTrainer,
    *,
    max_length: int,
    start: Adapter | None = None,
    progress: bool | None = None,
) -> FitResult:
    """Train an adapter on one or several tasks.

    Parameters
    ----------
    base : LoadedModel
        The model; it is not changed.
    source : ModelSource
        Its folder, for the pooling weights in their published form.
    requests : sequence of TaskRequest
        The tasks.
    trainer : ContrastiveTrainer
        Checked parameters.
    max_length : int
        Tokens of a text, instruction included.
    start : Adapter, optional
        Where to go on from; None starts anew.
    progress : bool, optional
        True shows a bar, False none, None one after three seconds.

    Raises
    ------
    ValueError, CheckpointError, OSError
        Before training starts, when the tasks, the parameters or the checkpoint folder do not fit.
    TrainingError
        When training cannot go on.
    """
    losses = _check_losses(requests, trainer)
    targets = trainer.target_modules
    lora_settings = LoraSettings(
        trainer.r,
        float(trainer.lora_alpha),
        float(trainer.lora_dropout),
        targets if isinstance(targets, str) else tuple(targets),
    )
    processes = active_processes()
    identity = _identify(base, requests, trainer, max_length, start)
    processes.check_same(identity, owner="NVEmbedVectorizer")
    checkpoints, seed = _open_checkpoints(identity, trainer, processes)
    table = TextTable(
        base.tokenizer, max_length=max_length, mask_prefix=base.config.is_mask_instruction
    )
    tasks, validations = [], []
    for request, loss in zip(requests, losses, strict=True):
        task, validation = _prepare(request, loss, trainer, table, seed)
        tasks.append(task)
        validations += validation
    table.freeze()
    plan = BatchPlan(
        tasks,
        table,
        batch_size=trainer.batch_size,
        n_negatives=trainer.n_negatives,
        seed=seed,
        blend=trainer.blend_tasks,
    )
    settings = _settings(trainer, lora_settings, plan.n_batches, seed)
    lora, pooling = _start_weights(base, source, lora_settings, trainer, start, seed)
    adapter, history = run_training(
        base,
        plan,
        settings,
        lora=lora,
        pooling=pooling,
        validation=_join_validations(validations),
        remine=_miner(plan, trainer) if trainer.mine_negatives else None,
        checkpoints=checkpoints,
        progress=progress if processes.is_first else False,
        processes=processes,
    )
    return FitResult(adapter, history, table.n_truncated, len(table.ids))


def _settings(
    trainer: ContrastiveTrainer, lora: LoraSettings, n_batches: int, seed: int
) -> TrainingSettings:
    """The trainer's parameters as the loop takes them."""
    n_steps = n_batches * trainer.epochs
    if trainer.max_steps is not None:
        n_steps = min(n_steps, trainer.max_steps)
    tokens = trainer.batch_tokens
    return TrainingSettings(
        lora=lora,
        n_steps=n_steps,
        temperature=trainer.temperature,
        learning_rate=trainer.learning_rate,
        warmup_steps=round(trainer.warmup_ratio * n_steps),
        weight_decay=trainer.weight_decay,
        max_grad_norm=trainer.max_grad_norm,
        batch_tokens=None if tokens == "auto" else int(tokens),
        gradient_checkpointing=trainer.gradient_checkpointing,
        early_stopping=trainer.early_stopping,
        patience=trainer.patience,
        seed=seed,
    )


def _start_weights(
    base: LoadedModel,
    source: ModelSource,
    settings: LoraSettings,
    trainer: ContrastiveTrainer,
    start: Adapter | None,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """LoRA and pooling weights to begin with."""
    fresh = start_lora(base.config, settings, np.random.SeedSequence((seed, 2)))
    if start is None:
        return fresh, read_pooling(source, base.config) if trainer.train_pooling else {}
    start.check_base(base.key.fingerprint)
    found = {name: tuple(tensor.shape) for name, tensor in start.lora.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in fresh.items()}
    if found != wanted or start.settings.scaling != settings.scaling:
        raise ValueError(
            f"Training goes on from an adapter with r={start.settings.r}, "
            f"lora_alpha={start.settings.lora_alpha:g} and {len(start.targets)} layers, but the "
            f"`{OWNER}` asks for r={settings.r}, lora_alpha={settings.lora_alpha:g} and "
            f"{len(wanted) // 2} layers. Use the same values, or merge the adapter first "
            "(`save_pretrained(path, merge=True)`) and train on the result."
        )
    if start.pooling and not trainer.train_pooling:
        raise ValueError(
            "Training goes on from an adapter that trained the pooling layer; "
            f"`train_pooling=False` of `{OWNER}` would lose it. Pass True, or merge the adapter "
            "first (`save_pretrained(path, merge=True)`)."
        )
    if trainer.train_pooling and not start.pooling:
        return start.lora, read_pooling(source, base.config)
    return start.lora, start.pooling


def _open_checkpoints(
    identity: dict[str, str], trainer: ContrastiveTrainer, processes: Processes
) -> tuple[Checkpoints | None, int]:
    """The folder of states, if there is to be one, and the seed: the saved run's, or a new one.

    Of several processes the first alone has the folder.
    """
    opened: list[Checkpoints] = []

    def open_first() -> int:
        seed = trainer.random_state
        if trainer.checkpoint_dir is not None:
            every = trainer.checkpoint_steps
            opened.append(Checkpoints(trainer.checkpoint_dir, identity, every=every))
            seed = opened[0].seed if seed is None else seed
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint32)[0])
        for checkpoints in opened:
            checkpoints.new_seed = seed
        return int(seed)

    seed = processes.on_first(open_first)
    return (opened[0] if opened else None), seed


def _identify(
    base: LoadedModel,
    requests: Sequence[TaskRequest],
    trainer: ContrastiveTrainer,
    max_length: int,
    start: Adapter | None,
) -> dict[str, str]:
    """What tells a run from others; nothing where no one asks."""
    if trainer.checkpoint_dir is None and active_processes().size == 1:
        return {}
    return {
        "model": base.key.fingerprint + (f"+{start.fingerprint}" if start else ""),
        "pooling": base.key.pooling,
        "data type or device": f"{base.key.dtype} on {base.key.device.split(':')[0]}",
        "max_length": str(max_length),
        **_identify_data(requests, trainer),
    }


def _identify_data(requests: Sequence[TaskRequest], trainer: ContrastiveTrainer) -> dict[str, str]:
    """What tells a run from others without its model."""
    ignored = {"checkpoint_dir", "checkpoint_steps", "verbose"}
    values = {n: v for n, v in trainer.get_params(deep=False).items() if n not in ignored}
    data = [
        [
            r.examples.fingerprint(),
            r.query_prefix,
            r.document_prefix,
            r.in_batch_negatives,
            r.weight,
        ]
        for r in requests
    ]
    return {"trainer": _digest(values), "set of examples or instruction": _digest(data)}


def _digest(values: Any) -> str:
    """Hash of plain values."""

    def plain(value: Any) -> Any:  # numpy's numbers, from a grid of parameters
        return value.item() if isinstance(value, np.generic) else str(value)

    text = json.dumps(values, sort_keys=True, default=plain)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _prepare(
    request: TaskRequest, loss: str, trainer: ContrastiveTrainer, table: TextTable, seed: int
) -> tuple[TaskPlan, list[Validation]]:
    """A task ready for drawing, and its validation where there is one."""
    examples = request.examples
    # Texts of a class are all queries: that is how `transform` embeds them.
    if examples.kind == "labels" or request.document_prefix == request.query_prefix:
        queries = documents = table.add(examples.texts, request.query_prefix)
    else:
        queries = _add_side(table, examples, examples.columns[:, :1], request.query_prefix)
        documents = _add_side(table, examples, examples.columns[:, 1:], request.document_prefix)
    training = np.arange(len(examples))
    validations = []
    if trainer.validation_fraction:
        training, held = split_validation(examples, trainer.validation_fraction, seed)
        validations = [_validation(examples, training, held, queries, documents, seed)]
    part = _keep_rows(examples, _drop_repeated(examples, training))
    task = TaskPlan(
        part,
        loss,
        _uses_in_batch(request, trainer),
        float(request.weight),
        queries,
        documents,
    )
    return task, validations


def _add_side(table: TextTable, examples: Examples, columns: np.ndarray, prefix: str) -> np.ndarray:
    """Rows of the table of the texts in some columns, (n_texts,); -1 for texts of none."""
    used = np.unique(columns)
    rows = np.full(len(examples.texts), -1, dtype=np.int64)
    rows[used] = table.add([examples.texts[i] for i in used.tolist()], prefix)
    return rows


def _drop_repeated(examples: Examples, rows: np.ndarray) -> np.ndarray:
    """Without the second and later examples of one text and class: no text is its own positive."""
    if examples.labels is None:
        return rows
    pairs = np.stack([examples.columns[rows, 0], examples.labels[rows]], axis=1)
    _, first = np.unique(pairs, axis=0, return_index=True)
    return rows[np.sort(first)]


def _keep_rows(examples: Examples, rows: np.ndarray) -> Examples:
    """Some examples on the same list of texts."""
    labels, scores = examples.labels, examples.scores
    return replace(
        examples,
        columns=examples.columns[rows],
        labels=None if labels is None else labels[rows],
        scores=None if scores is None else scores[rows],
    )


def _validation(
    examples: Examples,
    training: np.ndarray,
    held: np.ndarray,
    queries: np.ndarray,
    documents: np.ndarray,
    seed: int,
) -> Validation:
    """The score of one task's held-out part."""
    columns = examples.columns
    if examples.labels is not None:
        some = np.random.default_rng((seed, 3)).permutation(training)[:CENTROID_TEXTS]
        known, unseen = queries[columns[some, 0]], queries[columns[held, 0]]
        return _validate_classes(known, unseen, examples.labels, some, held)
    if examples.scores is not None:
        left, right = queries[columns[held, 0]], documents[columns[held, 1]]
        return _validate_pairs(left, right, examples.scores[held])
    return _validate_ranks(examples, held, queries, documents)


def _validate_classes(
    known: np.ndarray, unseen: np.ndarray, labels: np.ndarray, some: np.ndarray, held: np.ndarray
) -> Validation:
    """Accuracy of the nearest centroid on unseen texts; the centroids are of the known ones.

    `labels` are those of all examples, `some` and `held` the rows of the known and unseen texts.
    """

    def score(embed: Embed) -> float:
        vectors = embed(known)
        centroids = np.zeros((labels.max() + 1, vectors.shape[1]), dtype=np.float32)
        np.add.at(centroids, labels[some], vectors)
        norms = np.linalg.norm(centroids, axis=1, keepdims=True)
        centroids /= np.maximum(norms, np.finfo(np.float32).tiny)
        found = (embed(unseen) @ centroids.T).argmax(axis=1)
        return float((found == labels[held]).mean())

    return Validation("accuracy of the nearest centroid", score)


def _validate_pairs(left: np.ndarray, right: np.ndarray, scores: np.ndarray) -> Validation:
    """Spearman correlation of the cosines of pairs with their scores."""
    if np.ptp(scores) == 0:
        raise ValueError(
            f"The `validation_fraction` parameter of `{OWNER}` holds out {len(scores)} pairs "
            "whose scores are all equal: there is no order to check. Raise it."
        )

    def score(embed: Embed) -> float:
        cosines = np.einsum("nd,nd->n", embed(left), embed(right))
        return float(spearmanr(cosines, scores).statistic)

    return Validation("Spearman correlation", score)


def _validate_ranks(
    examples: Examples, held: np.ndarray, queries: np.ndarray, documents: np.ndarray
) -> Validation:
    """Mean reciprocal rank of each held-out anchor's own document among all held-out ones."""
    columns = examples.columns
    candidates = np.unique(columns[held, 1:])
    starts, known = examples.known_positives()
    own = np.searchsorted(candidates, columns[held, 1])

    def score(embed: Embed) -> float:
        anchors, vectors = embed(queries[columns[held, 0]]), embed(documents[candidates])
        rank = np.empty(len(held), dtype=np.int64)
        size = max(1, BLOCK_SCORES // len(candidates))
        for block in (slice(k, k + size) for k in range(0, len(held), size)):
            cosines = anchors[block] @ vectors.T  # (rows of the block, n_candidates)
            best = cosines[np.arange(len(cosines)), own[block]]
            for row, anchor in enumerate(columns[held[block], 0]):
                right = np.append(known[starts[anchor] : starts[anchor + 1]], anchor)
                place = np.searchsorted(candidates, right) % len(candidates)
                # Other right answers are no mistakes.
                cosines[row, place[candidates[place] == right]] = -np.inf
            rank[block] = 1 + (cosines > best[:, None]).sum(axis=1)
        return float(np.where(rank <= MRR_DEPTH, 1.0 / rank, 0.0).mean())

    return Validation(f"mean reciprocal rank at {MRR_DEPTH}", score)


def _join_validations(validations: list[Validation]) -> Validation | None:
    """One score for all tasks: the mean."""
    if len(validations) < 2:
        return validations[0] if validations else None

    def score(embed: Embed) -> float:
        return float(np.mean([validation.score(embed) for validation in validations]))

    return Validation(f"mean score of {len(validations)} tasks", score)


def _miner(plan: BatchPlan, trainer: ContrastiveTrainer) -> Callable[[int, Embed], None]:
    """What renews the plan's mined negatives at the start of an epoch."""

    def mine(epoch: int, embed: Embed) -> None:
        if epoch == 0 or trainer.remine:
            for task in plan.tasks:
                if task.loss == "infonce":
                    task.mined = _mine_task(task, embed, trainer)

    return mine


def _mine_task(task: TaskPlan, embed: Embed, trainer: ContrastiveTrainer) -> np.ndarray:
    """Negatives (n, k) of a task's examples as indices into its texts; -1 for none."""
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
    found, _ = select_negatives(anchors, positives, embed(task.documents[candidates]), **rule)
    mined = np.where(found >= 0, candidates[np.maximum(found, 0)], -1)
    return mined if task.classes is None else _drop_shared(mined, columns[:, 0], task.classes)


def _drop_shared(mined: np.ndarray, anchors: np.ndarray, classes: ClassIndex) -> np.ndarray:
    """Without the negatives (n, k) of a class that an anchor's text has in another example."""
    pairs = anchors * classes.n_classes + classes.labels
    wanted = anchors[:, None] * classes.n_classes + classes.of_text[mined]
    return np.where(np.isin(wanted, pairs), -1, mined)


def _other_members(vectors: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For each row the direction of the mean of the other rows of its class, (n, D)."""
    sums = np.zeros((groups.max() + 1, vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, groups, vectors)
    others = sums[groups] - vectors
    norms = np.linalg.norm(others, axis=1, keepdims=True)
    return others / np.maximum(norms, np.finfo(np.float32).tiny)
