"""The state of a training run on disk: written atomically, checked before it is used.

One safetensors file holds weights, optimiser moments and mined negatives, and in its header as
JSON the step, the history and what the run was started with.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from skembed.exceptions import CheckpointError
from skembed.model.checkpoint import write_tensors

__all__ = ["Checkpoints", "INTERVAL_S", "OWNER", "STATE_FILE", "STATE_VERSION", "check_folder"]

STATE_FILE = "training_state.safetensors"
STATE_VERSION = 1
INTERVAL_S = 30.0
OWNER = "The `checkpoint_dir` parameter of `ContrastiveTrainer`"
State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and plain values


class Checkpoints:
    """Saved state of one run in one folder, written every `every` steps or 30 seconds.

    `identity` says part by part what the run is started with. Raises OSError and CheckpointError
    as `check_folder`.
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
        header = check_folder(folder, identity)
        if header is not None:
            self.seed = int(header["seed"])
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
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
        write_tensors(self.path, tensors, {"skembed": json.dumps(header)})
        self._last = time.monotonic()


def check_folder(
    folder: str | os.PathLike[str], identity: Mapping[str, str]
) -> dict[str, Any] | None:
    """Return what the state in a folder says of its run; None where there is none.

    Makes the folder if need be. Raises OSError if it cannot be written, CheckpointError if it holds
    the state of a run of another `identity`, of which parts may be left out, or a damaged one.
    """
    path = Path(folder).expanduser() / STATE_FILE
    _check_writable(path.parent)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})["skembed"])
        version, saved_identity = header["version"], header["identity"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{OWNER} holds a {STATE_FILE} that cannot be read ({type(error).__name__}: "
            f"{error}). Delete the file to start again, or name another folder."
        ) from error
    if version != STATE_VERSION:
        raise CheckpointError(
            f"{OWNER} holds a state of version {version!r}; this release reads {STATE_VERSION}. "
            f"Delete {path}, or name another folder."
        )
    differing = [name for name in identity if saved_identity.get(name) != identity[name]]
    if differing:
        raise CheckpointError(
            f"{OWNER} must be empty or hold the state of this very run; {path} was "
            f"written with another {' and another '.join(differing)}. Name another folder "
            "(one for each run, fold and parameter setting), or delete the file."
        )
    return header


def _check_writable(folder: Path) -> None:
    """Check that the folder can be written, before the first save."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            error.errno, f"{OWNER} must be a folder that can be written; {error.strerror}", folder
        ) from error
