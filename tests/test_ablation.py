"""The ablation's models, texts and tables."""

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
from scripts import WORDS, import_script, write_rows
from torch.nn import functional as F

from skembed.model.tokenization import pack_texts


@pytest.fixture(scope="module")
def ablation() -> Iterator[ModuleType]:
    yield from import_script(ROOT / "benchmarks" / "ablation", "ablation")


@pytest.fixture(scope="module")
def report(ablation: ModuleType) -> ModuleType:
    return sys.modules["ablation_report"]


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
