"""Mining of hard negatives: guarantees, teachers, errors."""

from __future__ import annotations

import shutil
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from fake_vectorizer import Table, unit_rows
from safetensors.torch import load_file, save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline

from skembed import EmbeddingCache, NVEmbedVectorizer
from skembed.exceptions import SkembedWarning
from skembed.training import mining
from skembed.training.mining import MinedNegatives, mine_hard_negatives

FLOAT32 = {"device": "cpu", "dtype": "float32"}


class TwoSided(Table):
    """The same with queries and documents; queries may have vectors of their own."""

    def __init__(self, vectors: dict[str, Any], queries: dict[str, Any] | None = None) -> None:
        super().__init__(vectors)
        self.queries = queries or {}

    def encode_query(self, texts: list[str]) -> np.ndarray:
        self.calls.append(("query", list(texts)))
        return np.array([self.queries.get(text, self.vectors[text]) for text in texts])

    def encode_document(self, texts: list[str]) -> np.ndarray:
        return self._look_up("document", texts)


def angle(degrees: float) -> np.ndarray:
    """The unit vector of a plane; the score of two is the cosine of what lies between."""
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def random_table(rng: np.random.Generator, texts: list[str], dim: int = 6) -> Table:
    return Table(dict(zip(texts, unit_rows(rng, len(texts), dim), strict=True)))


def negatives_of(mined: MinedNegatives) -> list[list[str]]:
    return [[mined.corpus[j] for j in row if j >= 0] for row in mined.indices.tolist()]


# Texts: pairs


def test_hand_made_pairs() -> None:
    table = Table(
        {
            "q1": angle(0),
            "p1": angle(20),
            "n near": angle(-30),
            "n closer than p1": angle(-5),
            "n far": angle(80),
            "q2": angle(180),
            "p2": angle(175),
        },
        scale=7.5,
    )
    corpus = ["n far", "n near", "n closer than p1", "p1"]
    mined = mine_hard_negatives(
        [("q1", "p1"), ("q2", "p2")], vectorizer=table, corpus=corpus, n_negatives=2
    )
    assert negatives_of(mined)[0] == ["n near", "n far"]  # cos 20 * 0.95 = 0.893 < cos 5
    cosines = np.cos(np.radians([30, 80]))
    np.testing.assert_allclose(mined.scores[0], cosines, atol=1e-6)
    np.testing.assert_allclose(mined.positive_scores, np.cos(np.radians([20, 5])), atol=1e-6)
    assert mined.anchors == ["q1", "q2"]
    assert mined.positives == ["p1", "p2"]
    assert mined.corpus == corpus
    assert mined.positions.tolist() == [0, 1]


def forbidden(pairs: list[tuple[str, str]], anchor: str) -> set[str]:
    partners = {p for a, p in pairs if a == anchor} | {a for a, p in pairs if p == anchor}
    return {anchor, *partners}


