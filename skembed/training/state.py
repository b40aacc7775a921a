"""The state of a training run on disk: written atomically, checked before it is used.

One safetensors file holds weights, optimiser moments and mined negatives, and in its header as
JSON the step, the history and what the run was started with. A state of another model, of other
parameters or of other examples is refused before training starts.
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


class Checkpoints:
    """Saves and reads the state of one run in one folder.

    Parameters
    ----------
    folder : str or path
        Made if need be.
    identity : mapping of str to str
        What the run is started with, part by part: the same folder resumes only the same run.
    every : int or None
        Steps between two saves; None saves every 30 seconds.

    Raises
    ------
    OSError
        When the folder cannot be written.
    CheckpointError
        When it holds the state of another run, or one that cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: Mapping[str, str],
        *,
        every: int | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.identity = dict(identity)
        self.every = every
        self.new_seed = 0
        self._last = time.monotonic()
        _check_writable(self.folder)
        self._seed: int | None = None
        self._saved = self._load()

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / STATE_FILE

    @property
    def seed(self) -> int | None:
        """Seed of the saved run; None when there is none."""
        return self._seed

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and values of the saved run, once; None when there is none."""
        saved, self._saved = self._saved, None
        return saved

    def offer(
        self, step: int, snapshot: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
    ) -> None:
        """Save if it is time to."""
        if self.every is not None:
            due = step % self.every == 0
        else:
            due = time.monotonic() - self._last >= INTERVAL_S
        if due:
            self.write(*snapshot())

    def write(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Save, whole or not at all."""
        header = {
            "skembed": json.dumps(
                {
                    "version": STATE_VERSION,
                    "identity": self.identity,
                    "seed": self.new_seed,
                    "values": dict(values),
                }
            )
        }
        write_tensors(self.path, tensors, header)
        self._last = time.monotonic()

    def _load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The saved run, checked."""
        header = _read_header(self.path, self.identity)
        if header is None:
            return None
        self._seed = int(header["seed"])
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, header["values"]


def check_folder(folder: str | os.PathLike[str], identity: Mapping[str, str]) -> None:
    """Refuse a folder that cannot be written or holds another run, before a model is loaded.

    Parameters
    ----------
    folder : str or path
        Made if need be.
    identity : mapping of str to str
        The parts of a run's identity that are known without its model.

    Raises
    ------
    OSError, CheckpointError
        As `Checkpoints`.
    """
    path = Path(folder).expanduser()
    _check_writable(path)
    _read_header(path / STATE_FILE, identity)


def _read_header(path: Path, identity: Mapping[str, str]) -> dict[str, Any] | None:
    """What a state file says of its run, which must be this one; None without a file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})["skembed"])
        version, found = header["version"], header["identity"]
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
    differing = [name for name in identity if found.get(name) != identity[name]]
    if differing:
        raise CheckpointError(
            f"{OWNER} must be empty or hold the state of this very run; {path} was "
            f"written with another {' and another '.join(differing)}. Name another folder "
            "(one for each run, fold and parameter setting), or delete the file."
        )
    return header


def _check_writable(folder: Path) -> None:
    """Fail now, not at the first save."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            error.errno, f"{OWNER} must be a folder that can be written; {error.strerror}", folder
        ) from error
