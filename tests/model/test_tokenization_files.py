"""Tokenizers that do not fit, panic, or hold tokens without a vector."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import TEXTS, embed
from paths import GOLDEN
from tiny import make_vectorizer
from tokenizers import Tokenizer

from skembed.exceptions import CheckpointError, TruncationWarning
from skembed.model import tokenization
from skembed.model.tokenization import TextTokenizer


def change(folder: Path, **changes: Any) -> None:
    """Change parts of tokenizer.json."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def test_a_token_without_a_vector_is_told_where_a_text_holds_it(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    tokenizer.add_tokens(["[PAD]", "[ONE]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert np.array_equal(embed(folder), embed(GOLDEN)), "tokens that no text holds are harmless"
    emb = make_vectorizer(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has a token of id 513.*vocab_size"):
        emb.transform(["fine", "and [ONE] is not"])
    with pytest.warns(TruncationWarning):  # what is cut away needs none
        emb.set_params(max_length=8).transform(["a " * 50 + "[ONE]"])


def test_a_vocabulary_beyond_the_models_is_refused(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {**values["model"]["vocab"], "another": len(values["model"]["vocab"])}
    change(folder, model={**values["model"], "vocab": vocab})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 513 tokens.*vocab_size"):
        embed(folder)


class PanicError(BaseException):
    """Stands for pyo3's PanicException, which is no Exception."""


class Panicking:
    """A tokenizer whose library panics on a text."""

    def __init__(self, real: Tokenizer) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def encode_batch_fast(self, texts: list[str]) -> Any:
        raise PanicError("index out of bounds")


def test_a_panic_on_a_text_is_an_error_of_the_tokenizer() -> None:
    tokenizer = TextTokenizer.from_folder(GOLDEN, bos_token_id=1, eos_token_id=2)
    tokenizer.tokenizer = Panicking(tokenizer.tokenizer)  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json fails on a text: index out"):
        tokenizer.encode(["a"], prefix="", max_length=8)


def test_a_panic_while_reading_is_an_error_of_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(content: bytes) -> None:
        raise PanicError("no entry found for key")

    monkeypatch.setattr(tokenization, "Tokenizer", SimpleNamespace(from_buffer=panic))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable tokenizer"):
        TextTokenizer.from_folder(folder, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_is_no_error_of_the_tokenizer(stop: type[BaseException]) -> None:
    tokenizer = TextTokenizer.from_folder(GOLDEN, bos_token_id=1, eos_token_id=2)

    class Stopped(Panicking):
        def encode_batch_fast(self, texts: list[str]) -> Any:
            raise stop

    tokenizer.tokenizer = Stopped(tokenizer.tokenizer)  # type: ignore[assignment]
    with pytest.raises(stop):
        tokenizer.encode(["a"], prefix="", max_length=8)


def test_a_tokenizer_that_gives_nothing(folder: Path) -> None:
    """No added tokens, nothing known: only the begin token is left, which comes from us."""
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = {
        "type": "WordLevel",
        "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2},
        "unk_token": "nothing",
    }
    change(folder, model=model, added_tokens=[], post_processor=None, normalizer=None)
    assert len(values["added_tokens"]) == 3
    try:
        vectors = embed(folder)
    except CheckpointError as error:
        assert "tokenizer.json" in str(error)
    else:
        assert np.isfinite(vectors).all()
        assert len(vectors) == len(TEXTS)
