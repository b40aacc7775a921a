"""The registry holds NV-Embed's task texts, and a user's instruction resolves to one of them."""

import dataclasses

import numpy as np
import pytest

from skembed.instructions import (
    INSTRUCTIONS,
    TASK_TYPES,
    Instruction,
    check_template,
    format_instruction,
    list_instructions,
    resolve_instruction,
)

NV_EMBED = "Instruct: {instruction}\nQuery: "

# NV-Embed-v2's released instructions.json: task -> (query side, carried by documents too).
RELEASED = {
    "ClimateFEVER": (
        "Given a claim about climate change, retrieve documents that support or refute the claim",
        False,
    ),
    "HotpotQA": (
        "Given a multi-hop question, retrieve documents that can help answer the question",
        False,
    ),
    "FEVER": ("Given a claim, retrieve documents that support or refute the claim", False),
    "ArguAna": ("Given a claim, retrieve documents that support or refute the claim", False),
    "MSMARCO": (
        "Given a web search query, retrieve relevant passages that answer the query",
        False,
    ),
    "DBPedia": ("Given a query, retrieve relevant entity descriptions from DBPedia", False),
    "NQ": ("Given a question, retrieve passages that answer the question", False),
    "Touche2020": ("Given a question, retrieve passages that answer the question", False),
    "QuoraRetrieval": (
        "Given a question, retrieve questions that are semantically equivalent to the given "
        "question",
        True,
    ),
    "SCIDOCS": (
        "Given a scientific paper title, retrieve paper abstracts that are cited by the given "
        "paper",
        False,
    ),
    "TRECCOVID": ("Given a query on COVID-19, retrieve documents that answer the query", False),
    "SciFact": (
        "Given a scientific claim, retrieve documents that support or refute the claim",
        False,
    ),
    "NFCorpus": ("Given a question, retrieve relevant documents that answer the question", False),
    "FiQA2018": (
        "Given a financial question, retrieve relevant passages that answer the query",
        False,
    ),
    "STS": ("Retrieve semantically similar text", True),
    "SummEval": ("Given a news summary, retrieve other semantically similar summaries", True),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_instructions(name):
    text, on_both_sides = RELEASED[name]
    assert resolve_instruction(name) == text
    assert resolve_instruction(name, side="document") == (text if on_both_sides else None)


def test_the_released_list_is_complete():
    released_types = ("Retrieval", "STS", "Summarization")
    listed = [name for task_type in released_types for name in list_instructions(task_type)]
    assert sorted(listed) == sorted(RELEASED)


@pytest.mark.parametrize(
    "name",
    [
        *("STS12", "STS13", "STS14", "STS15", "STS16", "STS17", "STS22"),
        *("STSBenchmark", "SICK-R", "BIOSSES"),
    ],
)
def test_all_sts_tasks_share_one_instruction(name):
    assert INSTRUCTIONS[name] is INSTRUCTIONS["STS"]


@pytest.mark.parametrize(
    ("task_type", "count", "short", "full", "text"),
    [
        (
            "Classification",
            12,
            "Banking77",
            "Banking77Classification",
            "Given a online banking query, find the corresponding intents",
        ),
        (
            "Classification",
            12,
            "TweetSentiment",
            "TweetSentimentExtractionClassification",
            "Classify the sentiment of a given tweet as either positive, negative, or neutral",
        ),
        (
            "Clustering",
            11,
            "MedrxivS2S",
            "MedrxivClusteringS2S",
            "Identify the main category of Medrxiv papers based on the titles",
        ),
        (
            "Clustering",
            11,
            "RedditP2P",
            "RedditClusteringP2P",
            "Identify the topic or theme of Reddit posts based on the titles and posts",
        ),
        (
            "Reranking",
            4,
            "AskUbuntu",
            "AskUbuntuDupQuestions",
            "Retrieve duplicate questions from AskUbuntu forum",
        ),
        (
            "PairClassification",
            3,
            "TwitterURL",
            "TwitterURLCorpus",
            "Retrieve tweets that are semantically similar to the given tweet",
        ),
    ],
)
def test_other_task_types(task_type, count, short, full, text):
    assert len(list_instructions(task_type)) == count
    assert full in list_instructions(task_type)
    assert short not in list_instructions()
    assert INSTRUCTIONS[short] is INSTRUCTIONS[full]
    assert INSTRUCTIONS[full] == Instruction(full, text, text, task_type)
    assert resolve_instruction(short) == text
    assert resolve_instruction(full, side="document") == text


def test_an_asymmetric_reranking_task_leaves_documents_bare():
    assert resolve_instruction("MindSmall") is not None
    assert resolve_instruction("MindSmall", side="document") is None


def test_registry_is_well_formed():
    for name, instruction in INSTRUCTIONS.items():
        assert INSTRUCTIONS[instruction.name] is instruction
        assert name.split() == [name]
        assert instruction.task_type in TASK_TYPES
        assert instruction.document in (None, instruction.query)
        assert instruction.query == " ".join(instruction.query.split())
        assert resolve_instruction(instruction.query) == instruction.query
        assert instruction.query[0].isupper()
    assert len({name.casefold() for name in INSTRUCTIONS}) == len(INSTRUCTIONS)
    assert set(TASK_TYPES) == {instruction.task_type for instruction in INSTRUCTIONS.values()}


def test_registry_is_read_only():
    with pytest.raises(TypeError):
        INSTRUCTIONS["STS"] = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        INSTRUCTIONS["STS"].query = "changed"


def test_list_instructions():
    names = list_instructions()
    assert names == sorted(set(names))
    assert len(names) == 16 + 12 + 11 + 4 + 3
    assert {"STS", "SummEval", "Banking77Classification", "SciDocsRR"} <= set(names)
    assert "STS12" not in names
    assert sum(len(list_instructions(task_type)) for task_type in TASK_TYPES) == len(names)
    with pytest.raises(ValueError, match="Did you mean 'Clustering'"):
        list_instructions("clusterng")
    with pytest.raises(TypeError, match="`task_type` parameter of `list_instructions`"):
        list_instructions(3)


# resolve_instruction


@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("value", [None, "", " ", "\n\t"])
def test_no_instruction(value, side):
    assert resolve_instruction(value, side=side) is None


@pytest.mark.parametrize("value", ["nfcorpus", "NFCORPUS", "NFCorpus", np.str_("NFCorpus")])
def test_names_match_in_any_case(value):
    text = resolve_instruction(value)
    assert text == RELEASED["NFCorpus"][0]
    assert type(text) is str


def test_a_name_read_from_a_file_is_still_a_name():
    assert resolve_instruction(" STS\n") == RELEASED["STS"][0]


def test_scidocs_and_scidocsrr_stay_apart():
    assert resolve_instruction("scidocs") != resolve_instruction("scidocsrr")


@pytest.mark.parametrize(
    "text",
    [
        "Find the recipe that the text describes",
        "Tâche : trouver la recette ",
        "two words",
        "Instruct the model {well}",
        "Answer the query: which is it?",
        "STS with a twist",
    ],
)
def test_free_text_is_returned_unchanged(text):
    assert resolve_instruction(text) == text
    assert resolve_instruction(text, side="document") == text


def test_free_text_loses_its_lone_surrogates():
    assert resolve_instruction("find the caf\udce9") == "find the caf\ufffd"


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        ("NFCorpis", "NFCorpus"),
        ("banking", "Banking77"),
        ("emotions", "Emotion"),
        ("QuoraRetreival", "QuoraRetrieval"),
    ],
)
def test_unknown_name_suggests_the_nearest(value, nearest):
    with pytest.raises(
        ValueError,
        match=rf"^The `instruction` parameter of `NVEmbedVectorizer` must be .*; got '{value}'\. "
        rf"Did you mean '{nearest}'\? .*list_instructions",
    ):
        resolve_instruction(value)


