"""What a model's folder says of its use: "auto", prompts, and files that say what they may not."""

from __future__ import annotations

import inspect
import json
import logging
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import GOLDEN
from sklearn.base import clone
from tiny import make_vectorizer

from skembed import CheckpointError, ContrastiveTrainer, NVEmbedVectorizer
from skembed.exceptions import SkembedWarning
from skembed.inference.card import AUTO_DEFAULTS, SAVED_PARAMETERS

TEXTS = ["a card was stolen", "how to open an account?", "a card lost"]
RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cache": None}
SETTINGS = "skembed.json"
# Of each parameter that may be "auto": what a folder says, and what a user gives instead.
VALUES: dict[str, tuple[Any, Any]] = {
    "instruction": ("Find the text that says the same", "Find the topic of the text"),
    "document_instruction": ("Say what this is", "Name the thing it is about"),
    "instruction_template": ("Task: {instruction}\nText: ", "{instruction}: "),
    "max_length": (24, 40),
    "truncate_dim": (20, 7),
    "normalize": (False, True),
}
# So that each shows in the vectors: a template needs an instruction, a length a long text.
LONG = [*TEXTS, " ".join(TEXTS * 9)]


def list_auto() -> list[str]:
    """Return the parameters of the vectorizer that are "auto" and that a folder may decide."""
    others = {"trainer", "device", "dtype", "batch_tokens"}
    parameters = inspect.signature(NVEmbedVectorizer).parameters.values()
    return sorted({p.name for p in parameters if p.default == "auto"} - others)


