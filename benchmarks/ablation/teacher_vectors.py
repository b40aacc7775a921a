"""Compute the teachers' vectors of the training texts once and keep them on disk.

Run it at low priority: it takes many hours, may be killed at any time and resumes behind the last
complete shard. While the file ``STATE/PAUSE`` exists, it sleeps between batches.
``STATE/TEACHER/00042.npz`` holds, for the texts of shard 42 in the order of `order_texts`, ``ids``
(`text_ids`), ``vectors`` (float16, unit length) and ``n_tokens``.
"""

import argparse
import fcntl
import gzip
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

LEFT_OUT = ("news_and_clickbait_headlines", "covid_faq")  # not for weights that are given away
N_ROUNDS = 48  # each a sample of every file, so that the first shards are useful already
BLOCK_ROWS = 64  # neighbours in a file stay together
RETRIEVAL_CHARS = 150  # pairs are retrieval pairs where a file's positives are as long on average
MAX_TOKENS = 512
BATCH_TOKENS = 1_024  # with padding; small, since a pause waits for the end of a batch
SHARD_TEXTS = 512
LEAD_SHARDS = 8  # how far each teacher goes before the next one follows
Embed = Callable[[list[str], Path], tuple[np.ndarray, list[int]]]


def order_texts(data: Path) -> list[str]:
    """Return the distinct texts of all files: in each round retrieval pairs, then the others."""
    rng = random.Random(0)
    rounds: list[list[tuple[bool, float, list[str]]]] = [[] for _ in range(N_ROUNDS)]
    for path in sorted(p for p in data.glob("*/*.gz") if p.name.split(".")[0] not in LEFT_OUT):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = list(map(json.loads, file))
        chars = sum(len(row.get("positive", "")) for row in rows)
        blocks = [rows[i : i + BLOCK_ROWS] for i in range(0, len(rows), BLOCK_ROWS)]
        rng.shuffle(blocks)
        other, per_round = chars < RETRIEVAL_CHARS * len(rows), math.ceil(len(blocks) / N_ROUNDS)
        for i, block in enumerate(blocks):
            texts = [" ".join(value.split()) for row in block for value in row.values()]
            rounds[i // per_round].append((other, rng.random(), texts))
    ordered = (text for blocks in rounds for *_, texts in sorted(blocks) for text in texts)
    return list(dict.fromkeys(text for text in ordered if len(text) > 3))


def text_ids(texts: list[str]) -> np.ndarray:
    """Return a 64-bit hash of each text, shape (n,)."""
    digests = [blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype="<u8")


class Teacher:
    """A sentence encoder with mean pooling, read from the folder of its files."""

    def __init__(self, folder: str) -> None:
        fast = "_bf16" in Path("/proc/cpuinfo").read_text()  # else bfloat16 is the slower type
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self.model.to(torch.bfloat16 if fast else torch.float32)
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)

    def __call__(self, texts: list[str], pause: Path) -> tuple[np.ndarray, list[int]]:
        """Return unit vectors (n, D) and numbers of tokens; sleep while the file `pause` exists."""
        ids = [torch.tensor(e.ids) for e in self.tokenizer.encode_batch_fast(texts)]
        vectors = np.empty((len(ids), self.model.config.hidden_size), dtype=np.float16)

        @torch.inference_mode()
        def embed(batch: list[int]) -> None:
            while pause.exists():
                time.sleep(1.0)
            inputs = pad_sequence([ids[i] for i in batch], True, self.model.config.pad_token_id)
            mask = pad_sequence([torch.ones_like(ids[i]) for i in batch], True)  # (B, T), as inputs
            states = self.model(input_ids=inputs, attention_mask=mask).last_hidden_state
            pooled = (states.float() * mask[:, :, None]).sum(1)  # (B, D)
            vectors[batch] = F.normalize(pooled, dim=1).numpy()

        # One thread a batch: beside other work, threads of one batch wait for each other.
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(embed, split_batches([len(i) for i in ids])))
        return vectors, [len(i) for i in ids]


def split_batches(lengths: list[int]) -> Iterator[list[int]]:
    """Yield positions from short to long texts, at most `BATCH_TOKENS` tokens at a time."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[i] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def fill(state: Path, texts: list[str], teachers: dict[str, Embed], size: int) -> None:
    """Embed the shards that `state` lacks; refuse the state of other texts or teachers."""
    checksum = blake2b(text_ids(texts).tobytes(), digest_size=8).hexdigest()
    manifest = {"n_texts": len(texts), "shard_texts": size, "checksum": checksum}
    manifest |= {"max_tokens": MAX_TOKENS, "teachers": list(teachers)}
    path = state / "manifest.json"
    if not path.exists():
        path.write_text(json.dumps(manifest))
    if json.loads(path.read_text()) != manifest:
        raise ValueError(f"{state} holds other vectors; expected those of {manifest}.")
    shards = range(math.ceil(len(texts) / size))
    leads = [shards[i : i + LEAD_SHARDS] for i in shards[::LEAD_SHARDS]]
    for name, shard in ((name, i) for lead in leads for name in teachers for i in lead):
        path, start = state / name / f"{shard:05d}.npz", time.time()
        if path.exists():
            continue
        part = texts[shard * size : (shard + 1) * size]
        vectors, n_tokens = teachers[name](part, state / "PAUSE")
        path.parent.mkdir(exist_ok=True)
        with path.with_suffix(".part").open("wb") as file:
            np.savez(file, ids=text_ids(part), vectors=vectors, n_tokens=n_tokens)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".part").replace(path)  # a shard is complete or absent
        print(f"{name} {shard}: {sum(n_tokens)} tokens in {time.time() - start:.0f} s", flush=True)


def main() -> None:
    """Fill the state that the command line names; one process at a time may do so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with pairs/ and texts/")
    parser.add_argument("--state", type=Path, default=Path.home() / ".cache/skembed-teachers")
    parser.add_argument("teachers", nargs="+", metavar="NAME=FOLDER")
    args = parser.parse_args()
    args.state.mkdir(parents=True, exist_ok=True)
    with (args.state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        teachers = {name: Teacher(f) for name, f in (t.split("=", 1) for t in args.teachers)}
        fill(args.state, order_texts(args.data), teachers, SHARD_TEXTS)


if __name__ == "__main__":
    main()
