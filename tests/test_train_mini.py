"""Scripts around the bundled model: the ablation's runs and tables, the scores of quality.py.

Everything is small and made here; no test needs the evaluation data.
"""

import gzip
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from scipy import sparse
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, average_precision_score, ndcg_score, v_measure_score
from torch.nn import functional as F

from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import PackedBatch, pack_texts

RECIPE = ROOT / "examples" / "train_mini"
WORDS = ("cat", "dog", "tax", "loan", "rain", "snow", "bread", "salt")


def import_script(folder: Path, name: str) -> Iterator[ModuleType]:
    """Yield a script of a folder as a module; what it imported from there is forgotten again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder), *sys.path])
        # Scripts set it to true, which would hang forked processes of other tests.
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        before = set(sys.modules)
        yield importlib.import_module(name)
        for loaded in set(sys.modules) - before:
            file = getattr(sys.modules[loaded], "__file__", None) or ""
            if Path(file).parent in (folder, RECIPE, ROOT / "benchmarks"):
                del sys.modules[loaded]


@pytest.fixture(scope="module")
def ablation() -> Iterator[ModuleType]:
    yield from import_script(ROOT / "benchmarks" / "ablation", "ablation")


@pytest.fixture(scope="module")
def report(ablation: ModuleType) -> ModuleType:
    return sys.modules["ablation_report"]


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    yield from import_script(ROOT / "benchmarks", "quality")


# Inheritance


@pytest.fixture(scope="module")
def inherit() -> Iterator[ModuleType]:
    for prepare in import_script(RECIPE, "prepare"):
        assert prepare
        yield sys.modules["inherit"]


def make_teacher(inherit: ModuleType, wide: int, n_words: int, seed: int = 0) -> Any:
    """A BERT of random weights with the teacher's heads and layers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = {
        "embeddings.word_embeddings": (n_words, wide),
        "embeddings.position_embeddings": (64, wide),
        "embeddings.token_type_embeddings": (2, wide),
    }
    state = {f"{name}.weight": 0.3 * draw(*size) for name, size in sizes.items()}
    norms = ["embeddings.LayerNorm"]
    for layer in range(6):
        name = f"encoder.layer.{layer}"
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
        linear = {
            "attention.self.query": (wide, wide),
            "attention.self.key": (wide, wide),
            "attention.self.value": (wide, wide),
            "attention.output.dense": (wide, wide),
            "intermediate.dense": (2 * wide, wide),
            "output.dense": (wide, 2 * wide),
        }
        for part, (out, into) in linear.items():
            state[f"{name}.{part}.weight"] = draw(out, into) / into**0.5
            state[f"{name}.{part}.bias"] = 0.1 * draw(out)
    for norm in norms:
        state[f"{norm}.weight"] = 1 + 0.2 * draw(wide)
        state[f"{norm}.bias"] = 0.1 * draw(wide)
    teacher = inherit.PackedTeacher.__new__(inherit.PackedTeacher)
    teacher.weights, teacher.hidden_size = state, wide
    return teacher


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 36},
        {"heads_per_key": 2},
        {"layer_groups": ((0, 1), (2, 3), (4, 5))},
    ],
    ids=["as wide", "narrower", "shared keys", "groups of layers"],
)
def test_a_student_inherits_its_teachers_token_vectors(
    inherit: ModuleType, changes: dict[str, Any]
) -> None:
    wide, n_words = 48, 200
    recipe = sys.modules["recipe"].Recipe(
        vocab_size=n_words,
        intermediate_size=96,
        num_attention_heads=12,
        head_dim=4,
        num_latents_value=4,
        cross_dim_head=8,
        **{"hidden_size": wide, "layer_groups": tuple((k,) for k in range(6)), **changes},
    )
    teacher = make_teacher(inherit, wide, n_words)
    rng = np.random.default_rng(0)

    def draw(n_texts: int) -> PackedBatch:
        lengths = np.sort(rng.integers(3, 30, n_texts))
        return pack_texts([rng.integers(3, n_words, n).astype(np.int32) for n in lengths], 0)

    seen, others = draw(500), draw(100)

    def left(student: Any) -> float:
        """Share of the variance of the teacher's vectors of other texts that is not met."""
        theirs = student.project(teacher.hidden_states(others.input_ids, others))
        with torch.inference_mode():
            hidden = student.model.hidden_states(others)
            ours = student.model.latent_attention_model.transform_tokens(hidden)
        rest = (ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum()
        return float(rest)

    def begin() -> Any:
        torch.manual_seed(0)
        model = NVEmbedModel(sys.modules["prepare"].build_config(recipe))
        return inherit.Inheritance(model, teacher, np.arange(n_words), seen, recipe)

    words_only, student = begin(), begin()
    with torch.no_grad():
        words_only._words()
        for layer in words_only.model.embedding_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        words_only._head()
    student.run()
    assert student.model.fuse, "what comes after runs the fast pass again"
    seen_left = student.report["end"]["token vectors"]
    assert seen_left < left(student) < 0.75 * left(words_only)


# The ablation's models


@pytest.fixture(scope="module")
def settings(ablation: ModuleType) -> Any:
    return ablation.Settings(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_latents=4,
        steps=2,
        batch_size=4,
    )


def build(ablation: ModuleType, settings: Any, *cell: Any) -> Any:
    pooling, attention, *seed = cell
    return ablation.build_model(
        ablation.Run(pooling, attention, "two stages", *(seed or [0])), settings
    )


@pytest.mark.parametrize("pooling", ["eos", "mean", "latent"])
def test_a_causal_model_looks_back_only(ablation: ModuleType, settings: Any, pooling: str) -> None:
    causal = build(ablation, settings, pooling, "causal")
    bidirectional = build(ablation, settings, pooling, "bidirectional")
    assert not ablation.first_moves_with_last(causal)
    assert ablation.first_moves_with_last(bidirectional)
    for model, other in ((causal, "bidirectional"), (bidirectional, "causal")):
        with pytest.raises(RuntimeError, match=f"the attention is not {other}"):
            ablation.check_attention(model, other)


def test_a_text_that_sees_its_neighbour_is_refused(
    ablation: ModuleType, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(ablation, settings, "mean", "bidirectional")
    hidden_states = model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda batch: hidden_states(batch) + batch.input_ids.sum()
    )
    with pytest.raises(RuntimeError, match="sees its neighbour"):
        ablation.check_attention(model, "bidirectional")


def test_causal_attention_equals_torchs(ablation: ModuleType) -> None:
    torch.manual_seed(0)
    batch = pack_texts([np.arange(3, 3 + n) for n in (19, 13, 12, 5, 2, 1)], 0, on_grid=True)
    q, k, v = (
        torch.randn(1, 2, len(batch.input_ids), 8, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    ours, _ = ablation.causal_attention(None, q, k, v, None, scaling=0.3, packed=batch)
    parts = zip(*(x.split(list(batch.lengths), dim=2) for x in (q, k, v)), strict=True)
    theirs = torch.cat(
        [F.scaled_dot_product_attention(*part, is_causal=True, scale=0.3) for part in parts], dim=2
    ).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_runs_of_a_seed_have_one_start(ablation: ModuleType, settings: Any) -> None:
    models = [
        build(ablation, settings, pooling, attention)
        for pooling in ("eos", "mean", "latent")
        for attention in ("causal", "bidirectional")
    ]
    states = [model.embedding_model.state_dict() for model in models]
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)
    other = build(ablation, settings, "mean", "causal", 1).embedding_model.state_dict()
    name = "layers.0.mlp.up_proj.weight"
    assert not torch.equal(other[name], states[0][name])
    batch = pack_texts([np.arange(3, 14), np.arange(3, 8)], 0)
    mean, latent = (models[k](batch) for k in (2, 4))
    torch.testing.assert_close(mean, latent)  # a fresh latent layer is the mean


def test_word_vectors_keep_the_largest_components(ablation: ModuleType) -> None:
    table = ablation.word_vectors(16)
    covariance = table.double().T @ table.double()
    torch.testing.assert_close(covariance, covariance.diag().diag(), rtol=0, atol=1.0)
    larger = ablation.word_vectors(24)[:, 8:]  # ascending: the last are the largest
    torch.testing.assert_close(
        F.normalize(table, dim=0).abs(), F.normalize(larger, dim=0).abs(), rtol=1e-3, atol=1e-5
    )


# The ablation's texts


def test_a_text_that_is_cut_keeps_its_end(ablation: ModuleType) -> None:
    encode, tokenizer = sys.modules["ablation_examples"].encode, ablation.load_tokenizer()
    long, short = encode(tokenizer, ["rain " * 40, "rain"], "STS", 10)
    assert long.pool_start == short.pool_start > 1
    assert len(long.ids) == long.pool_start + 10
    assert long.ids[-1] == short.ids[-1] == 2
    assert len(set(long.ids[long.pool_start : -1].tolist())) == 1  # "rain" alone
    bare = encode(tokenizer, ["rain"], None, 10)[0]
    assert bare.pool_start == 0
    assert bare.ids[0] == 1


@pytest.mark.parametrize("pooling", ["eos", "mean", "latent"])
def test_a_pack_pools_what_stands_behind_each_instruction(
    ablation: ModuleType, settings: Any, pooling: str
) -> None:
    model = build(ablation, settings, pooling, "bidirectional")
    rng = np.random.default_rng(0)
    if pooling == "latent":  # away from the mean
        torch.manual_seed(1)
        torch.nn.init.normal_(model.latent_attention_model.cross_attend_blocks[0].fn.to_out.weight)
    sizes = ((9, 4), (30, 0), (12, 7), (5, 0), (6, 4))
    texts = [ablation.Tokens(rng.integers(3, 900, n).astype(np.int32), start) for n, start in sizes]
    with torch.no_grad():
        together = ablation.embed_tokens(model, texts)
        alone = [F.normalize(model(pack_texts([t.ids], t.pool_start)), dim=-1) for t in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def make_examples(ablation: ModuleType, n: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        ablation.Example(
            k % 2 == 0,
            [ablation.Tokens(rng.integers(3, 900, 6).astype(np.int32), 0) for _ in range(4)],
        )
        for k in range(n)
    ]


def test_one_stage_has_the_examples_of_two(ablation: ModuleType, settings: Any) -> None:
    examples = make_examples(ablation, 40)

    def plan(schedule: str, seed: int = 0) -> list[Any]:
        run = ablation.Run("latent", "bidirectional", schedule, seed)
        return ablation.plan_stages(examples, run, settings)

    def identities(stage: Any) -> list[int]:
        return [id(example) for example in stage.examples]

    first, second = plan("two stages")
    assert all(example.retrieval for example in first.examples)
    assert (first.in_batch, second.in_batch) == (True, False)
    assert len(first.examples) == len(second.examples) == settings.steps * settings.batch_size
    both = identities(first) + identities(second)
    assert len(set(both)) == len(both)
    for schedule, in_batch in (("in-batch on", True), ("in-batch off", False)):
        (only,) = plan(schedule)
        assert only.in_batch is in_batch
        assert identities(only) != both
        assert sorted(identities(only)) == sorted(both)
    assert identities(plan("two stages")[1]) == identities(second)
    assert identities(plan("two stages", 1)[1]) != identities(second)


@pytest.mark.parametrize("in_batch", [True, False])
def test_loss_counts_the_negatives_of_its_stage(ablation: ModuleType, in_batch: bool) -> None:
    examples = make_examples(ablation, 3)
    shared = examples[0].texts[1]
    examples[1].texts[2] = shared  # the first one's positive, a negative of the second
    vectors = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    loss = ablation.contrastive_loss(vectors, examples, in_batch, 0.1)
    v = vectors.numpy().reshape(3, 4, 5).astype(np.float64)
    expected = []
    for i in range(3):
        negatives = [(i, 2), (i, 3)]
        if in_batch:
            negatives += [(j, k) for j in range(3) if j != i for k in (1, 2, 3)]
            negatives = [place for place in negatives if not (i == 0 and place == (1, 2))]
        logits = np.array([v[i, 0] @ v[place] for place in [(i, 1), *negatives]]) / 0.1
        expected.append(np.log(np.exp(logits).sum()) - logits[0])
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_stage_learns_its_examples(ablation: ModuleType, settings: Any) -> None:
    examples = make_examples(ablation, 4)
    model = build(ablation, settings, "latent", "causal")
    trained = ablation.train_stage(model, ablation.Stage("s", examples * 30, True), settings)
    assert trained["steps"] == 30
    assert trained["tokens"] == 30 * 4 * 4 * 6
    assert trained["loss"][-1] < 0.5 * trained["loss"][0]
    assert next(model.parameters()).dtype == torch.float32
    ablation.check_attention(model, "causal")


def test_examples_by_label_take_another_of_the_class(ablation: ModuleType, tmp_path: Path) -> None:
    rows = [{"text": f"{word} {k}", "label": word} for word in WORDS for k in range(3)]
    write_rows(tmp_path / "eval/classification/hwu64/train.jsonl.gz", rows)
    found = sys.modules["ablation_examples"].labelled_rows(tmp_path, "hwu64", 3, 100)
    assert len(found) == len(rows)
    for anchor, positive, *negatives in found:
        assert positive != anchor
        assert positive.split()[0] == anchor.split()[0]
        assert len(set(negatives)) == 3
        assert anchor.split()[0] not in {text.split()[0] for text in negatives}


def test_a_finished_run_is_not_run_again(ablation: ModuleType, tmp_path: Path) -> None:
    runs = ablation.list_runs([0, 1, 2])
    assert len(runs) == len({run.name for run in runs}) == 3 * 8
    for run in runs:
        (tmp_path / f"{run.name}.json").write_text("{}")
    assert list(ablation.run_all(runs, str, tmp_path, 1)) == []


# The ablation's tables


def make_runs(report: ModuleType, better: float) -> list[dict[str, Any]]:
    """Runs where bidirectional is ahead by `better` and a little more for each seed."""
    runs = []
    for pooling, attention in report.PAPER_V2:
        for seed in (2, 0, 1):
            lead = better + 0.1 * seed if attention == "bidirectional" else 0.0
            scores = {
                "scifact": 30.0,
                "trecqa": 50.0,
                "banking77": 60.0,
                "stsb": 68.0,
                "sickr": 72.0,
            }
            scores = {name: value + lead for name, value in scores.items()}
            stage = {"scores": scores, "steps": 5, "tokens": 10, "seconds": 1.0, "scoring_s": 1.0}
            runs.append(
                {
                    "pooling": pooling,
                    "attention": attention,
                    "schedule": report.TWO,
                    "seed": seed,
                    "weights": {"layers": 10, "pooling": 2},
                    "stages": [stage, stage],
                }
            )
    for schedule in ("in-batch on", "in-batch off"):
        last = [
            run for run in runs if (run["pooling"], run["attention"]) == ("latent", "bidirectional")
        ]
        runs += [{**run, "schedule": schedule, "stages": run["stages"][:1]} for run in last]
    return runs


@pytest.mark.parametrize(
    ("better", "words"), [(3.0, "agrees"), (-3.0, "disagrees"), (-0.1, "not told apart")]
)
def test_claims_are_judged_by_the_differences_of_seeds(
    report: ModuleType, better: float, words: str
) -> None:
    lines = report.claims_table(report.Scores(make_runs(report, better))).splitlines()
    row = next(line for line in lines if "bidirectional over causal, mean" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{better + 0.1:.2f} ± 0.10"
    assert cells[2] == "+0.33"  # 71.71 - 71.38
    assert cells[3] == words
    row = next(line for line in lines if "in-batch negatives on" in line)
    assert "| 0.00 ± 0.00 | +1.48 | not told apart |" in row


def test_types_weigh_the_same(report: ModuleType) -> None:
    scores = {"scifact": 10.0, "trecqa": 20.0, "banking77": 30.0, "stsb": 40.0, "sickr": 60.0}
    means = report.by_type(scores)
    assert means["STS"] == 50.0
    assert means[report.MEAN] == pytest.approx(27.5)


def test_the_page_has_a_place_for_every_table(report: ModuleType) -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    tables = report.render({"runs": make_runs(report, 1.0), "date": "", "machine": MACHINE})
    filled = report.fill_page(page, tables)
    for name in set(tables) - {"claims"}:  # this one comes through fill_results.py
        assert filled.count(tables[name]) == 1, name
    assert "<!-- results:ablation -->" in page
    assert report.fill_page(filled, tables) == filled


MACHINE = {"processor": "P", "cores": 2}


def test_results_and_page_are_written_together(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, page = tmp_path / "benchmarks" / "results", tmp_path / "docs" / "ablation.md"
    page.parent.mkdir()
    page.write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    for name, value in (("ROOT", tmp_path), ("RESULTS", results), ("PAGE", page)):
        monkeypatch.setattr(report, name, value)
    report.write_results(make_runs(report, 1.0), {"steps": 5}, results)
    report.write_docs(results)
    scores = report.Scores(make_runs(report, 1.0))
    text, link = page.read_text(encoding="utf-8"), "(../benchmarks/results/ablation.md)"
    assert text.count(report.claims_table(scores)) == 1  # the first table of the results
    assert link in text
    assert text.count(report.schedules_table(scores)) == 1
    assert "Settings: steps 5." in (results / "ablation.md").read_text(encoding="utf-8")
    report.write_docs(results)
    assert page.read_text(encoding="utf-8") == text


def test_the_page_shows_the_measured(report: ModuleType) -> None:
    path = report.RESULTS / "ablation.json"
    if not path.is_file():
        pytest.skip("the ablation has not been run yet")
    page = report.PAGE.read_text(encoding="utf-8")
    tables = report.render(json.loads(path.read_text(encoding="utf-8")))
    assert report.fill_page(page, tables) == page, "run ablation.py --write-docs"


# quality.py: the protocols


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def embed(texts: list[str]) -> np.ndarray:
    """Vectors that share a direction where texts share a word; not of unit length."""
    table = {word: np.random.default_rng(i).normal(size=12) for i, word in enumerate(WORDS)}
    rows = []
    for text in texts:
        noise = np.random.default_rng(list(text.encode())).normal(size=12)
        rows.append(noise + sum(table[word] for word in text.split() if word in table))
    return np.array(rows, dtype=np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set of each task; the names are those of no real set."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labelled = [{"text": f"{w} {k}", "label": w} for w in WORDS[:4] for k in range(40)]
    labelled = [labelled[i] for i in rng.permutation(len(labelled))]
    write_rows(folder / "eval/classification/topics/train.jsonl.gz", labelled[:100])
    write_rows(folder / "eval/classification/topics/test.jsonl.gz", labelled[100:])
    write_rows(folder / "eval/clustering/groups/test.jsonl.gz", labelled)
    pairs = [
        {"sentence1": f"{a} a", "sentence2": f"{b} b", "score": 5.0 * (a == b) + 0.1 * i}
        for i, a in enumerate(WORDS)
        for b in WORDS
    ]
    write_rows(folder / "eval/sts/pairs/test.jsonl.gz", pairs)
    candidates = [
        {
            "query": f"{w} or {v}",
            "positive": [f"{w} one", f"{w} two"][: 1 + i % 2],
            "negative": [f"{v} {w} no", f"{v} three", "nothing"] if i else [],
        }
        for i, (w, v) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
    ]
    write_rows(folder / "eval/reranking/answers/test.jsonl.gz", candidates)
    corpus = [{"id": k, "title": WORDS[k % 8], "text": f"part {k}"} for k in range(60)]
    corpus.append({"id": "q0", "title": None, "text": "cat 0"})  # the first query's own text
    queries = [{"id": f"q{k}", "text": f"{WORDS[k]} {k}"} for k in range(8)]
    qrels = [
        {"query_id": f"q{k}", "doc_id": str(k + 8 * j), "score": j % 3}
        for k in range(7)
        for j in range(5)
    ]
    for part, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        write_rows(folder / f"eval/retrieval/search/{part}.jsonl.gz", rows)
    return folder


def read(data: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(data / "eval" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def expected_classification(data: Path) -> float:
    train, test = (read(data, f"classification/topics/{part}") for part in ("train", "test"))
    rng = np.random.default_rng(42)
    vectors, gold = embed([r["text"] for r in train]), [r["label"] for r in test]
    labels = [r["label"] for r in train]
    scores = []
    for _ in range(10):
        draw: list[int] = []
        for label in sorted(set(labels)):
            rows = np.array([i for i in range(len(train)) if labels[i] == label])
            draw += list(rng.permutation(rows)[:8])
        head = LogisticRegression(max_iter=100).fit(vectors[draw], [labels[i] for i in draw])
        scores.append(accuracy_score(gold, head.predict(embed([r["text"] for r in test]))))
    return float(np.mean(scores))


def expected_clustering(data: Path) -> float:
    rows = read(data, "clustering/groups/test")
    vectors, labels = embed([row["text"] for row in rows]), [row["label"] for row in rows]
    found = [
        MiniBatchKMeans(4, batch_size=512, n_init="auto", random_state=seed).fit(vectors).labels_
        for seed in range(5)
    ]
    return float(np.mean([v_measure_score(labels, clusters) for clusters in found]))


def expected_sts(data: Path) -> float:
    rows = read(data, "sts/pairs/test")
    left, right = (unit(embed([row[f"sentence{k}"] for row in rows])) for k in (1, 2))
    return float(spearmanr((left * right).sum(1), [row["score"] for row in rows])[0])


def expected_reranking(data: Path) -> float:
    found = []
    for row in read(data, "reranking/answers/test"):
        if row["positive"] and row["negative"]:
            candidates = row["positive"] + row["negative"]
            gold = [text in row["positive"] for text in candidates]
            scores = unit(embed(candidates)) @ unit(embed([row["query"]]))[0]
            found.append(average_precision_score(gold, scores))
    return float(np.mean(found))


def expected_retrieval(data: Path) -> float:
    corpus = read(data, "retrieval/search/corpus")
    qrels = {(r["query_id"], r["doc_id"]): r["score"] for r in read(data, "retrieval/search/qrels")}
    documents = unit(embed([f"{d['title'] or ''} {d['text']}".strip() for d in corpus]))
    found = []
    for query in read(data, "retrieval/search/queries"):
        gold = np.array([qrels.get((query["id"], str(d["id"])), 0) for d in corpus])
        scores = documents @ unit(embed([query["text"]]))[0]
        scores[[str(d["id"]) == query["id"] for d in corpus]] = -2
        if gold.any():
            found.append(ndcg_score([gold], [scores], k=10))
    return float(np.mean(found))


EXPECTED = {
    "classification/topics": expected_classification,
    "clustering/groups": expected_clustering,
    "sts/pairs": expected_sts,
    "reranking/answers": expected_reranking,
    "retrieval/search": expected_retrieval,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_scores_equal_plain_reference_code(quality: ModuleType, data: Path, name: str) -> None:
    score = quality.SCORERS[name.split("/")[0]](data, name, embed)
    assert score == pytest.approx(EXPECTED[name](data), abs=1e-6)
    assert 0.05 < score < 0.999  # neither chance nor saturated: a wrong protocol would show


@pytest.mark.parametrize("name", EXPECTED)
def test_sparse_rows_score_as_dense_ones(quality: ModuleType, data: Path, name: str) -> None:
    scorer = quality.SCORERS[name.split("/")[0]]
    plain = quality.load_model("tfidf")
    assert sparse.issparse(plain(["cat", "dog"]))
    dense = scorer(data, name, lambda texts: plain(texts).toarray())
    # k-means draws its start from the rows in another way where they are sparse.
    tolerance = 0.2 if name.startswith("clustering") else 1e-6
    assert scorer(data, name, plain) == pytest.approx(dense, abs=tolerance)


def test_a_large_test_part_is_cut(
    quality: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "MAX_TEST_ROWS", 10)
    monkeypatch.setattr(quality, "MAX_CLUSTERED", 20)
    seen: list[int] = []

    def count(texts: list[str]) -> np.ndarray:
        seen.append(len(set(texts)))
        return embed(texts)

    quality.score_classification(data, "classification/topics", count)
    quality.score_clustering(data, "clustering/groups", count)
    n_train = len({row["text"] for row in read(data, "classification/topics/train")})
    assert seen[0] <= n_train + 10
    assert seen[1] == 20


# quality.py: the table


def test_shares_are_of_sums_and_of_means(quality: ModuleType) -> None:
    ours = {"sts/a": 40.0, "sts/b": 90.0, "retrieval/c": 10.0}
    theirs = {"sts/a": 80.0, "sts/b": 90.0, "retrieval/c": 20.0}
    share = quality.shares(ours, theirs)
    assert share["all sets"] == pytest.approx(100 * 140 / 190)
    assert share["mean over sets"] == pytest.approx(100 * (0.5 + 1 + 0.5) / 3)
    assert share["sts"] == pytest.approx(100 * 130 / 170)
    assert share["retrieval"] == pytest.approx(50)


def test_a_text_is_embedded_once(quality: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def watch(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return embed(texts)

    monkeypatch.setattr(quality, "load_model", lambda name: watch)
    column = quality.Column("fake")
    column.load()
    n_first = len(seen)
    first = column.embed(["cat", "dog", "cat"])
    second = column.embed(["rain", "dog"])
    assert seen[n_first:] == ["cat", "dog", "rain"]
    assert column.n_texts == 3  # loading is not counted
    np.testing.assert_array_equal(first, embed(["cat", "dog", "cat"]))
    np.testing.assert_array_equal(second, embed(["rain", "dog"]))


def test_the_floor_is_the_mean_of_word_vectors(quality: ModuleType) -> None:
    floor = quality.load_model("word-vectors")
    vectors = floor(["rain snow", "snow rain", "rain", "snow", ""])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)  # order does not count
    np.testing.assert_allclose(np.linalg.norm(vectors[:4], axis=1), 1, rtol=1e-5)
    assert abs(vectors[2] - vectors[3]).max() > 0.01
    assert not vectors[4].any()


def run_quality(quality: ModuleType, patch: pytest.MonkeyPatch, *arguments: str) -> int:
    patch.setattr(sys, "argv", ["quality.py", *arguments])
    return quality.main()


def test_a_run_writes_the_table_and_keeps_a_column(
    quality: ModuleType,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded: list[str] = []

    def load_model(name: str) -> Any:
        loaded.append(name)
        return embed

    monkeypatch.setattr(quality, "load_model", load_model)
    options = [
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--only",
        "pairs",
        "answers",
        "--models",
    ]
    status = run_quality(quality, monkeypatch, *options, "skembed-mini", "minilm")
    assert status == 0  # equal scores: 100 % everywhere; no STS-B in this folder
    record = json.loads((tmp_path / "quality.json").read_text())
    figures = {row["name"]: row for row in record["figures"]}
    assert figures["share of all-MiniLM-L6-v2's scores, %"]["value"] == 100
    assert "texts/s, skembed-mini over minilm" in figures
    assert set(record["values"]["scores"]) == {"sts/pairs", "reranking/answers"}
    page = (tmp_path / "quality.md").read_text()
    assert "| set | skembed-mini | minilm |" in page
    assert "| texts/s |" in page

    loaded.clear()
    status = run_quality(
        quality, monkeypatch, *options, "skembed-mini", "minilm", "--keep", "minilm"
    )
    assert status == 0
    assert loaded == ["skembed-mini"]
    kept = json.loads((tmp_path / "quality.json").read_text())
    assert "texts/s, skembed-mini over minilm" not in {row["name"] for row in kept["figures"]}
    assert "texts/s, minilm" not in {row["name"] for row in kept["figures"]}
    before, after = (r["values"]["models"]["minilm"] for r in (record, kept))
    assert after == {**before, "kept": "yes"}
    assert kept["values"]["scores"] == record["values"]["scores"]

    with pytest.raises(SystemExit, match=r"holds no minilm for sts/x: run it instead"):
        quality.keep_column("minilm", tmp_path / "quality.json", ["sts/x"])


def test_a_set_that_is_not_there_is_named(quality: ModuleType, data: Path) -> None:
    assert sorted(quality.find_sets(data)) == sorted(EXPECTED)
    sizes = [
        sum(file.stat().st_size for file in (data / "eval" / name).iterdir())
        for name in quality.find_sets(data)
    ]
    assert sizes == sorted(sizes)
    with pytest.raises(SystemExit, match="no set nowhere under"):
        quality.find_sets(data, ["pairs", "nowhere"])
