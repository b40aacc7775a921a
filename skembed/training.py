"""`ContrastiveTrainer`: how `NVEmbedVectorizer.fit` fine-tunes.

The parameters are settled; the training itself is not part of this release.
"""

from __future__ import annotations

from typing import Any, NoReturn

from sklearn.base import BaseEstimator


class ContrastiveTrainer(BaseEstimator):
    """Parameters of contrastive fine-tuning with LoRA adapters.

    A plain parameter object with `get_params` and `set_params`, so that a grid search reaches
    ``emb__trainer__temperature``. This release stores the parameters; `fit` of a vectorizer that is
    asked to train raises NotImplementedError.

    Parameters
    ----------
    r : int, default=16
        Rank of the LoRA matrices.
    lora_alpha : float, default=32
        Scale of the LoRA update; the update is multiplied by ``lora_alpha / r``.
    lora_dropout : float, default=0.1
        Dropout in front of the LoRA matrices.
    target_modules : str or list of str, default="all-linear"
        Linear layers that get an adapter, in peft's terms.
    train_pooling : bool, default=True
        Train the pooling layer in full beside the adapters.
    loss : {"auto", "infonce", "cosent"}, default="auto"
        The loss; "auto" takes CoSENT for graded scores and InfoNCE for all else.
    temperature : float, default=0.05
        Divisor of the similarities.
    in_batch_negatives : bool, default=True
        Use the other examples' positives as negatives.
    n_negatives : int, default=7
        Hard negatives per example.
    mine_negatives : {None, "perc_pos", "margin_pos"}, default=None
        Rule of positive-aware hard-negative mining.
    epochs : int, default=1
        Passes over the examples.
    max_steps : int, optional
        Bound on optimiser steps.
    batch_size : int, default=64
        Examples per optimiser step.
    batch_tokens : int or "auto", default="auto"
        Tokens of one gradient-cache chunk.
    max_grad_norm : float, default=1.0
        Bound on the norm of the gradient.
    validation_fraction : float, default=0.0
        Share of the examples held out.
    early_stopping : bool, default=False
        Stop when the validation score no longer rises, and restore the best adapter.
    checkpoint_dir : str or path, optional
        Where the state is written for resuming.
    random_state : int, optional
        Seed.
    verbose : bool, default=False
        Show progress from the start.
    """

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
        epochs: int = 1,
        max_steps: int | None = None,
        batch_size: int = 64,
        batch_tokens: int | str = "auto",
        max_grad_norm: float = 1.0,
        validation_fraction: float = 0.0,
        early_stopping: bool = False,
        checkpoint_dir: Any = None,
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
        self.epochs = epochs
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.max_grad_norm = max_grad_norm
        self.validation_fraction = validation_fraction
        self.early_stopping = early_stopping
        self.checkpoint_dir = checkpoint_dir
        self.random_state = random_state
        self.verbose = verbose


def refuse_training(owner: str) -> NoReturn:
    """Say that this release does not train, and what to do.

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError(
        f"`{owner}.fit` was asked to train (pairs, triplets or a `ContrastiveTrainer`), which this "
        "release of skembed does not do yet. Pass `trainer=None` to use the model frozen."
    )
