"""Bad input: a clear error or a documented result, and the estimator goes on working.

Each test hands one bad thing to an estimator that has worked before, reads the message, and has
the same estimator embed again.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import rewrite, rewrite_config, shard
from tiny import make_vectorizer

from skembed import EmbeddingCache, NVEmbedVectorizer, TruncationWarning
from skembed.exceptions import (
    CacheError,
    CheckpointError,
    ModelNotFoundError,
    SkembedWarning,
)

TEXTS = ["a card was stolen", "open an account", ""]
METHODS = ("fit", "transform", "encode_query", "encode_document")
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
NORM = "embedding_model.norm.weight"


@pytest.fixture(scope="module")
def vectors(golden_dir: Path) -> np.ndarray:
    """What a healthy estimator gives for the texts."""
    return make_vectorizer(golden_dir).transform(TEXTS)


@pytest.fixture
def works(vectors: np.ndarray) -> Callable[[NVEmbedVectorizer], None]:
    """Check that an estimator embeds as it should."""

    def check(emb: NVEmbedVectorizer) -> None:
        np.testing.assert_allclose(emb.fit(TEXTS).transform(TEXTS), vectors, atol=1e-6)

    return check


# Texts

# One for each kind of mistake; test_inputs.py has all of them.
BAD_TEXTS = [
    ("a text", TypeError, r"`X` parameter of `NVEmbedVectorizer`.*a bare str\. Wrap it: \[text\]"),
    (["a", None], ValueError, r"no missing texts; got 1 missing, the first at X\[1\].*missing='"),
    (["a", 7], TypeError, r"must hold texts \(str\); X\[1\] is an int"),
    (np.array([[["a"]]]), ValueError, r"got 3 dimensions, shape \(1, 1, 1\)"),
    (iter(["a"]), TypeError, "Make it a list first"),
]


def test_sides_take_one_text_a_row(emb: NVEmbedVectorizer, works: Any) -> None:
    for X in ([["a", "b", "c"]], np.array([["a", "b", "c"]])):
        for method in ("encode_query", "encode_document"):
            with pytest.raises(ValueError, match="takes one text a row; got 3 columns"):
                getattr(emb, method)(X)
    works(emb)


@pytest.mark.parametrize(("X", "error", "message"), BAD_TEXTS)
def test_bad_texts(
    X: Any, error: type[Exception], message: str, emb: NVEmbedVectorizer, works: Any
) -> None:
    for method in METHODS:
        with pytest.raises(error, match=message):
            getattr(emb, method)(X)
    works(emb)


def test_bad_texts_load_no_model(emb: NVEmbedVectorizer) -> None:
    with pytest.raises(TypeError):
        emb.transform([1])
    assert "_lease" not in emb.__dict__


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_pairs_where_texts_are_wanted(method: str, emb: NVEmbedVectorizer, works: Any) -> None:
    with pytest.raises(ValueError, match=rf"`NVEmbedVectorizer.{method}` takes one text a row"):
        getattr(emb, method)([("a", "b")])
    works(emb)


def test_empty_text_is_valid(emb: NVEmbedVectorizer) -> None:
    found = emb.transform(["", " ", "a"])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_text_of_a_megabyte_is_cut_with_one_warning(emb: NVEmbedVectorizer, works: Any) -> None:
    long = "word " * 200_000
    emb.set_params(max_length=128)
    with pytest.warns(TruncationWarning, match="^1 of 3 texts were longer than max_length=128 tok"):
        found = emb.transform([long, "short", "another", long])
    with pytest.warns(TruncationWarning):
        cut = emb.transform([long[:5_000]])
    np.testing.assert_allclose(found[[0, 3]], np.repeat(cut, 2, axis=0), atol=1e-6)
    works(emb.set_params(max_length=512))


@pytest.mark.parametrize("method", ["transform", "fit_transform", "encode_query"])
def test_truncation_warning_comes_once_and_points_to_the_caller(
    method: str, emb: NVEmbedVectorizer
) -> None:
    texts = ["word " * 600, "words " * 600, "short"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(emb, method)(texts)
    (warning,) = caught
    assert "2 of 3 texts" in str(warning.message)
    if method != "fit_transform":  # scikit-learn's own calls transform
        assert warning.filename == __file__


def test_both_columns_of_pairs_share_one_warning(emb: NVEmbedVectorizer) -> None:
    emb.set_params(max_length=16)
    pairs = [("word " * 50, "words " * 50), ("short", "other " * 50)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        emb.transform(pairs)
    (warning,) = caught
    assert "3 of 4 texts" in str(warning.message)


def test_truncation_warning_can_be_silenced_as_it_says(emb: NVEmbedVectorizer) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=TruncationWarning)
        emb.transform(["word " * 600])


def test_nul_and_special_tokens_in_a_text(emb: NVEmbedVectorizer, works: Any) -> None:
    assert np.isfinite(emb.transform(["\0", "a\0b", "</s>", "<s><s>", "<unk>", "\r\n\t"])).all()
    works(emb)


# Model folders


def test_missing_folder(golden_dir: Path, tmp_path: Path, works: Any) -> None:
    emb = make_vectorizer(tmp_path / "nothing here")
    message = r"`model` parameter of `NVEmbedVectorizer` must be one of \['skembed-mini'\].*nothing"
    for method in METHODS:
        with pytest.raises(ModelNotFoundError, match=message):
            getattr(emb, method)(TEXTS)
    with pytest.raises(OSError, match="nothing here"):
        NVEmbedVectorizer.from_pretrained(tmp_path / "nothing here")
    works(emb.set_params(model=golden_dir))


def test_folder_that_comes_later(fresh_dir: Path, tmp_path: Path, works: Any) -> None:
    emb = make_vectorizer(tmp_path / "later")
    with pytest.raises(ModelNotFoundError):
        emb.fit(TEXTS)
    fresh_dir.rename(tmp_path / "later")
    works(emb)


def test_file_in_place_of_a_folder(fresh_dir: Path, works: Any) -> None:
    emb = make_vectorizer(fresh_dir / WEIGHTS)
    with pytest.raises(ModelNotFoundError, match="there is no such folder"):
        emb.transform(TEXTS)
    works(emb.set_params(model=fresh_dir))


def test_hub_id_offline_explains_itself(golden_dir: Path, works: Any) -> None:
    emb = make_vectorizer("skembed-tests/no-such-model")
    message = (
        "no folder 'skembed-tests/no-such-model' here, and the hub model .* at revision 'main' is "
        "not in the local hub cache and could not be downloaded .offline.*hf download.*"
        "skembed-mini"
    )
    with pytest.raises(ModelNotFoundError, match=message):
        emb.transform(TEXTS)
    with pytest.raises(ModelNotFoundError, match="revision 'abc'"):
        emb.set_params(revision="abc").fit(TEXTS)
    works(emb.set_params(model=golden_dir, revision=None))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_not_opened(name: str, fresh_dir: Path, works: Any) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (fresh_dir / "exploded").touch, ()

    emb = make_vectorizer(fresh_dir)
    works(emb)
    (fresh_dir / WEIGHTS).rename(fresh_dir.parent / WEIGHTS)
    (fresh_dir / name).write_bytes(pickle.dumps(Bomb()))
    message = rf"holds pickled weights only \({name}\), which can run code.*Convert them"
    for method in METHODS:
        with pytest.raises(CheckpointError, match=message):
            getattr(emb, method)(TEXTS)
    assert not (fresh_dir / "exploded").exists()
    (fresh_dir.parent / WEIGHTS).rename(fresh_dir / WEIGHTS)
    works(emb)


def test_no_weights_at_all(fresh_dir: Path) -> None:
    (fresh_dir / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="must hold model.safetensors or .*it holds neither"):
        make_vectorizer(fresh_dir).fit(TEXTS)


@pytest.mark.parametrize("keep", [0, 4, 1_000, -1_000, -1])
def test_truncated_weights(keep: int, fresh_dir: Path, works: Any) -> None:
    emb = make_vectorizer(fresh_dir)
    works(emb)
    content = (fresh_dir / WEIGHTS).read_bytes()
    (fresh_dir / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or not a safetens"):
        emb.transform(TEXTS)
    (fresh_dir / WEIGHTS).write_bytes(content)
    works(emb)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"do not fit its config.json; missing: {NORM}"),
        (
            lambda t: t.update({"extra": t.pop(NORM)}),
            f"missing: {NORM}; unexpected: embedding_model.extra",
        ),
        (
            lambda t: t.update({f"lost_{k}": torch.ones(1) for k in range(9)}),
            r"unexpected: .*lost_4 and 4 more\.",
        ),
    ],
    ids=["missing", "renamed", "many"],
)
def test_weights_that_do_not_fit(change: Any, message: str, fresh_dir: Path, works: Any) -> None:
    emb = make_vectorizer(fresh_dir)
    content = (fresh_dir / WEIGHTS).read_bytes()
    rewrite(fresh_dir, change)
    with pytest.raises(CheckpointError, match=message):
        emb.transform(TEXTS)
    (fresh_dir / WEIGHTS).write_bytes(content)
    works(emb)


def test_missing_shard(fresh_dir: Path, works: Any) -> None:
    shard(fresh_dir)
    emb = make_vectorizer(fresh_dir)
    works(emb)
    (fresh_dir / "model-00002-of-00003.safetensors").rename(fresh_dir / "away")
    with pytest.raises(
        CheckpointError, match=r"lacks model-00002-of-00003.safetensors, named in .*index.json"
    ):
        emb.transform(TEXTS)
    (fresh_dir / "away").rename(fresh_dir / "model-00002-of-00003.safetensors")
    works(emb)


# config.json and tokenizer.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must hold a config.json; it does not"),
        (b"", "config.json cannot be read as JSON"),
        (b'{"model_type": ', "config.json cannot be read as JSON"),
        (b"\xff\xfe\x00", "config.json cannot be read as JSON"),
        (b"[1, 2]", "config.json cannot be read as JSON: it holds no JSON object, but list"),
        (b"{}", "must have model_type 'nvembed' or 'mistral'; got None"),
        (b'{"model_type": "bert"}', "must have model_type 'nvembed' or 'mistral'; got 'bert'"),
        (b'{"model_type": "nvembed"}', "text_config"),
        (b'{"model_type": "mistral"}', "lacks hidden_size, num_hidden_layers, vocab_size"),
        (b'{"model_type": "nvembed", "text_config": {}}', "lacks hidden_size"),
    ],
)
def test_bad_config(content: bytes | None, message: str, fresh_dir: Path, works: Any) -> None:
    emb = make_vectorizer(fresh_dir)
    good = (fresh_dir / CONFIG).read_bytes()
    if content is None:
        (fresh_dir / CONFIG).unlink()
    else:
        (fresh_dir / CONFIG).write_bytes(content)
    for method in METHODS:
        with pytest.raises(CheckpointError, match=message):
            getattr(emb, method)(TEXTS)
    (fresh_dir / CONFIG).write_bytes(good)
    works(emb)


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_attention_config": None},
        {"latent_attention_config": {"num_latents_value": "many"}},
        {"latent_attention_config": [1]},
        {"text_config": {"hidden_size": "wide", "vocab_size": 512, "num_hidden_layers": 2}},
        {"pooling": "max"},
        {"pooling": ["mean"]},
    ],
    ids=["null", "text", "list", "width", "pooling", "pooling-list"],
)
def test_config_with_wrong_values(changes: dict[str, Any], fresh_dir: Path) -> None:
    rewrite_config(fresh_dir, **changes)
    with pytest.raises(CheckpointError, match=r"config.json"):
        make_vectorizer(fresh_dir).transform(TEXTS)


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "nope"}, {"num_key_value_heads": 4}, {"rms_norm_eps": "small"}]
)
def test_config_that_transformers_cannot_build(changes: dict[str, Any], fresh_dir: Path) -> None:
    config = json.loads((fresh_dir / CONFIG).read_text())["text_config"]
    rewrite_config(fresh_dir, text_config={**config, **changes})
    with pytest.raises(CheckpointError, match="config.json"):
        make_vectorizer(fresh_dir).transform(TEXTS)


def test_config_of_other_sizes(fresh_dir: Path) -> None:
    config = json.loads((fresh_dir / CONFIG).read_text())["text_config"]
    rewrite_config(fresh_dir, text_config={**config, "num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"missing: embedding_model.layers.2.*and 4 more"):
        make_vectorizer(fresh_dir).transform(TEXTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must hold a tokenizer.json; it does not.*fast"),
        (b"", "tokenizer.json is not a readable tokenizer"),
        (b'{"version": "1.0"}', "tokenizer.json is not a readable tokenizer"),
        (b"\xff\xfe", "tokenizer.json is not a readable tokenizer"),
    ],
)
def test_bad_tokenizer(content: bytes | None, message: str, fresh_dir: Path, works: Any) -> None:
    emb = make_vectorizer(fresh_dir)
    good = (fresh_dir / TOKENIZER).read_bytes()
    if content is None:
        (fresh_dir / TOKENIZER).unlink()
    else:
        (fresh_dir / TOKENIZER).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        emb.transform(TEXTS)
    (fresh_dir / TOKENIZER).write_bytes(good)
    works(emb)


def test_tokenizer_of_another_model(fresh_dir: Path) -> None:
    config = json.loads((fresh_dir / CONFIG).read_text())["text_config"]
    rewrite_config(fresh_dir, text_config={**config, "eos_token_id": 100_000})
    with pytest.raises(CheckpointError, match="no token of id 1 .begin. or 100000 .end."):
        make_vectorizer(fresh_dir).transform(TEXTS)


# Parameters

BAD_PARAMETERS = [
    ("instruction", "NFCorpos", ValueError, "known task name.*'NFCorpos'. Did you mean 'NFCorpus'"),
    ("document_instruction", "Qoura", ValueError, "`document_instruction` parameter"),
    ("instruction", 7, TypeError, "`instruction` parameter.*got 7"),
    ("instruction", "Instruct: find it", ValueError, "task text alone"),
    ("instruction_template", "Query: ", ValueError, r"field \{instruction\} exactly once"),
    ("device", "gpu", ValueError, "`device` parameter of .* must be 'auto', 'cpu'.*got 'gpu'"),
    ("device", "cuda:99", ValueError, "'cuda:99', but torch sees . CUDA devices here. Pass device"),
    ("device", 99, ValueError, "`device` parameter.*'cuda:99', but torch sees . CUDA devices"),
    ("device", 0.5, TypeError, "`device` parameter"),
    ("dtype", "float23", ValueError, "`dtype` parameter .*got 'float23'. Did you mean 'float32'"),
    ("dtype", "int4", ValueError, "must be one of 'auto', 'float32', 'bfloat16', 'float16'"),
    ("dtype", torch.float64, ValueError, "`dtype` parameter .*got 'float64'"),
    ("dtype", 32, TypeError, "`dtype` parameter .*got 32"),
    ("pooling", "maen", ValueError, "Did you mean 'mean'"),
    ("max_length", 1, ValueError, r"must be an int in \[2, inf\); got 1"),
    ("max_length", 32_769, ValueError, r"must be an int in \[2, 32768\]; got 32769"),
    ("max_length", 5.0, TypeError, "`max_length` parameter"),
    ("truncate_dim", 0, ValueError, "`truncate_dim` parameter.*got 0"),
    ("truncate_dim", 49, ValueError, r"must be an int in \[1, 48\] or None; got 49"),
    ("normalize", "yes", TypeError, "`normalize` parameter.*True or False"),
    ("missing", "zeros", ValueError, "Did you mean 'zero'"),
    ("batch_tokens", 0, ValueError, "`batch_tokens` parameter"),
    ("cache", 3, TypeError, "`cache` parameter"),
    ("revision", 3, TypeError, "`revision` parameter"),
    ("store_weights", 2, TypeError, "`store_weights` parameter"),
    ("n_jobs", 0, ValueError, "n_jobs"),
    ("verbose", "loud", TypeError, "`verbose` parameter"),
    ("model", None, TypeError, "`model` parameter.*got None"),
    ("model", "", ValueError, "`model` parameter"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_PARAMETERS)
def test_bad_parameters(
    name: str,
    value: Any,
    error: type[Exception],
    message: str,
    emb: NVEmbedVectorizer,
    works: Any,
) -> None:
    good = emb.get_params()[name]
    emb.set_params(**{name: value})
    with pytest.raises(error, match=message):
        emb.transform(TEXTS)
    with pytest.raises(error, match=message):
        emb.fit(TEXTS)
    works(emb.set_params(**{name: good}))


@pytest.mark.parametrize("method", ["fit", "transform"])
def test_a_bad_trainer_is_refused(method: str, emb: NVEmbedVectorizer, works: Any) -> None:
    emb.set_params(trainer="always")
    with pytest.raises(ValueError, match="`trainer` parameter.*'auto', None; got 'always'"):
        getattr(emb, method)(TEXTS)
    works(emb.set_params(trainer="auto"))


def test_unknown_parameter_name(golden_dir: Path) -> None:
    with pytest.raises(TypeError, match="max_len"):
        NVEmbedVectorizer(golden_dir, max_len=3)
    with pytest.raises(ValueError, match="Invalid parameter 'max_len'"):
        NVEmbedVectorizer(golden_dir).set_params(max_len=3)


def test_instruction_that_fills_max_length(emb: NVEmbedVectorizer, works: Any) -> None:
    emb.set_params(instruction="Find the text that says just the same", max_length=12)
    with pytest.raises(ValueError, match=r"instruction takes \d+ tokens .*max_length is 12.*Raise"):
        emb.transform(TEXTS)
    assert np.isfinite(emb.encode_document(["a"])).all(), "documents carry no instruction"
    works(emb.set_params(instruction=None, max_length=512))


def test_shortest_max_length_that_an_instruction_allows(emb: NVEmbedVectorizer) -> None:
    emb.set_params(instruction="Find the text that says just the same", max_length=12)
    with pytest.raises(ValueError, match="no token of a text would be left") as caught:
        emb.transform(["word word"])
    n_tokens = int(str(caught.value).split(" tokens")[0].split()[-1])
    with pytest.raises(ValueError, match="no token of a text would be left"):
        emb.set_params(max_length=n_tokens).transform(["word word"])
    with pytest.warns(TruncationWarning):
        found = emb.set_params(max_length=n_tokens + 1).transform(["word word"])
    assert np.isfinite(found).all()


# Cache files


def test_no_room_on_the_disk(golden_dir: Path, tmp_path: Path, works: Any) -> None:
    cache = EmbeddingCache(tmp_path / "cache.sqlite")
    emb = make_vectorizer(golden_dir, cache=cache)
    emb.transform(["kept"])
    connection = cache._store._connect()  # type: ignore[attr-defined]
    (n_pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {n_pages + 2}")
    texts = [f"text {i}" for i in range(200)]
    with pytest.warns(SkembedWarning, match="goes on without it.*no room left on the disk"):
        found = emb.transform(texts)  # computed vectors are not thrown away for the cache's sake
    np.testing.assert_array_equal(found, emb.set_params(cache=None).transform(texts))
    emb.set_params(cache=cache)
    assert len(cache) == 1
    # The next use opens the file anew, and with it goes the limit.
    assert emb.transform(texts).shape == (200, 48)
    assert len(cache) == 201
    works(emb)
    cache.close()


def test_foreign_cache_file_is_refused_and_kept(
    golden_dir: Path, tmp_path: Path, works: Any
) -> None:
    path, content = tmp_path / "notes.txt", b"not a database, but somebody's notes"
    path.write_bytes(content)
    emb = make_vectorizer(golden_dir, cache=path)
    with pytest.raises(CacheError, match="notes.txt"):
        emb.transform(TEXTS)
    assert path.read_bytes() == content
    works(emb.set_params(cache=None))


# Saving


def test_saving_over_the_model_itself_is_refused(fresh_dir: Path, works: Any) -> None:
    emb = make_vectorizer(fresh_dir)
    with pytest.raises(ValueError, match=r"`path` parameter of .*save_pretrained.* another folder"):
        emb.save_pretrained(fresh_dir)
    works(emb)


def test_saving_under_a_file_is_an_os_error(fresh_dir: Path, works: Any) -> None:
    emb = make_vectorizer(fresh_dir)
    with pytest.raises(OSError, match="model.safetensors"):
        emb.save_pretrained(fresh_dir / WEIGHTS / "below")
    works(emb)