def write(folder: Path, name: str, values: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def embed(emb: NVEmbedVectorizer) -> np.ndarray:
    """Return the vectors of all three ways, one above the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.vstack([emb.transform(LONG), emb.encode_query(LONG), emb.encode_document(LONG)])


def explicit(**changes: Any) -> np.ndarray:
    """Return the vectors of the folder without a word, every parameter given."""
    return embed(NVEmbedVectorizer(GOLDEN, **{**AUTO_DEFAULTS, **changes}, **RUN))


def test_the_lists_are_complete() -> None:
    assert list_auto() == sorted(AUTO_DEFAULTS) == sorted(VALUES)
    assert set(SAVED_PARAMETERS) - set(AUTO_DEFAULTS) == {"missing"}


# "auto"


@pytest.mark.parametrize("name", list_auto())
def test_the_folder_the_default_and_the_given_value(name: str, fresh_dir: Path) -> None:
    theirs, given = VALUES[name]
    # Of another parameter, what makes this one show.
    beside = {"instruction": "Find the same"} if name == "instruction_template" else {}
    make = {"plain": NVEmbedVectorizer, "loaded": NVEmbedVectorizer.from_pretrained}
    silent = explicit(**beside)
    for construct in make.values():
        assert np.array_equal(embed(construct(fresh_dir, **beside, **RUN)), silent)
    write(fresh_dir, SETTINGS, {name: theirs, "instructions": True})
    said = explicit(**beside, **{name: theirs})
    assert said.shape != silent.shape or np.abs(said - silent).max() > 1e-3
    none = {"instruction_template", "max_length", "normalize"}
    for construct in make.values():
        emb = construct(fresh_dir, **beside, **RUN)
        assert np.array_equal(embed(emb), said)
        assert np.array_equal(embed(clone(emb)), said)
        for value in {given} if name in none else {given, None}:
            wins = construct(fresh_dir, **{**beside, name: value}, **RUN)
            assert np.array_equal(embed(wins), explicit(**{**beside, name: value}))
    assert NVEmbedVectorizer(fresh_dir).get_params()[name] == "auto"
    assert NVEmbedVectorizer.from_pretrained(fresh_dir).get_params()[name] == theirs


@pytest.mark.parametrize("name", list_auto())
def test_a_change_of_the_file_is_seen(name: str, fresh_dir: Path) -> None:
    beside = {"instruction": "Find the same"} if name == "instruction_template" else {}
    emb = NVEmbedVectorizer(fresh_dir, **beside, **RUN)
    assert np.array_equal(embed(emb), explicit(**beside))
    for value in VALUES[name]:
        write(fresh_dir, SETTINGS, {name: value, "instructions": True})
        assert np.array_equal(embed(emb), explicit(**beside, **{name: value}))


def test_none_is_no_default_of_the_folder(fresh_dir: Path) -> None:
    write(fresh_dir, SETTINGS, {name: theirs for name, (theirs, _) in VALUES.items()})
    nothing = dict.fromkeys(("instruction", "document_instruction", "truncate_dim"))
    emb = NVEmbedVectorizer(fresh_dir, **nothing, **RUN)
    rest = {n: v for n, (v, _) in VALUES.items() if n not in nothing}
    assert np.array_equal(embed(emb), explicit(**rest, **nothing))


def test_documents_of_a_known_task() -> None:
    both = make_vectorizer(instruction="STS").encode_document(TEXTS)
    text = "Retrieve semantically similar text"
    assert np.array_equal(both, make_vectorizer(document_instruction=text).encode_document(TEXTS))
    bare = make_vectorizer().encode_document(TEXTS)
    given = make_vectorizer(instruction="STS", document_instruction=None)
    assert np.array_equal(given.encode_document(TEXTS), bare), "None wins"


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"instruction": "STS"},
        {"instruction": "STS", "document_instruction": None},
        {"instruction": "NFCorpus", "document_instruction": "Say what this is"},
        {name: theirs for name, (theirs, _) in VALUES.items()} | {"max_length": 60},
    ],
    ids=str,
)
def test_a_saved_folder_gives_the_same_vectors(
    parameters: dict[str, Any], tmp_path: Path, fresh_dir: Path
) -> None:
    emb = make_vectorizer(fresh_dir, **parameters)
    emb.save_pretrained(tmp_path / "saved")
    expected = embed(emb)
    for construct in (NVEmbedVectorizer, NVEmbedVectorizer.from_pretrained):
        assert np.array_equal(embed(construct(tmp_path / "saved", **RUN)), expected)
    later = make_vectorizer(tmp_path / "saved", instruction="STS")
    if "document_instruction" not in parameters and not parameters.get("instruction"):
        assert np.array_equal(
            later.encode_document(TEXTS),
            make_vectorizer(instruction="STS").encode_document(TEXTS),
        )


def test_the_folder_of_an_adapter_goes_before_its_base(fresh_dir: Path, tmp_path: Path) -> None:
    write(fresh_dir, SETTINGS, {"max_length": 24, "truncate_dim": 20})
    trainer = ContrastiveTrainer(r=2, max_steps=1, random_state=0)
    pairs = [("a card", "the card"), ("an account", "my account")]
    emb = make_vectorizer(fresh_dir, trainer=trainer, truncate_dim=9).fit(pairs)
    emb.save_pretrained(tmp_path / "adapter")
    for construct in (NVEmbedVectorizer, NVEmbedVectorizer.from_pretrained):
        np.testing.assert_allclose(
            embed(construct(tmp_path / "adapter", **RUN)), embed(emb), atol=1e-6
        )
    (tmp_path / "adapter" / SETTINGS).unlink()  # as peft writes it
    assert embed(make_vectorizer(tmp_path / "adapter")).shape[1] == 20


# sentence-transformers' files

PROMPTS = {"query": "query: ", "passage": "passage: ", "topic": "Topic of "}


def write_theirs(folder: Path, *, normalize: bool = True, **prompts: Any) -> None:
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    listed = [
        {"idx": i, "name": str(i), "path": paths[m], "type": f"sentence_transformers.models.{m}"}
        for i, m in enumerate(modules)
    ]
    write(folder, "modules.json", listed)
    write(folder, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    write(folder, "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
    write(folder, "config_sentence_transformers.json", prompts)


def prefixes(emb: NVEmbedVectorizer) -> dict[str, str]:
    return {side: r.prefix for side, r in emb._make_encoder().settings.requests.items()}


@pytest.mark.parametrize("default", [None, "topic"])
@pytest.mark.parametrize(
    "prompts",
    [PROMPTS, {"topic": "Topic of "}, {"query": "", "document": "", "topic": "Topic of "}],
    ids=["sides", "named", "empty"],
)
def test_prompts(prompts: dict[str, str], default: str | None, fresh_dir: Path) -> None:
    write_theirs(fresh_dir, prompts=prompts, default_prompt_name=default)
    emb = make_vectorizer(fresh_dir)
    text = "Topic of " if default else ""
    expected = {
        "text": text,
        "query": prompts.get("query") or text,
        "document": prompts.get("passage", ""),
    }
    assert prefixes(emb) == expected
    assert prefixes(NVEmbedVectorizer.from_pretrained(fresh_dir)) == expected
    given = prefixes(make_vectorizer(fresh_dir, instruction=None))
    assert given == {"text": "", "query": "", "document": expected["document"]}
    given = prefixes(make_vectorizer(fresh_dir, document_instruction=None))
    assert given == {**expected, "document": ""}
    assert emb.fit(TEXTS)._card["instructions"] is True


def test_our_file_goes_before_their_prompts(fresh_dir: Path) -> None:
    write_theirs(fresh_dir, prompts=PROMPTS, default_prompt_name="topic")
    write(fresh_dir, SETTINGS, {"instruction": None, "instructions": True})
    assert prefixes(make_vectorizer(fresh_dir)) == {
        "text": "",
        "query": "",
        "document": "passage: ",
    }
    write(fresh_dir, SETTINGS, {"instruction": "Find the same", "document_instruction": None})
    front = "Instruct: Find the same\nQuery: "
    assert prefixes(make_vectorizer(fresh_dir)) == {"text": front, "query": front, "document": ""}


def test_length_and_scale(fresh_dir: Path) -> None:
    for normalize in (True, False):
        write_theirs(fresh_dir, normalize=normalize)
        emb = make_vectorizer(fresh_dir)
        assert np.array_equal(embed(emb), explicit(max_length=24, normalize=normalize))
    write(fresh_dir, "sentence_bert_config.json", {"max_seq_length": 10**6})
    assert make_vectorizer(fresh_dir)._make_encoder().settings.parameters.max_length == 32768
    write(fresh_dir, SETTINGS, {"max_length": 40})
    assert np.array_equal(
        embed(make_vectorizer(fresh_dir)), explicit(max_length=40, normalize=False)
    )


def test_prompts_survive_saving_and_pickles(fresh_dir: Path, tmp_path: Path) -> None:
    write_theirs(fresh_dir, prompts=PROMPTS, default_prompt_name="topic")
    emb = make_vectorizer(fresh_dir, store_weights=True)
    expected = embed(emb)
    emb.save_pretrained(tmp_path / "saved")
    data = pickle.dumps(emb)
    shutil.rmtree(fresh_dir)
    for twin in (
        make_vectorizer(tmp_path / "saved"),
        NVEmbedVectorizer.from_pretrained(tmp_path / "saved", **RUN),
        pickle.loads(data),
    ):
        assert np.array_equal(embed(twin), expected)


def test_training_uses_the_prefixes_of_use(
    fresh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skembed import vectorizer

    seen: list[tuple[str, str]] = []
    fit = vectorizer.fit_adapter

    def watch(base: Any, source: Any, examples: Any, *args: Any, **options: Any) -> Any:
        seen.extend((e.query_prefix, e.document_prefix) for e in examples)
        return fit(base, source, examples, *args, **options)

    monkeypatch.setattr(vectorizer, "fit_adapter", watch)
    write_theirs(fresh_dir, prompts=PROMPTS, default_prompt_name="topic")
    trainer = ContrastiveTrainer(r=2, max_steps=1, random_state=0)
    emb = make_vectorizer(fresh_dir, trainer=trainer)
    emb.fit([("a card", "the card"), ("an account", "my account")])
    emb.fit(TEXTS + ["an account"], ["card", "account", "card", "account"])
    assert seen == [("query: ", "passage: "), ("Topic of ", "passage: ")]


# Files that say what they may not


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instruction", 3),
        ("instruction", "auto"),
        ("instruction", "NFCorpsu"),
        ("document_instruction", ["a b"]),
        ("instruction_template", "no field"),
        ("instruction_template", None),
        ("max_length", "auto"),
        ("max_length", 0),
        ("max_length", True),
        ("max_length", 1e9),
        ("max_length", 10**9),
        ("truncate_dim", 0),
        ("truncate_dim", 4096),
        ("normalize", 1),
        ("normalize", None),
        ("missing", "drop"),
        ("instructions", "yes"),
    ],
)
def test_values_that_are_not_allowed(name: str, value: Any, fresh_dir: Path) -> None:
    write(fresh_dir, SETTINGS, {name: value})
    uses = [lambda: make_vectorizer(fresh_dir).transform(TEXTS)]
    if value not in (10**9, 4096):  # those need the model's sizes
        uses.append(lambda: NVEmbedVectorizer.from_pretrained(fresh_dir))
    for use in uses:
        with pytest.raises(CheckpointError, match=f"(?s)`{name}`.*{SETTINGS}"):
            use()


@pytest.mark.parametrize(
    "name", sorted(set(NVEmbedVectorizer().get_params()) - {*SAVED_PARAMETERS})
)
def test_no_other_parameter_is_set(
    name: str, fresh_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(fresh_dir, SETTINGS, {name: str(tmp_path / "elsewhere"), "later": 1})
    caplog.set_level(logging.DEBUG, logger="skembed")
    emb = NVEmbedVectorizer.from_pretrained(fresh_dir, **RUN)
    assert emb.get_params()[name] == NVEmbedVectorizer(fresh_dir, **RUN).get_params()[name]
    assert np.array_equal(embed(emb), explicit())
    assert not (tmp_path / "elsewhere").exists()
    assert f"ignored later, {name}" in caplog.text or f"ignored {name}, later" in caplog.text


BAD_FILES: Mapping[str, Any] = {
    SETTINGS: ["[]", "{", "3"],
    "config_sentence_transformers.json": [
        "[]",
        "{",
        '{"prompts": ["a"]}',
        '{"prompts": {"query": 3}}',
        '{"prompts": {"query": "q"}, "default_prompt_name": "other"}',
    ],
    "sentence_bert_config.json": ["[]", '{"max_seq_length": "long"}', '{"max_seq_length": 0}'],
    "modules.json": [
        "{}",
        "[3]",
        "[" * 10**5,
        '[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]',
        '[{"type": "sentence_transformers.models.Pooling", "path": "../other"}]',
    ],
    "1_Pooling/config.json": ["[]", "{"],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, contents in BAD_FILES.items() for content in contents],
    ids=lambda value: value[:40],
)
def test_damaged_files_are_named(name: str, content: str, fresh_dir: Path) -> None:
    (fresh_dir / name).parent.mkdir(exist_ok=True)
    (fresh_dir / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        make_vectorizer(fresh_dir).transform(TEXTS)


# Instructions


def test_who_learned_instructions(fresh_dir: Path, tmp_path: Path) -> None:
    def learned(folder: Any) -> bool:
        return bool(NVEmbedVectorizer(folder, **RUN).fit(TEXTS)._card["instructions"])

    assert not learned("skembed-mini")
    assert learned(fresh_dir), "NV-Embed's own layout"
    write(fresh_dir, SETTINGS, {})
    assert not learned(fresh_dir), "what skembed wrote says it or did not learn any"
    write_theirs(fresh_dir, prompts=PROMPTS)
    assert learned(fresh_dir)
    write(fresh_dir, SETTINGS, {"instructions": False})
    assert not learned(fresh_dir)
    NVEmbedVectorizer(**RUN).save_pretrained(tmp_path / "mini")
    assert not learned(tmp_path / "mini")


@pytest.mark.parametrize("merge", [False, True])
def test_training_with_an_instruction_teaches_it(merge: bool, tmp_path: Path) -> None:
    trainer = ContrastiveTrainer(r=2, max_steps=1, random_state=0)
    pairs = [("a card", "the card"), ("an account", "my account")]
    bare = NVEmbedVectorizer(trainer=trainer, **RUN).fit(pairs)
    assert not bare._card["instructions"]
    emb = NVEmbedVectorizer(trainer=trainer, instruction="STS", **RUN).fit(pairs)
    expected = emb.transform(TEXTS)  # without a warning, which would be an error here
    twin = pickle.loads(pickle.dumps(emb))
    assert np.array_equal(twin.transform(TEXTS), expected)
    emb.save_pretrained(tmp_path / "tuned", merge=merge)
    again = NVEmbedVectorizer(tmp_path / "tuned", **RUN)
    np.testing.assert_allclose(again.transform(TEXTS), expected, atol=2e-2 if merge else 1e-6)
    bare.set_params(instruction="STS")
    with pytest.warns(SkembedWarning, match="learned no instructions"):
        bare.transform(TEXTS)


def test_one_warning_for_an_estimator_and_its_clones() -> None:
    emb = NVEmbedVectorizer(instruction="STS", **RUN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        emb.fit(TEXTS)
        assert not caught, "nothing was embedded"
        for each in (emb, clone(emb), emb):
            each.transform(TEXTS)
            each.encode_document(TEXTS)
    (only,) = caught
    assert only.category is SkembedWarning
    assert only.filename == __file__
    message = str(only.message)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(message[message.index("warnings.filter") :].rstrip("."))  # noqa: S102 -- its advice
        NVEmbedVectorizer(instruction="STS", **RUN).transform(TEXTS)
    assert not caught
