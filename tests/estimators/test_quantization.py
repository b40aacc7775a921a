"""EmbeddingQuantizer: scikit-learn's checks, codes and back, search among codes."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_vectorizer import unit_rows
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from skembed import NVEmbedVectorizer
from skembed.estimators.quantization import PRECISIONS, EmbeddingQuantizer
from skembed.estimators.retrieval import Retriever
from skembed.search.codes import Levels, Ranges
from skembed.search.stored_vectors import StoredVectors
from skembed.search.top_k import N_SPARE

every_precision = pytest.mark.parametrize("precision", PRECISIONS)
bytewise = pytest.mark.parametrize("precision", ["int8", "uint8"])


@parametrize_with_checks(
    [
        *(EmbeddingQuantizer(precision) for precision in PRECISIONS),
        EmbeddingQuantizer(quantile_range=(1.0, 99.0)),
    ]
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    """All of them: none is expected to fail."""
    check(estimator)


@pytest.fixture
def corpus(rng: np.random.Generator) -> np.ndarray:
    return unit_rows(rng, 3000, 24)


# Codes


@bytewise
def test_half_a_step_is_lost_at_the_most(precision: str, corpus: np.ndarray) -> None:
    shifted = corpus * np.linspace(0.01, 30, 24, dtype=np.float32) + np.float32(0.5)
    quantizer = EmbeddingQuantizer(precision).fit(shifted)
    codes = quantizer.transform(shifted)
    assert codes.dtype == precision
    assert codes.shape == shifted.shape
    back = quantizer.inverse_transform(codes)
    assert back.dtype == np.float32
    steps = (shifted.max(0) - shifted.min(0)) / 255
    assert (np.abs(back - shifted) <= 0.5001 * steps).all()
    np.testing.assert_array_equal(quantizer.transform(back), codes)
    bounds = np.iinfo(precision)
    assert (codes.min(0) == bounds.min).all()
    assert (codes.max(0) == bounds.max).all()


def test_codes_by_the_formula(corpus: np.ndarray) -> None:
    quantizer = EmbeddingQuantizer("uint8").fit(corpus)
    low, high = corpus.min(0).astype(float), corpus.max(0).astype(float)
    np.testing.assert_array_equal(quantizer.ranges_, np.stack([low, high]).astype(np.float32))
    exact = 255 * (corpus - low) / (high - low)
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-3  # not at the border of two codes
    np.testing.assert_array_equal(quantizer.transform(corpus)[clear], np.rint(exact)[clear])


def test_signed_and_unsigned_codes_are_the_same(corpus: np.ndarray) -> None:
    signed, unsigned = (
        EmbeddingQuantizer(precision).fit(corpus).transform(corpus)
        for precision in ("int8", "uint8")
    )
    np.testing.assert_array_equal(signed.astype(int) + 128, unsigned.astype(int))


def test_binary_keeps_the_sides_of_the_mean(corpus: np.ndarray) -> None:
    dim = 19  # no multiple of 8
    part = corpus[:, :dim] + np.float32(0.3)
    quantizer = EmbeddingQuantizer("binary").fit(part)
    codes = quantizer.transform(part)
    assert codes.shape == (len(part), 3)
    above = part > quantizer.levels_[0]
    np.testing.assert_array_equal(codes, np.packbits(above, axis=1))
    np.testing.assert_allclose(quantizer.levels_[0], part.mean(0), atol=1e-6)
    back = quantizer.inverse_transform(codes)
    for column in range(dim):
        own, mask = part[:, column], above[:, column]
        np.testing.assert_allclose(back[mask, column], own[mask].mean(), atol=1e-5)
        np.testing.assert_allclose(back[~mask, column], own[~mask].mean(), atol=1e-5)


def test_binary_is_the_retrievers_arithmetic(corpus: np.ndarray) -> None:
    stored = StoredVectors.encode(corpus, "binary")
    quantizer = EmbeddingQuantizer("binary").fit(corpus)
    np.testing.assert_array_equal(quantizer.levels_, stored.arrays["levels"])
    np.testing.assert_array_equal(quantizer.transform(corpus), stored.arrays["values"])
    decoded = quantizer.inverse_transform(stored.arrays["values"])
    np.testing.assert_array_equal(decoded, stored.read_rows(slice(None)))


@every_precision
def test_constant_dimensions_come_back_exactly(precision: str, corpus: np.ndarray) -> None:
    part = corpus.copy()
    part[:, 3], part[:, 7] = 0.1, 0.0
    quantizer = EmbeddingQuantizer(precision).fit(part)
    codes = quantizer.transform(part)
    back = quantizer.inverse_transform(codes)
    np.testing.assert_array_equal(back[:, [3, 7]], part[:, [3, 7]])
    changed = part.copy()
    changed[:, 3] = 99.0  # what never changed in `fit` has one code, or one level
    np.testing.assert_array_equal(
        quantizer.inverse_transform(quantizer.transform(changed))[:, 3], part[:, 3]
    )


@bytewise
def test_values_out_of_range_are_clipped(precision: str, corpus: np.ndarray) -> None:
    quantizer = EmbeddingQuantizer(precision).fit(corpus)
    low, high = quantizer.ranges_
    largest = np.finfo(np.float32).max
    outside = np.stack([low - 1, high + 1, np.full(24, -largest), np.full(24, largest)])
    bounds = np.iinfo(precision)
    codes = quantizer.transform(outside)
    assert (codes[[0, 2]] == bounds.min).all()
    assert (codes[[1, 3]] == bounds.max).all()
    np.testing.assert_allclose(quantizer.inverse_transform(codes)[0], low, rtol=1e-6)
    np.testing.assert_allclose(quantizer.inverse_transform(codes)[1], high, rtol=1e-5, atol=1e-6)


def test_percentiles_leave_outliers_out(corpus: np.ndarray) -> None:
    part = corpus.copy()
    part[5, 2] = 1000.0
    wide, narrow = EmbeddingQuantizer().fit(part), EmbeddingQuantizer(quantile_range=(0.5, 99.5))
    narrow.fit(part)
    expected = np.percentile(part.astype(float), [0.5, 99.5], axis=0)
    np.testing.assert_allclose(narrow.ranges_, expected, rtol=1e-5, atol=1e-6)
    errors = [
        np.abs(q.inverse_transform(q.transform(part)) - part)[6:, 2].mean() for q in (wide, narrow)
    ]
    assert errors[1] < errors[0] / 100


def test_percentiles_of_one_column_at_a_time(rng: np.random.Generator) -> None:
    wide = rng.normal(size=(40, 60_000)).astype(np.float32)  # several blocks of columns
    low, high = Ranges.learn(wide, (10.0, 90.0))
    np.testing.assert_allclose([low, high], np.percentile(wide, [10, 90], axis=0), atol=1e-6)


@every_precision
def test_rows_alone_and_together(precision: str, corpus: np.ndarray) -> None:
    quantizer = EmbeddingQuantizer(precision).fit(corpus)
    codes = quantizer.transform(corpus)
    alone = np.vstack([quantizer.transform(corpus[k : k + 1]) for k in (0, 77, 2999)])
    np.testing.assert_array_equal(alone, codes[[0, 77, 2999]])
    assert quantizer.transform(corpus[:0]).shape == (0, codes.shape[1])
    assert quantizer.inverse_transform(codes[:0]).shape == (0, 24)


@every_precision
def test_pickle_and_clone(precision: str, corpus: np.ndarray) -> None:
    quantizer = EmbeddingQuantizer(precision, quantile_range=(1, 99)).fit(corpus)
    again = pickle.loads(pickle.dumps(quantizer))
    np.testing.assert_array_equal(again.transform(corpus), quantizer.transform(corpus))
    assert len(pickle.dumps(quantizer)) < 3000
    assert not hasattr(clone(quantizer), "n_features_in_")


def test_fit_again_forgets(corpus: np.ndarray) -> None:
    quantizer = EmbeddingQuantizer("binary").fit(corpus)
    quantizer.set_params(precision="int8").fit(corpus)
    assert not hasattr(quantizer, "levels_")
    assert quantizer.transform(corpus).dtype == np.int8
    quantizer.set_params(precision="binary").fit(corpus)
    assert not hasattr(quantizer, "ranges_")


@every_precision
def test_frames(precision: str, corpus: np.ndarray) -> None:
    frame = pd.DataFrame(corpus[:50], columns=[f"e{k}" for k in range(24)])
    quantizer = EmbeddingQuantizer(precision).set_output(transform="pandas").fit(frame)
    out = quantizer.transform(frame)
    expected = [f"embeddingquantizer{k}" for k in range(3)] if precision == "binary" else None
    assert out.columns.tolist() == (expected or frame.columns.tolist())
    assert set(out.dtypes) == {quantizer._code_dtype}
    np.testing.assert_array_equal(
        quantizer.inverse_transform(out), quantizer.inverse_transform(out.to_numpy())
    )


def test_in_a_pipeline_after_a_vectorizer(golden_dir: Path) -> None:
    texts = [f"text number {k}" for k in range(9)]
    emb = NVEmbedVectorizer(golden_dir, device="cpu", dtype="float32", trainer=None)
    pipe = make_pipeline(emb, EmbeddingQuantizer())
    codes = pipe.fit_transform(texts)
    assert codes.dtype == np.int8
    assert pipe.transform([]).shape == (0, codes.shape[1])
    back, vectors = pipe[-1].inverse_transform(codes), emb.transform(texts)
    assert ((back * vectors).sum(1) > 0.999).all()


# Search


@every_precision
def test_search_finds_what_exact_scores_of_the_codes_find(
    precision: str, corpus: np.ndarray, rng: np.random.Generator
) -> None:
    queries = unit_rows(rng, 17, 24)
    quantizer = EmbeddingQuantizer(precision).fit(corpus)
    codes = quantizer.transform(corpus)
    found = quantizer.search(queries, codes, top_k=9)
    exact = queries.astype(float) @ quantizer.inverse_transform(codes).T.astype(float)
    np.testing.assert_allclose(found.scores, -np.sort(-exact, axis=1)[:, :9], atol=1e-5)
    own = np.take_along_axis(exact, found.indices, axis=1)
    np.testing.assert_allclose(found.scores, own, atol=1e-5)
    assert (found.scores.dtype, found.indices.dtype) == (np.float32, np.int64)


def test_rescoring_gives_the_exact_result(corpus: np.ndarray, rng: np.random.Generator) -> None:
    queries = unit_rows(rng, 17, 24)
    exact = Retriever(None, similarity="dot").fit(corpus).search(queries, top_k=5)
    for precision, rescore in (("int8", 4), ("binary", 300)):
        quantizer = EmbeddingQuantizer(precision).fit(corpus)
        codes = quantizer.transform(corpus)
        found = quantizer.search(queries, codes, top_k=5, finer=corpus, rescore=rescore)
        np.testing.assert_array_equal(found.indices, exact.indices)
        np.testing.assert_array_equal(found.scores, exact.scores)


def test_binary_with_int8_rescoring(
    corpus: np.ndarray, rng: np.random.Generator, tmp_path: Path
) -> None:
    queries = unit_rows(rng, 40, 24)
    bits, fine = EmbeddingQuantizer("binary").fit(corpus), EmbeddingQuantizer().fit(corpus)
    np.save(tmp_path / "fine.npy", fine.transform(corpus))
    stored = np.load(tmp_path / "fine.npy", mmap_mode="r")
    codes = bits.transform(corpus)
    coarse = bits.search(queries, codes, top_k=10)
    found = bits.search(queries, codes, top_k=10, finer=(fine, stored), rescore=32)
    best = np.argsort(-queries @ corpus.T, axis=1)[:, :10]

    def recall(indices: np.ndarray) -> float:
        shared = [len(set(a) & set(b)) for a, b in zip(indices, best, strict=True)]
        return sum(shared) / best.size

    assert recall(coarse.indices) < 0.6
    assert recall(found.indices) > 0.9
    decoded = fine.inverse_transform(np.asarray(stored))
    own = np.einsum("qd,qkd->qk", queries, decoded[found.indices])
    np.testing.assert_allclose(found.scores, own, atol=1e-6)


def test_search_agrees_with_a_binary_retriever(
    corpus: np.ndarray, rng: np.random.Generator
) -> None:
    queries = unit_rows(rng, 17, 24)
    options = {"storage": "binary", "rescore_storage": "float32", "similarity": "dot"}
    theirs = Retriever(None, device="cpu", **options).fit(corpus).search(queries, top_k=6)
    quantizer = EmbeddingQuantizer("binary").fit(corpus)
    ours = quantizer.search(queries, quantizer.transform(corpus), top_k=6, finer=corpus)
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    np.testing.assert_array_equal(ours.scores, theirs.scores)


def test_equal_scores_come_by_descending_index(corpus: np.ndarray) -> None:
    twins = np.concatenate([corpus[:5]] * 3)
    quantizer = EmbeddingQuantizer().fit(corpus)
    found = quantizer.search(corpus[:5], quantizer.transform(twins), top_k=3)
    np.testing.assert_array_equal(found.indices, np.arange(5)[:, None] + [10, 5, 0])


def test_search_holds_little_memory(rng: np.random.Generator) -> None:
    corpus, queries = unit_rows(rng, 60_000, 16), unit_rows(rng, 2000, 16)
    quantizer = EmbeddingQuantizer().fit(corpus)
    codes = quantizer.transform(corpus)
    tracemalloc.start()
    found = quantizer.search(queries, codes, top_k=20)  # all scores would take 458 MiB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    candidates = 2000 * (20 + N_SPARE)
    ranks = 8 * len(corpus)
    # Working memory and once more what is decoded, the result, and of each candidate its row,
    # rank, score and their order.
    held = found.scores.nbytes + found.indices.nbytes + 3 * ranks
    assert peak <= 2 * 32 * 2**20 + held + 48 * candidates


# Errors


@every_precision
def test_not_fitted(precision: str, corpus: np.ndarray) -> None:
    quantizer = EmbeddingQuantizer(precision)
    for call in (
        lambda: quantizer.transform(corpus),
        lambda: quantizer.inverse_transform(np.zeros((1, 24), np.uint8)),
        lambda: quantizer.search(corpus, np.zeros((1, 24), np.uint8)),
        quantizer.get_feature_names_out,
    ):
        with pytest.raises(NotFittedError):
            call()


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"precision": "int4"}, ValueError, "must be one of 'int8', 'uint8', 'binary'; got 'int4'"),
        ({"precision": 8}, TypeError, "`precision` parameter of `EmbeddingQuantizer`"),
        ({"quantile_range": 0.9}, TypeError, r"pair of numbers, such as \(0.5, 99.5\); got 0.9"),
        ({"quantile_range": (99, 1)}, ValueError, r"must rise, .* got \(99, 1\)"),
        ({"quantile_range": (0, 101)}, ValueError, r"finite number in \[0, 100\]; got 101"),
    ],
)
def test_bad_parameters(
    parameters: dict[str, Any], error: type[Exception], message: str, corpus: np.ndarray
) -> None:
    with pytest.raises(error, match=message):
        EmbeddingQuantizer(**parameters).fit(corpus)


@every_precision
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_not_finite(precision: str, bad: float, corpus: np.ndarray) -> None:
    part = corpus.astype(np.float64)
    part[4, 2] = bad
    with pytest.raises(ValueError, match="NaN|infinity"):
        EmbeddingQuantizer(precision).fit(part)
    quantizer = EmbeddingQuantizer(precision).fit(corpus)
    with pytest.raises(ValueError, match="NaN|infinity"):
        quantizer.transform(part)


def test_one_row_has_no_range(corpus: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"1 sample\(s\).* minimum of 2 is required"):
        EmbeddingQuantizer().fit(corpus[:1])


def test_range_beyond_float32() -> None:
    with pytest.raises(ValueError, match="must have dimensions whose extent .* in column 1"):
        EmbeddingQuantizer().fit([[0, -3e38], [1, 3e38]])


@every_precision
def test_wrong_width(precision: str, corpus: np.ndarray) -> None:
    quantizer = EmbeddingQuantizer(precision).fit(corpus)
    codes = quantizer.transform(corpus)
    with pytest.raises(ValueError, match="X has 23 features, but EmbeddingQuantizer"):
        quantizer.transform(corpus[:, :23])
    with pytest.raises(ValueError, match=r"must be of shape \(n, .*\), as `transform` returns"):
        quantizer.inverse_transform(codes[:, 1:])
    with pytest.raises(ValueError, match="`queries` parameter .* must have 24 columns"):
        quantizer.search(corpus[:, :23], codes)
    with pytest.raises(TypeError, match="must hold codes of `transform`, of dtype"):
        quantizer.inverse_transform(corpus)


def test_bad_searches(corpus: np.ndarray) -> None:
    quantizer = EmbeddingQuantizer().fit(corpus)
    codes = quantizer.transform(corpus)
    with pytest.raises(ValueError, match=r"`top_k` .* must be an int in \[1, inf\); got 0"):
        quantizer.search(corpus, codes, top_k=0)
    with pytest.raises(ValueError, match="`rescore` .* must be an int"):
        quantizer.search(corpus, codes, rescore=0)
    with pytest.raises(ValueError, match="must hold documents; got none"):
        quantizer.search(corpus, codes[:0])
    with pytest.raises(ValueError, match="must hold the 3000 documents of `codes`, of width 24"):
        quantizer.search(corpus, codes, finer=corpus[:-1])
    with pytest.raises(TypeError, match="two-dimensional array of floats; got dtype int8"):
        quantizer.search(corpus, codes, finer=codes)
    with pytest.raises(TypeError, match="a pair of a fitted EmbeddingQuantizer and its codes"):
        quantizer.search(corpus, codes, finer=(codes, quantizer))
    with pytest.raises(NotFittedError):
        quantizer.search(corpus, codes, finer=(EmbeddingQuantizer(), codes))
    bad = corpus.copy()
    bad[3, 3] = np.nan
    with pytest.raises(ValueError, match=r"`queries` .* finite numbers of float32; queries\[3\]"):
        quantizer.search(bad, codes)
    with pytest.raises(ValueError, match="`finer` .* must hold finite numbers"):
        quantizer.search(corpus[:4], codes, finer=np.full_like(corpus, np.nan))


def test_codecs_are_inverse_on_codes(rng: np.random.Generator) -> None:
    levels = Levels.learn(rng.normal(size=(100, 11)).astype(np.float32))
    codes = np.packbits(rng.random((50, 11)) > 0.5, axis=1)
    np.testing.assert_array_equal(levels.encode(levels.decode(codes)), codes)
