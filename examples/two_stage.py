"""NV-Embed's two training stages on the bundled model, end to end on real text.

Stage 1 trains on retrieval pairs with in-batch negatives and mined hard negatives. Stage 2 goes on
from there with a new optimiser, on retrieval, classification and similarity blended in every batch,
without in-batch negatives: texts of one class would count as each other's negatives across tasks.
(arXiv 2405.17428, section 4.)

Run: python examples/two_stage.py --data FOLDER [--output my-model] [--limit 2000]

FOLDER holds train/permissive/pairs/*.jsonl.gz (rows {query, positive, negative}),
eval/classification/<name>/{train,test}.jsonl.gz (rows {text, label}) and
eval/sts/stsb/{train,test}.jsonl.gz (rows {sentence1, sentence2, score}). Only train splits are
trained on. A stage that was interrupted resumes: its state is in the output folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression

from skembed import ContrastiveTrainer, NVEmbedVectorizer, TrainingTask

ANSWER = "Given a question, retrieve passages that answer the question"
DEFINE = "Given a term, retrieve its definition"
DOCUMENT = "Given a title, retrieve the text that it belongs to"
RETRIEVAL = {
    "squad_question_sentence": ANSWER,
    "medquad": ANSWER,
    "covid_qa_passages": ANSWER,
    "wordnet_definitions": DEFINE,
    "powershell_docs": DOCUMENT,
    "scitldr": "Given a summary, retrieve the abstract of the paper",
}
WITH_NEGATIVES = {
    "snli_dev_test_triplets": "Given a premise, retrieve a hypothesis that it entails",
    "open_trivia_qa": "Given a question, retrieve its answer",
}
INTENTS = {
    "banking77": "Given a online banking query, find the corresponding intents",
    "hwu64": "Given a user utterance as query, find the user intents",
}


def read(path: Path, limit: int | None = None) -> list[dict]:
    """Rows of a gzip-compressed JSON-lines file; a fixed random choice where there are too many."""
    if not path.is_file():
        sys.exit(f"{path} is missing; --data must name the folder described in --help.")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:limit]]


def pair_task(data: Path, name: str, instruction: str, limit: int) -> TrainingTask:
    """Pairs, or rows with a negative where the set has them."""
    rows = read(data / f"train/permissive/pairs/{name}.jsonl.gz", limit)
    keys = ["query", "positive", *(["negative"] if name in WITH_NEGATIVES else [])]
    examples = []
    for row in rows:
        example = tuple(str(row.get(key) or "").strip() for key in keys)
        if all(example) and len(set(example)) == len(example):
            examples.append(example)
    return TrainingTask(examples, instruction=instruction, name=name)


def intent_task(data: Path, name: str, limit: int) -> TrainingTask:
    """Labelled utterances: other examples of the class are the positives."""
    rows = read(data / f"eval/classification/{name}/train.jsonl.gz", limit)
    counts = Counter(str(row["label"]) for row in rows)
    rows = [row for row in rows if counts[str(row["label"])] > 1]  # a class needs a positive
    texts, labels = [row["text"] for row in rows], [str(row["label"]) for row in rows]
    return TrainingTask(texts, labels, instruction=INTENTS[name], name=name, weight=0.25)


def similarity_task(data: Path, limit: int) -> TrainingTask:
    """Pairs with graded scores."""
    rows = read(data / "eval/sts/stsb/train.jsonl.gz", limit)
    rows = [row for row in rows if row["sentence1"].strip() != row["sentence2"].strip()]
    pairs = [(row["sentence1"], row["sentence2"]) for row in rows]
    scores = [float(row["score"]) for row in rows]
    return TrainingTask(pairs, scores, instruction="STS", name="stsb")


def evaluate(model: NVEmbedVectorizer, data: Path) -> dict[str, float]:
    """Held-out scores in percent: 8-shot intents, graded similarity, answers found first."""
    scores = {}
    for name, instruction in INTENTS.items():
        train = read(data / f"eval/classification/{name}/train.jsonl.gz")
        test = read(data / f"eval/classification/{name}/test.jsonl.gz", 1_000)
        labels = np.array([str(row["label"]) for row in train])
        rng = np.random.default_rng(1)
        few = [rng.permutation(np.flatnonzero(labels == c))[:8] for c in np.unique(labels)]
        chosen = np.concatenate(few)
        model.set_params(instruction=instruction, document_instruction=None)
        classifier = LogisticRegression(max_iter=1000)
        classifier.fit(model.transform([train[i]["text"] for i in chosen]), labels[chosen])
        gold = [str(row["label"]) for row in test]
        scores[f"{name}, 8 shots, accuracy"] = 100 * classifier.score(
            model.transform([row["text"] for row in test]), gold
        )
    test = read(data / "eval/sts/stsb/test.jsonl.gz")
    model.set_params(instruction="STS")
    left = model.encode_query([row["sentence1"] for row in test])
    right = model.encode_document([row["sentence2"] for row in test])
    cosines = (left * right).sum(axis=1)
    gold_scores = [float(row["score"]) for row in test]
    scores["STS-B test, Spearman"] = 100 * float(spearmanr(cosines, gold_scores).statistic)
    rows = read(
        data / "train/permissive/pairs/pubmedqa_labelled.jsonl.gz", 1_000
    )  # never trained on
    model.set_params(instruction=ANSWER, document_instruction=None)
    queries = model.encode_query([row["query"] for row in rows])
    documents = model.encode_document([row["positive"] for row in rows])
    ranks = (queries @ documents.T).argsort(axis=1)[:, ::-1]
    same = np.array([row["query"] for row in rows])
    hits = [same[order[0]] == query for order, query in zip(ranks, same, strict=True)]
    scores["PubMedQA, right paper first"] = 100 * float(np.mean(hits))
    return scores


def train(
    model: NVEmbedVectorizer, trainer: ContrastiveTrainer, tasks: list[TrainingTask], name: str
) -> None:
    """Train one stage and say how long it took."""
    began = time.perf_counter()
    model.set_params(trainer=trainer).fit_tasks(tasks)
    print(f"{name}: {len(model.history_)} steps in {time.perf_counter() - began:.0f} s")


def print_table(table: dict[str, dict[str, float]]) -> None:
    """Print the scores, one column a model."""
    print(f"\n{'':32s}" + "".join(f"{column:>16s}" for column in table))
    for name in table["skembed-mini"]:
        print(f"{name:32s}" + "".join(f"{scores[name]:16.1f}" for scores in table.values()))


def main() -> None:
    """Train both stages and print the scores before, between and after."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("two-stage-model"))
    parser.add_argument("--limit", type=int, default=2_000, help="examples of each set")
    parser.add_argument("--steps", type=int, default=None, help="bound on the steps of a stage")
    arguments = parser.parse_args()
    data, limit, output = arguments.data, arguments.limit, arguments.output

    model = NVEmbedVectorizer("skembed-mini", max_length=256, verbose=True)
    table = {"skembed-mini": evaluate(model, data)}

    retrieval = [pair_task(data, name, text, limit) for name, text in RETRIEVAL.items()]
    stage_1 = ContrastiveTrainer(
        in_batch_negatives=True,
        mine_negatives="perc_pos",
        n_negatives=1,
        learning_rate=5e-4,
        max_steps=arguments.steps,
        checkpoint_dir=output / "stage-1",
        random_state=0,
    )
    train(model, stage_1, retrieval, "stage 1")
    table["after stage 1"] = evaluate(model, data)

    blend = [
        *retrieval,
        *(pair_task(data, name, text, limit) for name, text in WITH_NEGATIVES.items()),
        *(intent_task(data, name, limit) for name in INTENTS),
        similarity_task(data, limit),
    ]
    changed = {"in_batch_negatives": False, "n_negatives": 4, "learning_rate": 3e-4}
    stage_2 = clone(stage_1).set_params(
        **changed, warm_start=True, checkpoint_dir=output / "stage-2", random_state=1
    )
    train(model, stage_2, blend, "stage 2")
    table["after stage 2"] = evaluate(model, data)

    model.set_params(instruction=None, document_instruction=None)
    model.save_pretrained(output / "adapter")
    print_table(table)
    print(f"\nThe adapter is in {output / 'adapter'}: NVEmbedVectorizer(that folder).")


if __name__ == "__main__":
    main()
