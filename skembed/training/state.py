"""The state of a training run on disk: written atomically, checked before it is used.

One safetensors file holds weights, optimiser moments and mined negatives, and in its header as
JSON the step, the history, what the run was started with, and a checksum of all. AdamW's fused
kernel trusts the sizes of its moments, so nothing reaches it that is not of the model's shapes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skembed._files import check_fields, find_inside, hold_lock, open_file
from skembed.exceptions import CheckpointError
from skembed.history import STEP_COLUMNS, TrainingHistory
from skembed.model.checkpoint import write_tensors
from skembed.model.weight_files import open_tensors

__all__ = [
    "Checkpoints",
    "INTERVAL_S",
    "OWNER",
    "STATE_FILE",
    "STATE_VERSION",
    "check_folder",
    "check_tensors",
    "check_values",
    "hold_folder",
]

STATE_FILE = "training_state.safetensors"
STATE_VERSION = 2
INTERVAL_S = 30.0
OWNER = "The `checkpoint_dir` parameter of `ContrastiveTrainer`"
_LOCK_FILE = f".{STATE_FILE}.lock"
_ADVICE = "Delete the file to start again, or name another folder."
_MOMENTS = ("exp_avg", "exp_avg_sq")
State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and plain values


class Checkpoints:
    """Saved state of one run in one folder, written every `every` steps or 30 seconds.

    `identity` says part by part what the run is started with. The folder is held by `hold_folder`.
    Raises CheckpointError as `check_folder`, and if a tensor is not as it was written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: Mapping[str, str],
        *,
        every: int | None = None,
    ) -> None:
        self.path = Path(folder).expanduser() / STATE_FILE
        self.identity = dict(identity)
        self.every = every
        self.seed: int | None = None  # the saved run's; whoever starts a run sets it
        self._last = time.monotonic()
        self._saved: State | None = None
        header = _read_header(self.path, identity)
        if header is not None:
            self.seed = header["seed"]
            with open_tensors(self.path) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if _sum_state(tensors, header) != header["crc32"]:
                raise _damage("it was changed after it was written: its checksum is wrong")
            self._saved = tensors, header["values"]

    def read(self) -> State | None:
        """Return tensors and values of the saved run, once; None if there is none."""
        saved, self._saved = self._saved, None
        return saved

    def offer(self, step: int, snapshot: Callable[[], State]) -> None:
        """Save a snapshot if one is due."""
        if self.every is not None:
            due = step % self.every == 0
        else:
            due = time.monotonic() - self._last >= INTERVAL_S
        if due:
            self.write(*snapshot())

    def write(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Save the state, whole or not at all."""
        header = {
            "version": STATE_VERSION,
            "identity": self.identity,
            "seed": self.seed,
            "values": dict(values),
        }
        header["crc32"] = _sum_state(tensors, header)
        write_tensors(self.path, tensors, {"skembed": json.dumps(header)})
        self._last = time.monotonic()


@contextlib.contextmanager
def hold_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for one run, and make it if need be.

    Raises ValueError if nothing can have its name, OSError if it cannot be written,
    BlockingIOError if another run holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            path = Path(folder).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            lock = hold_lock(path / _LOCK_FILE, subject=f"The training state in {str(path)!r}")
            stack.enter_context(lock)
        except (ValueError, RuntimeError) as error:  # a NUL; no such user
            raise ValueError(
                f"{OWNER} must name a folder; got {str(folder)!r:.100} ({error})."
            ) from error
        except BlockingIOError:
            raise
        except OSError as error:
            reason = f"{OWNER} must be a folder that can be written; {error.strerror}"
            raise type(error)(error.errno, reason, str(path)) from error
        yield


def check_folder(folder: str | os.PathLike[str], identity: Mapping[str, str]) -> None:
    """Refuse a folder whose state is of another run than `identity`, or damaged.

    Parts of `identity` may be left out. Raises CheckpointError, and OSError as `hold_folder`.
    """
    with hold_folder(folder):
        _read_header(Path(folder).expanduser() / STATE_FILE, identity)


def _read_header(path: Path, identity: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what a state says of its run; None where there is none."""
    if not os.path.lexists(path):
        return None
    find_inside(path.parent, path.name, subject=f"{OWNER}: its state", error=CheckpointError)
    try:
        open_file(path).close()  # so that nobody waits for a pipe
        with open_tensors(path) as file:
            header = json.loads((file.metadata() or {}).get("skembed", "null"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{OWNER} holds a {STATE_FILE} that cannot be read ({error or type(error).__name__}). "
            f"{_ADVICE}"
        ) from error
    _check_fields(header, {"version": int}, "its header")
    if header["version"] != STATE_VERSION:
        raise CheckpointError(
            f"{OWNER} holds a state of version {header['version']}; this release reads "
            f"{STATE_VERSION}. Delete {path}, or name another folder."
        )
    fields = {"identity": dict, "seed": int, "values": dict, "crc32": int}
    _check_fields(header, fields, "its header")
    if header["seed"] >= 2**32:
        raise _damage(f"its seed is {header['seed']!r:.40}")
    differing = [name for name in identity if header["identity"].get(name) != identity[name]]
    if differing:
        raise CheckpointError(
            f"{OWNER} must be empty or hold the state of this very run; {path} was "
            f"written with another {' and another '.join(differing)}. Name another folder "
            "(one for each run, fold and parameter setting), or delete the file."
        )
    return dict(header)


def _sum_state(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> int:
    """Return the checksum of a state's tensors and of the rest of its header."""
    rest = {name: value for name, value in header.items() if name != "crc32"}
    crc = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(content, crc)
    return crc


def check_values(values: Mapping[str, Any], *, n_steps: int, may_stop: bool) -> None:
    """Raise CheckpointError unless plain values are those of a run of `n_steps`.

    `may_stop`: whether it may have been done before the last step.
    """
    real, null = (int, float), type(None)
    fields: dict[str, Any] = {"step": int, "n_worse": int, "done": bool, "history": dict}
    _check_fields(values, fields | {"best_score": (*real, null)}, "its values")
    step, best_score = values["step"], values["best_score"]
    if not 1 <= step <= n_steps:
        raise _damage(f"its step must lie in [1, {n_steps}]; got {step!r:.40}")
    if best_score is not None and not _is_finite(best_score):
        raise _damage(f"its best_score must be finite; got {best_score}")
    history = values["history"]
    types = {"steps": list, "validation": list, "validation_metric": str, "stopped": str}
    _check_fields(history, types | {"best_step": (int, null)}, "its history")
    if set(history) != set(asdict(TrainingHistory())):
        raise _damage(f"its history has the fields {sorted(history)}")
    for row in history["steps"]:
        _check_fields(row, dict.fromkeys(STEP_COLUMNS, real), "a step of its history")
        if len(row) != len(STEP_COLUMNS) or not all(map(_is_finite, row.values())):
            raise _damage("a step of its history has other fields, or a value that is not finite")
    for row in history["validation"]:
        _check_fields(row, {"step": int, "score": real}, "a validation of its history")
    if [row["step"] for row in history["steps"]] != list(range(1, step + 1)):
        raise _damage(f"its history does not have {step} steps")
    if (history["best_step"] or 0) > step or any(r["step"] > step for r in history["validation"]):
        raise _damage(f"its history goes beyond step {step}")
    stopped = history["stopped"]
    if stopped != "finished" and not (stopped == "early" and may_stop):
        raise _damage(f"its history cannot say that it stopped {stopped!r:.40}")
    if values["done"] and step < n_steps and stopped != "early":
        raise _damage(f"it is done at step {step} of {n_steps}")


def check_tensors(
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    integers: Mapping[str, tuple[tuple[int, ...], Tensor]],
) -> None:
    """Raise CheckpointError unless tensors are those of these parameters after checked `values`.

    `integers` has the shapes and the possible values of what lies beside them.
    """
    expected = {name: (torch.int64, shape) for name, (shape, _) in integers.items()}
    prefixes = ["weights", *(["best"] if values["history"]["best_step"] is not None else [])]
    for name, parameter in parameters.items():
        kind = parameter.dtype, tuple(parameter.shape)
        expected |= {f"{prefix}/{name}": kind for prefix in prefixes}
        if f"step/{name}" in tensors:  # a parameter without a gradient has no moments
            expected |= {f"{prefix}/{name}": kind for prefix in _MOMENTS}
            expected[f"step/{name}"] = (torch.float32, ())
    for name in sorted({*tensors} ^ {*expected}):
        problem = "lacks the tensor" if name in expected else "has the tensor"
        raise _damage(f"it {problem} {name!r:.200}")
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise _damage(
                f"its tensor {name!r} must be {dtype} of shape {shape}; got {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}"
            )
        if not _is_possible(name, tensor, values["step"], integers):
            raise _damage(f"its tensor {name!r} holds values that no training leaves")


def _is_possible(
    name: str, tensor: Tensor, step: int, integers: Mapping[str, tuple[tuple[int, ...], Tensor]]
) -> bool:
    """Return whether a training of so many steps may leave such values."""
    if name in integers:
        return bool(torch.isin(tensor, integers[name][1]).all())
    low, high = -math.inf, math.inf
    if name.startswith("step/"):
        low, high = 1, step
    elif name.startswith("exp_avg_sq/"):
        low = 0
    return bool((torch.isfinite(tensor) & (tensor >= low) & (tensor <= high)).all())


def _is_finite(value: float) -> bool:
    """Return whether a number of JSON, of any size, is a finite float."""
    return -math.inf < value < math.inf and abs(value) <= sys.float_info.max


def _check_fields(values: object, fields: Mapping[str, Any], subject: str) -> None:
    """Raise CheckpointError unless a mapping of the state has these fields."""
    check_fields(values, fields, subject=subject, error=lambda text: _damage(text.rstrip(" .")))


def _damage(reason: str) -> CheckpointError:
    """Return the error of a state that cannot be that of the run."""
    return CheckpointError(f"{OWNER} holds a {STATE_FILE} that is damaged: {reason}. {_ADVICE}")