@pytest.mark.parametrize("sampling", ["top", "random"])
@pytest.mark.parametrize("with_corpus", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_never_get_what_they_must_not(seed: int, with_corpus: bool, sampling: str) -> None:
    """Random pairs over few texts: anchors in several pairs, on both sides, in circles."""
    rng = np.random.default_rng(seed)
    names = [f"t{i}" for i in range(30)]
    pairs = [(names[a], names[b]) for a, b in rng.integers(0, 30, (60, 2)) if a != b]
    corpus = [names[i] for i in rng.integers(0, 30, 50)] + ["extra"] * 3 if with_corpus else None
    table = random_table(rng, [*names, "extra"])
    mined = mine_hard_negatives(
        pairs,
        vectorizer=table,
        corpus=corpus,
        n_negatives=6,
        strategy="margin_pos",
        threshold=0.0,
        sampling=sampling,
        random_state=seed,
    )
    searched = mined.corpus if with_corpus else list(dict.fromkeys(p for _, p in pairs))
    assert set(mined.corpus) == set(searched)
    n_checked = 0
    for (anchor, positive), found, scores in zip(
        pairs, negatives_of(mined), mined.scores, strict=True
    ):
        banned = forbidden(pairs, anchor)
        assert not banned & set(found)
        assert len(set(found)) == len(found)
        bound = table.vectors[anchor] @ table.vectors[positive]
        own = [float(table.vectors[anchor] @ table.vectors[text]) for text in found]
        np.testing.assert_allclose(scores[: len(found)], own, atol=1e-6)
        assert max(own, default=-1) <= bound + 1e-6
        if sampling == "top":
            allowed = [
                float(table.vectors[anchor] @ table.vectors[text])
                for text in set(searched) - banned
            ]
            best = sorted((score for score in allowed if score <= bound), reverse=True)[:6]
            np.testing.assert_allclose(own, best, atol=1e-6)
        n_checked += len(found)
    assert n_checked > 100


@pytest.mark.parametrize(
    ("pairs", "corpus", "expected"),
    [
        # Without its rule, each case would return the text at 5 degrees.
        ([("a", "p"), ("a", "near"), ("z", "far")], None, ["far"]),
        ([("a", "p"), ("near", "a"), ("z", "near"), ("z", "far")], None, ["far"]),
        ([("a", "p"), ("z", "far")], ["a", "far", "a"], ["far"]),
        ([("a", "p"), ("z", "far")], ["p", "far", "p"], ["far"]),
        ([("a", "p"), ("z", "far")], ["far", "mid", "far"], ["mid", "far"]),
    ],
    ids=["other positive", "reversed", "itself", "duplicate of the positive", "twice"],
)
def test_each_guarantee(
    pairs: list[tuple[str, str]], corpus: list[str] | None, expected: list[str]
) -> None:
    degrees = {"a": 0, "p": 0, "near": 5, "mid": 60, "far": 70, "z": 90}
    table = Table({name: angle(value) for name, value in degrees.items()})
    mined = mine_hard_negatives(
        pairs, vectorizer=table, corpus=corpus, strategy="margin_pos", threshold=0
    )
    assert negatives_of(mined)[0] == expected


def test_indices_point_to_the_first_of_equal_texts() -> None:
    table = Table({"a": angle(0), "p": angle(0), "b": angle(9), "n": angle(50), "m": angle(60)})
    mined = mine_hard_negatives(
        [("a", "p"), ("b", "p")], vectorizer=table, corpus=["m", "p", "n", "m", "n"], n_negatives=3
    )
    assert mined.indices[0].tolist() == [2, 0, -1]
    assert len(mined.corpus) == 5


def test_each_text_is_embedded_once_a_side(rng: np.random.Generator) -> None:
    pairs = [("a", "b"), ("a", "c"), ("b", "d"), ("a", "b")]
    corpus = ["x", "b", "x", "y"]
    vectors = random_table(rng, list("abcdxy")).vectors
    one = Table(vectors)
    mine_hard_negatives(pairs, vectorizer=one, corpus=corpus)
    assert [side for side, _ in one.calls] == ["transform"]
    assert sorted(one.calls[0][1]) == list("abcdxy")
    two = TwoSided(vectors)
    mine_hard_negatives(pairs, vectorizer=two, corpus=corpus)
    asked = {side: sorted(texts) for side, texts in two.calls}
    assert asked == {"query": ["a", "b"], "document": list("bcdxy")}
    assert len(two.calls) == 2
    two = TwoSided(vectors)
    mine_hard_negatives(["a", "b", "a", "c", "d"], list("xxxyy"), vectorizer=two)
    assert [(side, sorted(texts)) for side, texts in two.calls] == [("query", list("abcd"))]


def test_anchors_are_queries_and_the_rest_documents() -> None:
    documents = {"a": angle(170), "p": angle(10), "n": angle(30), "m": angle(100), "b": angle(99)}
    table = TwoSided(documents, queries={"a": angle(0), "b": angle(80)})
    mined = mine_hard_negatives([("a", "p"), ("b", "m")], vectorizer=table, corpus=["n", "m"])
    np.testing.assert_allclose(mined.positive_scores, np.cos(np.radians([10, 20])), atol=1e-6)
    np.testing.assert_allclose(mined.scores[0, :2], np.cos(np.radians([30, 100])), atol=1e-6)
    assert mined.indices[0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("make", [np.array, pd.DataFrame, lambda rows: [list(row) for row in rows]])
def test_containers_of_pairs(make: Any, rng: np.random.Generator) -> None:
    pairs = [("a", "p"), ("b", "q"), ("c", "r")]
    table = random_table(rng, list("abcxyz"))
    table.vectors.update({p: table.vectors[a] for a, p in pairs})
    corpus = list("xyz")
    expected = mine_hard_negatives(pairs, vectorizer=table, corpus=corpus)
    assert expected.n_found.tolist() == [3, 3, 3]
    for searched in (corpus, tuple(corpus), np.array(corpus), pd.Series(corpus), pl.Series(corpus)):
        found = mine_hard_negatives(make(pairs), vectorizer=table, corpus=searched)
        np.testing.assert_array_equal(found.indices, expected.indices)
        assert found.corpus == corpus


# Texts: labels


@pytest.mark.parametrize("seed", range(3))
def test_labels_never_get_their_own_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"t{i}" for i in range(40)]
    classes = dict(zip(names, np.arange(40) % 4, strict=True))
    texts = names + [names[i] for i in rng.integers(0, 40, 20)]
    table = random_table(rng, names)
    labels = [["red", "blue", "green", "grey"][classes[text]] for text in texts]
    mined = mine_hard_negatives(
        texts, labels, vectorizer=table, strategy="margin_pos", threshold=0, n_negatives=5
    )
    assert mined.anchors == texts
    assert mined.corpus == texts
    for i, found in enumerate(negatives_of(mined)):
        text, positive = texts[i], mined.positives[i]
        assert classes[positive] == classes[text] and positive != text
        assert len(set(found)) == len(found)
        bound = float(table.vectors[text] @ table.vectors[positive])
        others = [
            float(table.vectors[text] @ table.vectors[t])
            for t in names
            if classes[t] != classes[text]
        ]
        best = sorted((score for score in others if score <= bound), reverse=True)[:5]
        np.testing.assert_allclose(mined.scores[i, : len(found)], best, atol=1e-6)


def test_the_positive_is_the_next_of_the_class() -> None:
    texts = ["a1", "b1", "a2", "a1", "b2", "a3"]
    vectors = {text: angle(10 * i) for i, text in enumerate(["a1", "a2", "a3", "b1", "b2"])}
    mined = mine_hard_negatives(texts, [0, 1, 0, 0, 1, 0], vectorizer=Table(vectors), threshold=1)
    assert mined.positives == ["a2", "b2", "a3", "a2", "b1", "a1"]
    assert mined.positions.tolist() == [0, 1, 2, 3, 4, 5]


def test_texts_of_several_classes_are_left_out() -> None:
    texts = ["a", "a2", "x", "b", "b2", "x", "c", "x2", "c2", "x2"]
    labels = ["A", "A", "A", "B", "B", "B", "C", "C", "C", "A"]
    vectors = {text: angle(i) for i, text in enumerate(dict.fromkeys(texts))}
    with pytest.warns(SkembedWarning, match="4 of 10 texts cannot be anchors") as caught:
        mined = mine_hard_negatives(
            texts, labels, vectorizer=Table(vectors), strategy="margin_pos", threshold=0
        )
    assert caught[0].filename == __file__
    assert mined.positions.tolist() == [0, 1, 3, 4, 6, 8]
    assert {"x", "x2"}.isdisjoint(mined.positives)
    assert {"x", "x2"}.isdisjoint(sum(negatives_of(mined), []))


def test_a_class_with_one_clear_text_has_no_anchor() -> None:
    texts, labels = ["a", "a2", "b", "x", "x"], [0, 0, 1, 1, 0]
    vectors = {"a": angle(0), "a2": angle(5), "b": angle(30), "x": angle(1)}
    with pytest.warns(SkembedWarning, match="3 of 5 texts cannot be anchors"):
        mined = mine_hard_negatives(texts, labels, vectorizer=Table(vectors))
    assert mined.anchors == ["a", "a2"]
    assert negatives_of(mined) == [["b"], ["b"]], "it is a negative all the same"


# Rows for training


def make_mined(indices: list[list[int]]) -> MinedNegatives:
    found = np.array(indices)
    n = len(indices)
    return MinedNegatives(
        anchors=[f"a{i}" for i in range(n)],
        positives=[f"p{i}" for i in range(n)],
        positions=np.arange(n),
        indices=found,
        scores=np.where(found >= 0, 0.5, np.nan).astype(np.float32),
        positive_scores=np.ones(n, dtype=np.float32),
        corpus=["x", "y", "z"],
    )


def test_rows_are_of_one_length() -> None:
    mined = make_mined([[2, 0, 1], [1, 2, -1], [0, -1, -1], [-1, -1, -1]])
    assert mined.n_found.tolist() == [3, 2, 1, 0]
    with pytest.warns(SkembedWarning, match="Of 4 anchors, 1 had too few .* and 2 had fewer") as w:
        rows = mined.to_rows()
    assert w[0].filename == __file__
    assert rows == [
        ("a0", "p0", "z", "x", "y"),
        ("a1", "p1", "y", "z", "y"),
        ("a2", "p2", "x", "x", "x"),
    ]
    with pytest.warns(SkembedWarning, match="3 had too few .* and 0 had fewer"):
        assert mined.to_rows(min_negatives=3) == rows[:1]


def test_complete_rows_come_without_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_mined([[0, 1], [2, 1]]).to_rows() == [
            ("a0", "p0", "x", "y"),
            ("a1", "p1", "z", "y"),
        ]


def test_rows_that_cannot_be() -> None:
    mined = make_mined([[2, -1, -1]])
    with pytest.raises(ValueError, match="`min_negatives` .* at most 1, the most .*; got 2"):
        mined.to_rows(min_negatives=2)
    with pytest.raises(ValueError, match=r"`min_negatives` .* an int in \[1, 3\]; got 4"):
        mined.to_rows(min_negatives=4)
    with pytest.raises(TypeError, match="`min_negatives`"):
        mined.to_rows(min_negatives=1.0)  # type: ignore[arg-type]


def test_repr_shows_no_text() -> None:
    assert repr(make_mined([[2, 1, -1]])) == (
        "MinedNegatives(n_anchors=1, n_negatives=3, n_found=2, n_corpus=3)"
    )


# Real vectorizers


PAIRS = [
    ("my card was stolen on holiday", "how to report a stolen card"),
    ("I want to open an account", "opening an account, step by step"),
    ("the machine kept my card", "what to do when a cash machine keeps your card"),
    ("is there a fee for transfers?", "fees for transfers abroad"),
    ("I forgot my password", "resetting a forgotten password"),
]


@pytest.fixture(scope="module")
def other_dir(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, trained on, so to say: same name and config, other weights."""
    folder = tmp_path_factory.mktemp("trained") / golden_dir.name
    shutil.copytree(golden_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(1)
    for name, tensor in tensors.items():
        noise = rng.standard_normal(tuple(tensor.shape)).astype(np.float32)
        tensors[name] = tensor + tensor.std() * tensor.new_tensor(noise)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_new_weights_mine_anew(golden_dir: Path, other_dir: Path) -> None:
    """One cache before and after: no vector of the old weights is used for the new ones."""
    emb = NVEmbedVectorizer(golden_dir, cache=EmbeddingCache(), **FLOAT32)
    rule = {"strategy": "margin_pos", "threshold": 0.0, "n_negatives": 3}
    before = mine_hard_negatives(PAIRS, vectorizer=emb, **rule)
    emb.set_params(model=other_dir)
    after = mine_hard_negatives(PAIRS, vectorizer=emb, **rule)
    fresh = NVEmbedVectorizer(other_dir, cache=None, **FLOAT32)
    expected = mine_hard_negatives(PAIRS, vectorizer=fresh, **rule)
    np.testing.assert_array_equal(after.indices, expected.indices)
    np.testing.assert_allclose(after.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(after.positive_scores, expected.positive_scores, atol=1e-5)
    assert np.abs(after.positive_scores - before.positive_scores).max() > 0.01
    assert not np.array_equal(after.indices, before.indices)


def test_the_instruction_is_that_of_the_vectorizer(golden_dir: Path) -> None:
    emb = NVEmbedVectorizer(
        golden_dir, instruction="Find the answer", document_instruction="Read the page", **FLOAT32
    )
    mined = mine_hard_negatives(PAIRS, vectorizer=emb, threshold=1.0)
    queries = emb.encode_query([anchor for anchor, _ in PAIRS])
    documents = emb.encode_document([positive for _, positive in PAIRS])
    own = (queries * documents).sum(1)
    np.testing.assert_allclose(mined.positive_scores, own, atol=1e-5)
    found = mined.indices >= 0
    scores = queries @ documents.T
    np.testing.assert_allclose(
        mined.scores[found], np.take_along_axis(scores, mined.indices, 1)[found], atol=1e-5
    )
    assert found.any()


@pytest.mark.parametrize("output", ["default", "pandas", "polars"])
def test_a_scikit_learn_pipeline_as_teacher(output: str) -> None:
    teacher = make_pipeline(TfidfVectorizer(), TruncatedSVD(4, random_state=0))
    texts = [text for pair in PAIRS for text in pair]
    teacher.fit(texts)
    teacher[-1].set_output(transform=output)
    mined = mine_hard_negatives(PAIRS, vectorizer=teacher, n_negatives=2)
    vectors = np.asarray(teacher.transform(texts))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    own = (vectors[::2] * vectors[1::2]).sum(1)
    np.testing.assert_allclose(mined.positive_scores, own, atol=1e-5)
    assert mined.n_found.sum() > 0


# Memory


def test_memory_of_many_pairs_of_one_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 3,000 pairs must not each list all 3,000 positives at once: 9 million indices."""
    n, limit = 3000, 4 * 2**20
    monkeypatch.setattr(mining, "BLOCK_BYTES", limit)
    rng = np.random.default_rng(0)
    pairs = [("anchor", f"p{i}") for i in range(n)]
    table = random_table(rng, ["anchor", *(f"p{i}" for i in range(n)), "other"])
    table.vectors["anchor"][:] = -table.vectors["other"]
    tracemalloc.start()
    mined = mine_hard_negatives(pairs, vectorizer=table, corpus=[p for _, p in pairs] + ["other"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {text for row in negatives_of(mined) for text in row} == {"other"}
    assert peak < 64 * 2**20 + 3 * limit  # of `select_negatives`' blocks, and the parts here


def test_parts_change_nothing(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"t{i}" for i in range(60)]
    pairs = [(names[a], names[b]) for a, b in rng.integers(0, 60, (100, 2)) if a != b]
    table = random_table(rng, names)

    def mine() -> MinedNegatives:
        return mine_hard_negatives(
            pairs, vectorizer=table, n_negatives=3, sampling="random", random_state=3
        )

    whole = mine()
    monkeypatch.setattr(mining, "BLOCK_BYTES", 2000)
    parts = mine()
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-6)


def test_progress_bar_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table({"a": angle(0), "p": angle(1), "b": angle(90), "q": angle(91)})
    pairs = [("a", "p"), ("b", "q")]
    rule = {"vectorizer": table}
    mine_hard_negatives(pairs, **rule)
    assert capsys.readouterr().err == ""
    mine_hard_negatives(pairs, verbose=True, **rule)
    assert "mining: 100%" in capsys.readouterr().err


# Errors


@pytest.mark.parametrize(
    ("X", "y", "changes", "error", "message"),
    [
        ("text", None, {}, TypeError, "`X` .* got a bare str"),
        ([], None, {}, ValueError, "`X` parameter of `mine_hard_negatives`"),
        (["a", "b"], None, {}, ValueError, "`y` .* class label for each text"),
        ([("a", "b", "c"), ("d", "e", "f")], None, {}, ValueError, "`X` .* got rows of 3 texts"),
        (PAIRS, [0.1, 0.2, 0.3, 0.4, 0.5], {}, ValueError, "`y` .* None for pairs.* got scores"),
        (PAIRS, list("abcde"), {}, ValueError, "`y` parameter of `mine_hard_negatives`"),
        (["a", "b"], [0], {}, ValueError, "`y` .* got 1"),
        (["a", "b", "c"], [0, 0, 0], {}, ValueError, "one class|two classes|2 classes"),
        (["a", "b", "c", "d"], [0, 0, 1, None], {}, ValueError, r"`y` .* y\[3\]"),
        ([("a", "p"), ("b", None)], None, {}, ValueError, r"`X`.* X\[1\]\[1\]"),
        (list("abcd"), [0, 0, 1, 1], {"corpus": ["x"]}, ValueError, "`corpus` .* must be None"),
        (PAIRS, None, {"corpus": "text"}, TypeError, "`corpus` .* got a bare str"),
        (PAIRS, None, {"corpus": []}, ValueError, "`corpus` .* at least one text.* got none"),
        (PAIRS, None, {"corpus": PAIRS}, ValueError, "`corpus` .* got pairs"),
        (PAIRS, None, {"corpus": ["a", 3]}, TypeError, r"`corpus` .* corpus\[1\] is an int"),
        (PAIRS, None, {"corpus": ["a", None]}, ValueError, r"`corpus` .* corpus\[1\]"),
        (PAIRS, None, {"verbose": 2}, TypeError, "`verbose`"),
        (
            ["a", "b", "a", "b", "a", "b"],
            [0, 0, 1, 1, 2, 2],
            {},
            ValueError,
            "`y` .* several classes are left out",
        ),
    ],
)
def test_wrong_texts(X: Any, y: Any, changes: dict[str, Any], error: type, message: str) -> None:
    table = Table({})
    with pytest.raises(error, match=message):
        mine_hard_negatives(X, y, vectorizer=table, **changes)
    assert not table.calls, "the error must come before any text is embedded"


@pytest.mark.parametrize(
    ("vectorizer", "message"),
    [
        (None, "`vectorizer` .* got an object of type NoneType"),
        ("skembed-mini", "such as NVEmbedVectorizer.* got an object of type str"),
        (NVEmbedVectorizer, "got the class NVEmbedVectorizer, not an instance"),
        (TfidfVectorizer().fit(["a text"]), "dense array; got a sparse matrix. .*TruncatedSVD"),
    ],
)
def test_wrong_vectorizer(vectorizer: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        mine_hard_negatives(PAIRS, vectorizer=vectorizer)


def test_an_unfitted_teacher_says_so() -> None:
    with pytest.raises(NotFittedError):
        mine_hard_negatives(PAIRS, vectorizer=make_pipeline(TfidfVectorizer(), TruncatedSVD(2)))


class Returns:
    """A transformer that returns what it is told to, whatever the texts."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def transform(self, texts: list[str]) -> Any:
        return self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.ones(10), r"an array of shape \(10, dim\).*shape \(10,\)"),
        (np.ones((9, 2)), r"an array of shape \(10, dim\).*shape \(9, 2\)"),
        (np.full((10, 2), "a"), "an array of numbers; got dtype <U1"),
        (
            np.array([[1.0, 0.0]] * 8 + [[np.nan, 0.0], [np.inf, 0.0]]),
            r"finite numbers; the vector of texts\[8\]",
        ),
    ],
)
def test_wrong_embeddings(result: Any, message: str) -> None:
    subject = f"`vectorizer` of `mine_hard_negatives` must turn 10 texts into {message}"
    with pytest.raises((ValueError, TypeError), match=subject):
        mine_hard_negatives(PAIRS, vectorizer=Returns(result))


def test_two_widths() -> None:
    vectors = {text: angle(0) for pair in PAIRS for text in pair}
    table = TwoSided(vectors, queries={text: np.ones(3) for text in vectors})
    with pytest.raises(ValueError, match="of one width; got 3 and 2"):
        mine_hard_negatives(PAIRS, vectorizer=table)


def test_nothing_left_says_why() -> None:
    table = Table({"a": angle(0), "b": angle(1), "p": angle(40), "q": angle(41), "n": angle(0.5)})
    with pytest.raises(ValueError, match="each of the 1 distinct texts .* one of its positives"):
        mine_hard_negatives([("a", "p"), ("b", "p")], vectorizer=table)
    with pytest.raises(ValueError, match="more similar .* strategy='perc_pos' with threshold=0.95"):
        mine_hard_negatives([("a", "p"), ("b", "q")], vectorizer=table, corpus=["n"])


@pytest.mark.parametrize("cause", ["texts", "labels", "corpus", "found"])
def test_errors_quote_no_text(cause: str) -> None:
    secret = "a private text"
    table = Table({secret: angle(0), "p": angle(40), "b": angle(1), "n": angle(2)})
    calls = {
        "texts": lambda: mine_hard_negatives([(secret, "p"), (secret, 3)], vectorizer=table),
        "labels": lambda: mine_hard_negatives([secret, "p"], [0, 0], vectorizer=table),
        "corpus": lambda: mine_hard_negatives(PAIRS, corpus=[secret, 3], vectorizer=table),
        "found": lambda: mine_hard_negatives(
            [(secret, "p"), ("b", "p")], corpus=["n"], vectorizer=table
        ),
    }
    with pytest.raises((TypeError, ValueError)) as caught:
        calls[cause]()
    assert secret not in str(caught.value)