def test_unknown_name_without_a_near_one():
    with pytest.raises(ValueError, match="got 'zzzzzzzz'") as info:
        resolve_instruction("zzzzzzzz")
    assert "Did you mean" not in str(info.value)
    assert "containing a space" in str(info.value)


def test_a_long_word_is_not_quoted():
    with pytest.raises(ValueError, match="got a word of 5000 characters"):
        resolve_instruction("x" * 5000)


def test_cqadupstack_has_no_instruction():
    with pytest.raises(ValueError, match="CQADupstack"):
        resolve_instruction("CQADupstack")


@pytest.mark.parametrize(
    "text",
    [
        "Instruct: Given a question, retrieve passages",
        "instruct: Given a question, retrieve passages\nQuery: ",
        "Given a question, retrieve passages\nQuery: ",
        "query: find it",
        "Instruct: {instruction}\nQuery: ",
        "Instruct:STS",
        "Given {instruction} do it",
    ],
)
def test_text_that_holds_the_template_is_refused(text):
    with pytest.raises(ValueError, match="must be the task text alone"):
        resolve_instruction(text)


@pytest.mark.parametrize("value", [3, b"STS", ["STS"], True, float("nan")])
def test_instruction_of_another_type(value):
    with pytest.raises(
        TypeError, match="`document_instruction` parameter of `Owner` must be a str"
    ):
        resolve_instruction(value, name="document_instruction", owner="Owner")


def test_unknown_side():
    with pytest.raises(ValueError, match="'query', 'document'; got 'corpus'"):
        resolve_instruction("STS", side="corpus")


# Templates


@pytest.mark.parametrize(
    "template", [NV_EMBED, "{instruction}", "<{instruction}>", "{{literal}} {instruction}: "]
)
def test_good_templates(template):
    assert check_template(template) == template
    assert "do this" in format_instruction(template, "do this")


@pytest.mark.parametrize(
    "template",
    [
        "Instruct: \nQuery: ",
        "{instruction} {instruction}",
        "{instruction} {text}",
        "{}",
        "{0}",
        "{text}",
        "{instruction.name}",
        "{instruction[0]}",
        "{instruction!r}",
        "{instruction:>80}",
        "{ instruction }",
        "{{instruction}}",
    ],
)
def test_templates_without_exactly_one_plain_field(template):
    with pytest.raises(
        ValueError,
        match=r"^The `instruction_template` parameter of `Owner` must contain the field "
        r"\{instruction\} exactly once",
    ):
        check_template(template, owner="Owner")


@pytest.mark.parametrize("template", ["{instruction", "instruction}", "{instruction} }", "{"])
def test_templates_with_unmatched_braces(template):
    with pytest.raises(ValueError, match=r"unmatched braces\. Double a literal brace"):
        check_template(template)


def test_templates_of_a_wrong_type_or_empty():
    with pytest.raises(TypeError, match="`instruction_template` parameter of `NVEmbedVectorizer`"):
        check_template(None)
    with pytest.raises(ValueError, match="must be a non-empty str"):
        check_template("")


def test_format_instruction_is_the_published_prefix():
    # With the newline, and with the trailing space that the pool mask counts on.
    assert format_instruction(NV_EMBED, resolve_instruction("NQ")) == (
        "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
    )


@pytest.mark.parametrize("instruction", [None, ""])
def test_format_instruction_without_instruction(instruction):
    assert format_instruction(NV_EMBED, instruction) == ""


def test_format_instruction_takes_braces_literally():
    assert format_instruction(NV_EMBED, "use {x}") == "Instruct: use {x}\nQuery: "
    assert format_instruction("{{a}} {instruction}", "b") == "{a} b"
