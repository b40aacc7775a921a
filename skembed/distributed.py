"""`fit` in several processes at once (torchrun, accelerate): one batch, shared out exactly.

Every process plans the same batches. Of each batch it embeds its share of the gradient cache's
chunks; the embeddings are gathered, every process takes the loss of the whole batch, with all its
negatives, and the gradient of that loss at its own embeddings, which it runs back through its own
chunks. The sum of the weights' gradients over the processes is then the gradient of one process
that did all of it: no collective has to be differentiated, and memory stays that of a chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["BUCKET_ELEMENTS", "LAUNCH_VARIABLES", "Processes", "active_processes", "join_processes"]

BUCKET_ELEMENTS = 1 << 24  # of gradients summed in one call: 64 MiB
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_T = TypeVar("_T")


class Processes:
    """One process among those that train together; alone by default.

    Attributes
    ----------
    rank : int
        Number of this process, from 0.
    size : int
        How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def __repr__(self) -> str:
        return f"Processes(rank={self.rank}, size={self.size})"

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, costs: Sequence[int]) -> list[list[int]]:
        """Items of each process, ascending; costs even, and the same lists in every process."""
        shares: list[list[int]] = [[] for _ in range(self.size)]
        loads = np.zeros(self.size, dtype=np.int64)
        for item in np.argsort(-np.asarray(costs, dtype=np.int64), kind="stable").tolist():
            least = int(loads.argmin())
            shares[least].append(item)
            loads[least] += costs[item]
        return [sorted(share) for share in shares]

    def fair_budget(self, total: int, budget: int) -> int:
        """Tokens of a chunk, at most `budget`, so that all processes get about as many chunks."""
        if self.size == 1:
            return budget
        n_rounds = max(1, -(-total // (self.size * budget)))
        return max(1, -(-total // (self.size * n_rounds)))

    def join_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows of all processes, first to last, (sum of counts, D); only `own` has a gradient."""
        if self.size == 1:
            return own
        pieces = self.gather_rows(own.detach(), counts)
        pieces[self.rank] = own
        return torch.cat(pieces)

    def gather_rows(self, own: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Rows (counts[k], D) of each process k, without gradient."""
        if self.size == 1:
            return [own]
        padded = own.new_zeros((max(counts), own.shape[1]))  # equal sizes: gloo takes no others
        padded[: len(own)] = own
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded)
        return [piece[:n] for piece, n in zip(pieces, counts, strict=True)]

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Put the sum over all processes into each gradient; where there is none, it is zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # no chunk of the batch fell to this process
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, summed in zip(bucket, parts, strict=True):
                gradient.copy_(summed.view_as(gradient))

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of the first process; equal processes have equal ones."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def lowest(self, *values: int) -> list[int]:
        """The least of each value over all processes."""
        if self.size == 1:
            return list(values)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, values)
        return [min(column) for column in zip(*gathered, strict=True)]

    def agree(self, value: _T) -> _T:
        """The first process's value, in every process."""
        return self.on_first(lambda: value)

    def on_first(self, task: Callable[[], _T]) -> _T:
        """What `task` gives in the first process, which alone runs it; its error, too."""
        if self.size == 1:
            return task()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome = [task(), None]
            except Exception as error:  # all of them stop with it, none waits for ever
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0)
        value, failure = outcome
        if failure is not None:
            raise failure
        result: _T = value
        return result

    def check_same(self, identity: Mapping[str, str], *, owner: str) -> None:
        """Refuse to train where the processes were given different things.

        Raises
        ------
        ValueError
            In every process; it names what differs, and where.
        """
        if self.size == 1:
            return
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, dict(identity))
        for rank, other in enumerate(gathered):
            differing = [name for name in identity if other.get(name) != gathered[0].get(name)]
            if differing:
                raise ValueError(
                    f"All processes of a distributed `{owner}.fit` must be given the same texts "
                    f"and parameters, which they share out themselves; process {rank} has another "
                    f"{' and another '.join(differing)} than process 0."
                )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in groups of at most `BUCKET_ELEMENTS`, larger ones by themselves."""
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
    """The processes that a `fit` of now trains with."""
    return _active


@contextmanager
def join_processes(*, timeout_s: float = 1_800.0) -> Iterator[Processes]:
    """Train together with the other processes of a launch while this context lasts.

    Under ``torchrun`` the process group is started, each process on the GPU of its local number
    where there are GPUs, and ended again; a group that is running already (accelerate, Lightning)
    is used as it is. Without either there is one process, and everything is as usual.

    Inside, every process calls `fit` with the same texts and parameters, and ends up with the same
    adapter. ``batch_size`` counts the examples of all processes together. Checkpoints and the
    progress bar are the first process's alone. `transform` works in each process by itself.

    Parameters
    ----------
    timeout_s : float, default=1800
        Seconds that a process waits for the others before it gives up, where the group is started
        here.

    Yields
    ------
    Processes
        `rank`, `size` and `is_first` of this process.

    Raises
    ------
    RuntimeError
        When there are fewer GPUs than processes on this machine, or the others do not come.

    See Also
    --------
    skembed.ContrastiveTrainer : How `fit` trains.

    Notes
    -----
    The gradient is that of one process with the same batch, up to the order in which float32 sums
    are taken; with ``batch_tokens`` set, dropout included. Equal machines are assumed: between
    different kinds of GPU the weights may drift apart by rounding, and at the end the first
    process's are taken.

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
    """Whether a launcher has told this process its place."""
    return all(name in os.environ for name in LAUNCH_VARIABLES)


def _start_group(timeout_s: float) -> None:
    """Start the process group, on the GPU of this process where there are GPUs."""
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
