"""What has changed since a run began."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import streams
from stream_kills import make_texts
from streams import N_ROWS, ROWS, TEXTS, every_layout, place, read_bytes, read_vectors, stream

from skembed import NVEmbedVectorizer, SkembedWarning

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install skembed[stream]")
parquet = pytest.importorskip("pyarrow.parquet")
dataset = pytest.importorskip("pyarrow.dataset")
DIM = 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: TEXTS[:20] + ["new"] + TEXTS[21:], "rows 16 to 31 are not those that shard 1"),
        (lambda: TEXTS[1:], "rows 0 to 15 are not those that shard 0"),
        (lambda: TEXTS[:30], "it ends after 30 rows, of 32 that were embedded"),
        (lambda: TEXTS[:16], "it ends after 16 rows, of 32 that were embedded"),
        (lambda: [], "it ends after 0 rows, of 32 that were embedded"),
        (lambda: iter(TEXTS[5:]), "A generator must start at its first row again"),
    ],
)
def test_changed_source_is_told(
    quick: NVEmbedVectorizer, begun: Path, change: Callable[[], Any], message: str
) -> None:
    before = read_bytes(begun)
    with pytest.raises(ValueError, match=f"The source has changed since .*{message}"):
        stream(quick, change(), begun)
    assert read_bytes(begun) == before
    assert stream(quick, TEXTS, begun).n_skipped == 2 * ROWS


@pytest.mark.parametrize("n_rows", [N_ROWS, 3 * ROWS])
@every_layout
def test_grown_source_is_told(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str, n_rows: int
) -> None:
    path = place(tmp_path, layout)
    stream(quick, make_texts(n_rows), path)
    with pytest.raises(ValueError, match=f"it goes on after {n_rows} rows, where it ended then"):
        stream(quick, make_texts(n_rows + 1), path)


def test_changed_carried_column_is_told(quick: NVEmbedVectorizer, tmp_path: Path) -> None:
    stream(quick, TEXTS, tmp_path / "out", ids=range(N_ROWS))
    with pytest.raises(ValueError, match="rows 32 to 47 are not those"):
        stream(quick, TEXTS, tmp_path / "out", ids=[*range(40), 99, *range(41, N_ROWS)])


def test_missing_text_is_not_the_empty_one(golden_dir: Path, tmp_path: Path) -> None:
    vectorizer = NVEmbedVectorizer(golden_dir, missing="zero", device="cpu", dtype="float32")
    stream(vectorizer, ["a", None], tmp_path / "out.npy")
    with pytest.raises(ValueError, match="The source has changed"):
        stream(vectorizer, ["a", ""], tmp_path / "out.npy")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model": "skembed-mini"}, "another model"),
        ({"instruction": "find it"}, r'instruction \(\[""\] there, \["Instruct: find it'),
        ({"pooling": "mean"}, r'another pooling \("latent" there, "mean" now\)'),
        ({"dtype": "bfloat16"}, r'dtype of the model \("float32" there, "bfloat16" now\)'),
        ({"truncate_dim": 8}, r"truncate_dim \(width\) \(48 there, 8 now\)"),
        ({"normalize": False}, "another normalize"),
        ({"max_length": 9}, r"another max_length \(512 there, 9 now\)"),
    ],
)
def test_another_model_is_told(
    vectorizer: NVEmbedVectorizer,
    quick: NVEmbedVectorizer,
    begun: Path,
    parameters: dict[str, Any],
    message: str,
) -> None:
    before = read_bytes(begun)
    other = NVEmbedVectorizer(**{**vectorizer.get_params(), **parameters})
    with pytest.raises(ValueError, match=message):
        stream(other, TEXTS, begun)
    assert read_bytes(begun) == before
    stream(other, TEXTS, begun, overwrite=True)
    dim = parameters.get("truncate_dim", 384 if "model" in parameters else DIM)
    assert read_vectors(begun).shape == (N_ROWS, dim)


def test_another_shard_size_is_told(quick: NVEmbedVectorizer, begun: Path) -> None:
    with pytest.raises(ValueError, match=r"another rows_per_shard \(16 there, 8 now\)"):
        stream(quick, TEXTS, begun, rows_per_shard=8)


def test_missing_may_be_eased_after_an_error(
    vectorizer: NVEmbedVectorizer, quick: NVEmbedVectorizer, tmp_path: Path
) -> None:
    texts = [*TEXTS[:40], None, *TEXTS[41:]]
    with pytest.raises(ValueError, match=r"got 1 missing, the first at X\[40\]"):
        stream(quick, texts, tmp_path / "out")
    eased = NVEmbedVectorizer(**{**vectorizer.get_params(), "missing": "empty"})
    monkey = read_bytes(tmp_path / "out")
    assert stream(eased, texts, tmp_path / "out").n_skipped == 2 * ROWS
    assert len(read_bytes(tmp_path / "out")) == len(monkey) + 2
    with pytest.raises(ValueError, match=r'another missing \("empty" there, "error" now\)'):
        stream(quick, TEXTS, tmp_path / "out")


def test_other_versions_are_warned_about(quick: NVEmbedVectorizer, begun: Path) -> None:
    file = begun / "_manifest.json" if begun.is_dir() else Path(f"{begun}.manifest.json")
    text = file.read_text(encoding="utf-8")
    versions = json.loads(text)["origin"]["versions"]
    file.write_text(text.replace(f'"torch": "{versions["torch"]}"', '"torch": "1.0"'))
    with pytest.warns(SkembedWarning, match=r"begun with torch 1\.0 \(now ") as caught:
        stream(quick, TEXTS, begun)
    assert caught[0].filename == streams.__file__
