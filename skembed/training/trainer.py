"""`ContrastiveTrainer`: the parameters of fine-tuning."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

from sklearn.base import BaseEstimator

from skembed._validation import (
    LARGEST_SEED,
    CheckedParameters,
    Rule,
    check_bool,
    check_choice,
    check_int,
    check_path,
    check_real,
    check_string,
    list_items,
    or_word,
    parameter_error,
)
from skembed.search.negatives import MAX_NEGATIVES

__all__ = ["ContrastiveTrainer", "LOSSES", "MINING_RULES", "OWNER", "check_trainer"]

OWNER = "ContrastiveTrainer"
LOSSES = ("auto", "infonce", "cosent")
MINING_RULES = ("perc_pos", "margin_pos")


def _check_targets(value: Any, *, name: str, owner: str) -> str | list[str]:
    """Return a pattern or a list of names; whether they match shows once the model is loaded."""
    if isinstance(value, str) and value:
        return check_string(value, name=name, owner=owner)
    items = list_items(value)
    if items and all(isinstance(each, str) and each for each in items):
        return [str(each) for each in items]
    expected = "'all-linear', a pattern, or a list of layer names"
    raise parameter_error(value, name=name, owner=owner, expected=expected, kind=TypeError)


_MAX_RANK = 16_384  # wider than the layers, a rank only takes memory
_check_count = partial(check_int, low=1)
_check_bound = partial(check_int, low=1, allow_none=True)
_check_positive = partial(check_real, low=0, inclusive="neither")
_check_share = partial(check_real, low=0, high=1, inclusive="left")
_RULES: dict[str, Rule] = {
    "r": partial(check_int, low=1, high=_MAX_RANK),
    "lora_alpha": _check_positive,
    "lora_dropout": _check_share,
    "target_modules": _check_targets,
    "train_pooling": check_bool,
    "loss": partial(check_choice, allowed=LOSSES),
    "temperature": _check_positive,
    "in_batch_negatives": check_bool,
    "n_negatives": partial(check_int, low=0, high=MAX_NEGATIVES),
    "mine_negatives": partial(check_choice, allowed=(None, *MINING_RULES)),
    "remine": check_bool,
    "blend_tasks": check_bool,
    "epochs": _check_count,
    "max_steps": _check_bound,
    "batch_size": _check_count,
    "batch_tokens": or_word("auto", _check_count),
    "gradient_checkpointing": check_bool,
    "learning_rate": _check_positive,
    "warmup_ratio": _check_share,
    "weight_decay": partial(check_real, low=0),
    "max_grad_norm": _check_positive,
    "validation_fraction": _check_share,
    "early_stopping": check_bool,
    "patience": _check_count,
    "warm_start": check_bool,
    "checkpoint_dir": partial(check_path, expected="a folder", allow_none=True),
    "checkpoint_steps": _check_bound,
    "random_state": partial(check_int, low=0, high=LARGEST_SEED, allow_none=True),
    "verbose": check_bool,
}


class ContrastiveTrainer(CheckedParameters, BaseEstimator):
    """Parameters of contrastive fine-tuning with LoRA adapters.

    A plain parameter object with `get_params` and `set_params`, handed to a vectorizer as
    `trainer`, so that a grid search reaches ``emb__trainer__temperature``. It holds no state:
    several vectorizers may share one.

    Parameters
    ----------
    r : int, default=16
        Rank of the LoRA matrices.
    lora_alpha : float, default=32
        Scale of the LoRA update; the update is multiplied by ``lora_alpha / r``.
    lora_dropout : float, default=0.1
        Dropout in front of the LoRA matrices, in [0, 1).
    target_modules : str or list of str, default="all-linear"
        Linear layers of the backbone that get an adapter, in peft's terms: the ends of their
        names, or a regular expression for whole names (without look-behind and back-references).
    train_pooling : bool, default=True
        Train the pooling layer in full beside the adapters; it then belongs to the estimator (and
        to its pickle: 740 million weights for NV-Embed-v2, 1.5 million for skembed-mini).
    loss : {"auto", "infonce", "cosent"}, default="auto"
        The loss; "auto" takes CoSENT for pairs with graded scores and InfoNCE for all else.
    temperature : float, default=0.05
        Divisor of the cosines in both losses.
    in_batch_negatives : bool, default=True
        Use the other candidates of a batch as negatives (the paper's stage 1). Texts of the same
        class, equal texts and known positives never are.
    n_negatives : int, default=7
        Upper bound on the negatives of one example: given in its row, mined, or (class labels
        without in-batch negatives) drawn from other classes. 0 for none.
    mine_negatives : {None, "perc_pos", "margin_pos"}, default=None
        Mine hard negatives with the model at hand; see `mine_hard_negatives`.
    remine : bool, default=False
        Mine again at the start of each epoch, with the adapter as it is then.
    blend_tasks : bool, default=True
        Mix the tasks of `fit_tasks` in every batch, as the paper does; False keeps each batch to
        one task.
    epochs : int, default=1
        Passes over the examples. Labelled texts meet up to 8 other texts of their class in one.
    max_steps : int, optional
        Bound on optimiser steps.
    batch_size : int, default=64
        Examples of an optimiser step, up to half as many more where they do not divide evenly.
        Memory does not depend on it. Several processes (`skembed.distributed.join_processes`)
        share them out.
    batch_tokens : int or "auto", default="auto"
        Tokens of one forward and backward pass (a chunk of the gradient cache). "auto" chooses by
        device, and embeds small batches once instead of twice.
    gradient_checkpointing : bool, default=False
        Keep one activation a layer and compute the others again: less memory, more time.
    learning_rate : float, default=5e-4
        Peak rate of AdamW.
    warmup_ratio : float, default=0.1
        Share of the steps over which the rate rises from zero; then it falls to zero.
    weight_decay : float, default=0.01
        Of the LoRA matrices; the pooling layer has none.
    max_grad_norm : float, default=1.0
        Bound on the norm of the gradient.
    validation_fraction : float, default=0.0
        Share of the examples held out and scored ten times during training: accuracy of the
        nearest class centroid, mean reciprocal rank of the positive, or Spearman correlation.
    early_stopping : bool, default=False
        Stop when the score has not risen for `patience` evaluations, and keep the best adapter
        (the untrained model counts). Needs a `validation_fraction`.
    patience : int, default=3
        See `early_stopping`.
    warm_start : bool, default=False
        Continue from the adapter of the last `fit` with a new optimiser (the paper's stage 2).
    checkpoint_dir : str or path, optional
        Folder of the state, written atomically; a later `fit` of the same model, parameters and
        examples resumes there and ends in the same adapter. One folder for each run.
    checkpoint_steps : int, optional
        Steps between two saves; None saves every 30 seconds.
    random_state : int, optional
        Seed of initial weights, batches, dropout and validation split. Equal seeds give equal
        adapters on one machine with the same number of threads.
    verbose : bool, default=False
        Show a progress bar, as `verbose` of the vectorizer does.

    See Also
    --------
    NVEmbedVectorizer : Estimator that takes it as `trainer`.
    mine_hard_negatives : The same mining as a function.

    Notes
    -----
    Rank, alpha, dropout and the number of negatives are the paper's. The paper states no
    temperature; 0.05 is what sentence-transformers takes (scale 20). The
    learning rate was compared on few-shot intent data (docs/finetuning.md); warm-up and weight
    decay are customary values and were not tuned.

    References
    ----------
    C. Lee et al., NV-Embed, arXiv 2405.17428, section 4. E. Hu et al., LoRA, arXiv 2106.09685.

    Examples
    --------
    >>> from skembed import ContrastiveTrainer, NVEmbedVectorizer
    >>> texts = ["my card was stolen", "card lost", "open an account", "a new account please"]
    >>> labels = ["card", "card", "account", "account"]
    >>> trainer = ContrastiveTrainer(epochs=2, random_state=0)
    >>> emb = NVEmbedVectorizer(trainer=trainer).fit(texts, labels)
    >>> len(emb.history_)
    2
    """

    _rules = _RULES

    def __init__(
        self,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.1,
        target_modules: str | list[str] = "all-linear",
        train_pooling: bool = True,
        loss: str = "auto",
        temperature: float = 0.05,
        in_batch_negatives: bool = True,
        n_negatives: int = 7,
        mine_negatives: str | None = None,
        remine: bool = False,
        blend_tasks: bool = True,
        epochs: int = 1,
        max_steps: int | None = None,
        batch_size: int = 64,
        batch_tokens: int | str = "auto",
        gradient_checkpointing: bool = False,
        learning_rate: float = 5e-4,
        warmup_ratio: float = 0.1,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        validation_fraction: float = 0.0,
        early_stopping: bool = False,
        patience: int = 3,
        warm_start: bool = False,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_steps: int | None = None,
        random_state: int | None = None,
        verbose: bool = False,
    ) -> None:
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.target_modules = target_modules
        self.train_pooling = train_pooling
        self.loss = loss
        self.temperature = temperature
        self.in_batch_negatives = in_batch_negatives
        self.n_negatives = n_negatives
        self.mine_negatives = mine_negatives
        self.remine = remine
        self.blend_tasks = blend_tasks
        self.epochs = epochs
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.gradient_checkpointing = gradient_checkpointing
        self.learning_rate = learning_rate
        self.warmup_ratio = warmup_ratio
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.validation_fraction = validation_fraction
        self.early_stopping = early_stopping
        self.patience = patience
        self.warm_start = warm_start
        self.checkpoint_dir = checkpoint_dir
        self.checkpoint_steps = checkpoint_steps
        self.random_state = random_state
        self.verbose = verbose


def check_trainer(trainer: ContrastiveTrainer) -> ContrastiveTrainer:
    """Return a copy with built-in values; raise TypeError or ValueError for what is not allowed."""
    checked = copy.copy(trainer)
    checked.__dict__.update(vars(trainer._checked()))
    if checked.early_stopping and not checked.validation_fraction:
        raise ValueError(
            f"The `early_stopping` parameter of `{OWNER}` needs a `validation_fraction` above 0; "
            "got 0. Pass `validation_fraction=0.1`, say."
        )
    if checked.mine_negatives is not None and not checked.n_negatives:
        raise ValueError(
            f"The `n_negatives` parameter of `{OWNER}` must be above 0 where `mine_negatives` is "
            "set; got 0."
        )
    if checked.remine and checked.mine_negatives is None:
        raise ValueError(
            f"The `remine` parameter of `{OWNER}` needs `mine_negatives`; got None. Pass "
            "`mine_negatives='perc_pos'`."
        )
    return checked
