"""Nothing adds an instruction to a model that learned none, whichever way a text takes."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_vectorizer

import skembed
from skembed import (
    ContrastiveTrainer,
    EmbeddingMapper,
    MTEBEncoder,
    NVEmbedVectorizer,
    TrainingTask,
    evaluate,
    mine_hard_negatives,
)
from skembed.evaluation import (
    ClassificationTask,
    ClusteringTask,
    RerankingTask,
    RetrievalTask,
    STSTask,
)
from skembed.exceptions import SkembedWarning
from skembed.inference import encoder
from skembed.training import fit as training

TEXTS = ["a card was stolen", "how to open an account?", "a card lost", "close my account"] * 3
LABELS = ["card", "account"] * 6
PAIRS = [(f"{text} {i}", f"the {text}") for i, text in enumerate(TEXTS[:6])]
GRADES = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
DOCUMENTS = {f"d{i}": text for i, (_, text) in enumerate(PAIRS)}
QUERIES = {f"q{i}": text for i, (text, _) in enumerate(PAIRS)}
RELEVANCE = {f"q{i}": {f"d{i}": 1} for i in range(len(PAIRS))}
TRAINER = ContrastiveTrainer(r=2, max_steps=1, batch_size=4, random_state=0)

TASKS = [
    ClassificationTask(TEXTS, LABELS, samples_per_label=2, n_experiments=2),
    ClusteringTask(TEXTS, LABELS, n_experiments=2),
    STSTask(PAIRS, GRADES),
    RetrievalTask(QUERIES, DOCUMENTS, RELEVANCE),
    RerankingTask(QUERIES, {q: list(DOCUMENTS) for q in QUERIES}, RELEVANCE, corpus=DOCUMENTS),
]


def in_mteb(emb: NVEmbedVectorizer) -> None:
    """Ask as mteb does, for tasks with an instruction or a prompt."""
    for name, kind in (("STS12", "STS"), ("NFCorpus", "Retrieval"), ("Unknown", "Retrieval")):
        task = type("Metadata", (), {"name": name, "type": kind, "prompt": "Find what is alike"})
        for side in (None, "query", "document"):
            inputs = [{"text": TEXTS[:2]}]
            options = {"hf_split": "test", "hf_subset": "default", "prompt_type": side}
            MTEBEncoder(emb).encode(inputs, task_metadata=task, **options)


# Public name -> what embeds with a vectorizer through it.
WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "NVEmbedVectorizer": lambda emb, path: [
        emb.fit(TEXTS).transform(TEXTS),
        emb.transform(PAIRS[:1]) if emb.n_features_in_ == 2 else None,
        emb.encode_query(TEXTS),
        emb.encode_document(TEXTS),
        emb.transform_to(TEXTS, path / "vectors.npy"),
        emb.transform_to(TEXTS, path / "documents.npy", side="document"),
        emb.set_params(trainer=TRAINER).fit(PAIRS).transform(PAIRS),
        emb.fit(TEXTS, LABELS),
        emb.fit_tasks([TrainingTask(PAIRS), TrainingTask(TEXTS, LABELS)]),
    ],
    "EmbeddingClassifier": lambda emb, _: skembed.EmbeddingClassifier(emb).fit(TEXTS, LABELS),
    "EmbeddingClusterer": lambda emb, _: skembed.EmbeddingClusterer(emb, n_clusters=2).fit(TEXTS),
    "EmbeddingMapDisplay": lambda emb, _: None,  # takes vectors, or an estimator above
    "EmbeddingMapper": lambda emb, _: EmbeddingMapper(emb)({"text": np.array(TEXTS)}),
    "EmbeddingQuantizer": lambda emb, _: None,  # takes vectors
    "MTEBEncoder": lambda emb, _: in_mteb(emb),
    "Reranker": lambda emb, _: [
        skembed.Reranker(emb).fit(PAIRS, GRADES).predict(PAIRS),
        skembed.Reranker(emb).fit().rank(TEXTS[:1], [TEXTS[1:3]]),
    ],
    "Retriever": lambda emb, _: skembed.Retriever(emb).fit(TEXTS).search(TEXTS, top_k=1),
    "SimilarityRegressor": lambda emb, _: skembed.SimilarityRegressor(emb).fit(PAIRS, GRADES),
    "ZeroShotClassifier": lambda emb, _: (
        skembed.ZeroShotClassifier(emb).fit({"card": "a card", "account": "money"}).predict(TEXTS)
    ),
    "evaluate": lambda emb, _: evaluate(emb, TASKS, n_bootstraps=0),
    "mine_hard_negatives": lambda emb, _: mine_hard_negatives(PAIRS, vectorizer=emb),
}
# These hold settings, tasks, files, errors or numbers.
NO_WAY = {
    *("ContrastiveTrainer", "EmbeddingCache", "MinedNegatives", "TrainingTask"),
    *("datasets", "metrics", "open_embeddings"),
}


@pytest.fixture
def prefixes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What stood in front of texts that were embedded or trained on."""
    seen: set[str] = set()
    embed, train = encoder.embed_texts, training.run_training

    def watch(texts: Any, request: Any, **options: Any) -> Any:
        seen.add(request.prefix)
        return embed(texts, request, **options)

    def watch_training(base: Any, plan: Any, *args: Any, **options: Any) -> Any:
        for task in plan.tasks:
            seen.update((task.examples.query_prefix, task.examples.document_prefix))
        return train(base, plan, *args, **options)

    monkeypatch.setattr(encoder, "embed_texts", watch)
    monkeypatch.setattr(training, "run_training", watch_training)
    return seen


def test_every_public_name_is_a_way_or_none() -> None:
    names = {
        name
        for name in skembed.__all__
        if not (inspect.isclass(found := getattr(skembed, name)) and issubclass(found, Exception))
    }
    assert names == set(WAYS) | NO_WAY


@pytest.mark.filterwarnings("ignore:Cosines do not rise:skembed.SkembedWarning")
@pytest.mark.filterwarnings("ignore:.*drops the adapter:skembed.SkembedWarning")
@pytest.mark.parametrize("name", WAYS)
def test_a_model_that_learned_none_gets_none(
    name: str, fresh_dir: Path, tmp_path: Path, prefixes: set[str]
) -> None:
    (fresh_dir / "skembed.json").write_text(json.dumps({"instructions": False}))
    emb = make_vectorizer(fresh_dir, trainer=None)
    WAYS[name](emb, tmp_path)
    assert prefixes <= {""}
    assert prefixes or name in ("EmbeddingMapDisplay", "EmbeddingQuantizer")


@pytest.mark.filterwarnings("ignore:Cosines do not rise:skembed.SkembedWarning")
@pytest.mark.filterwarnings("ignore:.*drops the adapter:skembed.SkembedWarning")
@pytest.mark.parametrize(
    "name", [n for n in WAYS if n not in ("EmbeddingMapDisplay", "EmbeddingQuantizer")]
)
def test_one_that_the_user_names_is_used_with_one_warning(
    name: str, fresh_dir: Path, tmp_path: Path, prefixes: set[str]
) -> None:
    (fresh_dir / "skembed.json").write_text(json.dumps({"instructions": False}))
    emb = make_vectorizer(fresh_dir, trainer=None, instruction="Find what is alike")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WAYS[name](emb, tmp_path)
    told = [w for w in caught if "learned no instructions" in str(w.message)]
    assert [w.category for w in told] == [SkembedWarning]
    assert "Instruct: Find what is alike\nQuery: " in prefixes
