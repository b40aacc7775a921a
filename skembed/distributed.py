"""`fit` in several processes at once (torchrun, accelerate): one batch, shared exactly.

Every process plans the same batches and embeds its share of each batch's chunks. The embeddings
are gathered; every process computes the loss of the whole batch and runs the gradient at its own
embeddings back through its own chunks. The sum of the weights' gradients over the processes is then
the gradient of one process that did everything, and no collective has to be differentiated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["BUCKET_ELEMENTS", "LAUNCH_VARIABLES", "Processes", "active_processes", "join_processes"]

BUCKET_ELEMENTS = 1 << 24  # of gradients summed in one call: 64 MiB
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """One process among those that train together; alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, costs: Sequence[int]) -> list[list[int]]:
        """Return the items of each process, ascending, of even costs; equal in every process."""
        shares: list[list[int]] = [[] for _ in range(self.size)]
        loads = np.zeros(self.size, dtype=np.int64)
        for item in np.argsort(-np.asarray(costs, dtype=np.int64), kind="stable").tolist():
            least = int(loads.argmin())
            shares[least].append(item)
            loads[least] += costs[item]
        return [sorted(share) for share in shares]

    def fair_budget(self, total: int, budget: int) -> int:
        """Return the tokens of a chunk, at most `budget`, for about as many chunks per process."""
        if self.size == 1:
            return budget
        n_rounds = max(1, -(-total // (self.size * budget)))
        return max(1, -(-total // (self.size * n_rounds)))

    def join_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows of all processes, (sum of counts, D); only this one's have a gradient."""
        if self.size == 1:
            return rows
        pieces = self.gather_rows(rows.detach(), counts)
        pieces[self.rank] = rows
        return torch.cat(pieces)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Return the rows (counts[k], D) of each process k, without gradient."""
        if self.size == 1:
            return [rows]
        padded = rows.new_zeros((max(counts), rows.shape[1]))  # gloo takes equal sizes only
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded)
        return [piece[:n] for piece, n in zip(pieces, counts, strict=True)]

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over all processes; a missing one counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # this process had no chunk of the batch
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, summed in zip(bucket, parts, strict=True):
                gradient.copy_(summed.view_as(gradient))

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def min_over_processes(self, *values: int) -> list[int]:
        """Return the least of each value over all processes."""
        return [min(column) for column in zip(*self._gather(values), strict=True)]

    def _gather(self, value: _T) -> list[_T]:
        """Return the value of each process."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: _T) -> _T:
        """Return the first process's value in every process."""
        return self.on_first(lambda: value)

    def on_first(self, task: Callable[[], _T]) -> _T:
        """Run `task` in the first process only; return its result, or raise its error, in all."""
        if self.size == 1:
            return task()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome = [task(), None]
            except Exception as error:  # all processes stop with it, and none waits for ever
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0)
        result, failure = outcome
        if failure is not None:
            raise failure
        return cast(_T, result)

    def check_same(self, identity: Mapping[str, str], *, owner: str) -> None:
        """Raise ValueError, in every process, if the processes were given different things."""
        gathered = self._gather(dict(identity))
        for rank, other in enumerate(gathered):
            differing = [name for name in identity if other.get(name) != gathered[0].get(name)]
            if differing:
                raise ValueError(
                    f"All processes of a distributed `{owner}.fit` must be given the same texts "
                    f"and parameters, which they share out themselves; process {rank} has another "
                    f"{' and another '.join(differing)} than process 0."
                )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors in groups of at most `BUCKET_ELEMENTS`, larger ones alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


_active = Processes()


def active_processes() -> Processes:
    """Return the processes that a `fit` now trains with."""
    return _active


@contextmanager
def join_processes(*, timeout_s: float = 1_800.0) -> Iterator[Processes]:
    """Train together with the other processes of a launch while this context lasts.

    Under ``torchrun`` this starts the process group, each process on the GPU of its local rank if
    there are GPUs, and ends it again. A running group (accelerate, Lightning) is used as it is.
    Without either there is one process, and everything is as usual.

    Inside, every process calls `fit` with the same texts and parameters and gets the same adapter.
    ``batch_size`` counts the examples of all processes together. Only the first process writes
    checkpoints and shows a progress bar. `transform` works in each process separately.

    Parameters
    ----------
    timeout_s : float, default=1800
        Seconds that a process waits for the others, if this context starts the group.

    Yields
    ------
    Processes
        `rank`, `size` and `is_first` of this process.

    Raises
    ------
    RuntimeError
        If this machine has fewer GPUs than processes, or the others do not join in time.

    See Also
    --------
    skembed.ContrastiveTrainer : Parameters of training.

    Notes
    -----
    The gradient is that of one process with the same batch, up to the order of float32 sums, and
    with ``batch_tokens`` set, dropout included. Different kinds of GPU may let the weights drift
    apart by rounding; the first process's weights are the result.

    References
    ----------
    L. Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
    arXiv 2101.06983.

    Examples
    --------
    >>> from skembed import ContrastiveTrainer, NVEmbedVectorizer
    >>> from skembed.distributed import join_processes
    >>> pairs = [("lost card", "my card was stolen"), ("new account", "open an account")]
    >>> with join_processes() as processes:
    ...     trainer = ContrastiveTrainer(random_state=0)
    ...     emb = NVEmbedVectorizer(trainer=trainer).fit(pairs)
    >>> processes
    Processes(rank=0, size=1)
    """
    global _active
    started = dist.is_available() and not dist.is_initialized() and _is_launched()
    if started:
        _start_group(timeout_s)
    before = _active
    if dist.is_available() and dist.is_initialized():
        _active = Processes(dist.get_rank(), dist.get_world_size())
    try:
        yield _active
    finally:
        _active = before
        if started:
            dist.destroy_process_group()


def _is_launched() -> bool:
    """Return whether a launcher has set this process's rank."""
    return all(name in os.environ for name in LAUNCH_VARIABLES)


def _start_group(timeout_s: float) -> None:
    """Start the process group, on this process's GPU if there are GPUs."""
    backend = "gloo"
    if torch.cuda.is_available():
        local, n_devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= n_devices:
            raise RuntimeError(
                f"Process {local} of this machine has no GPU to itself: torch sees {n_devices}. "
                f"Start at most that many (torchrun --nproc-per-node {n_devices}), or hide the "
                "GPUs (CUDA_VISIBLE_DEVICES='') to train on CPUs."
            )
        torch.cuda.set_device(local)
        if dist.is_nccl_available():
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
