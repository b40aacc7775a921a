"""
Retrieval and reranking
=======================

Find the document that a query is about among all of them, then sort what another search has found.
"""

# %%
# A query is the one-line summary of a function or class, and its document is the longer
# description. Exactly one document is right for each query. The longest are left out to keep this
# page to seconds.

import numpy as np

from skembed.datasets import load_docstrings

pairs = load_docstrings(min_per_class=150).pairs
pairs = [(summary, document) for summary, document in pairs if len(document) <= 1000]
corpus = [document for _, document in pairs]
chosen = np.random.default_rng(0).permutation(len(pairs))[:250]
queries = [pairs[i][0] for i in chosen]
print(len(corpus), "documents,", len(queries), "queries")
print(repr(queries[0]))

# %%
# Search
# ------
#
# :class:`~skembed.Retriever` embeds the corpus once and compares each query with every
# document.

from skembed import Retriever

bare = Retriever().fit(corpus)
right = [[int(i)] for i in chosen]  # ids of the right documents of each query
print(f"nDCG@10 {bare.score(queries, right):.3f}")

# %%
# ``search`` gives scores and positions, the best first:

scores, indices = bare.search(queries[:1], top_k=3)
for score, index in zip(scores[0], indices[0], strict=True):
    print(f"{score:.2f} {corpus[index][:100]}")

# %%
# Less memory
# -----------
#
# Vectors can be stored as bytes or as single bits. The embeddings are in the cache, so each storage
# costs only the search. ``rescore_storage`` keeps a finer copy, which the best are scored with
# again.

for options in (
    {"storage": "float32"},
    {"storage": "int8"},
    {"storage": "binary"},
    {"storage": "binary", "rescore_storage": "int8"},
):
    small = Retriever(**options).fit(corpus)
    name = " + ".join(options.values())
    print(f"{name:15s} nDCG@10 {small.score(queries, right):.3f}")

# %%
# Rerank what a keyword search found
# ----------------------------------
#
# TF-IDF proposes twenty documents for each query; :class:`~skembed.Reranker` sorts them
# by their embeddings. The lists may be of any length.

from sklearn.feature_extraction.text import TfidfVectorizer

from skembed import Reranker

tfidf = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit(corpus)
similarities = (tfidf.transform(queries) @ tfidf.transform(corpus).T).toarray()
candidates = similarities.argsort(axis=1)[:, ::-1][:, :20]  # (n_queries, 20)

reranker = Reranker().fit()
ranking = reranker.rank(queries, [[corpus[i] for i in row] for row in candidates])
reranked = np.array([row[order] for row, order in zip(candidates, ranking.indices, strict=True)])
found = bare.search(queries, top_k=20).indices

# %%
# How many queries have their document among the first k? Where a keyword search and embeddings find
# different things, adding their ranks up is a simple way to have both.


def fuse(*orders: np.ndarray) -> np.ndarray:
    """Sort by the sum of 1 / (60 + rank): reciprocal rank fusion."""
    votes = np.zeros((len(queries), len(corpus)))
    for order in orders:
        np.put_along_axis(
            votes,
            order,
            np.take_along_axis(votes, order, axis=1) + 1 / (60 + np.arange(order.shape[1])),
            axis=1,
        )
    return votes.argsort(axis=1)[:, ::-1][:, :20]


from matplotlib import pyplot as plt

figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
for name, order in {
    "keywords": candidates,
    "keywords, reranked": reranked,
    "embeddings": found,
    "keywords and embeddings": fuse(candidates, found),
}.items():
    hits = (order == chosen[:, None]).cumsum(axis=1).mean(axis=0)
    axes.plot(np.arange(1, 21), hits, marker=".", label=name)
axes.set(
    xlabel="first k documents", ylabel="share of queries that find theirs", xticks=[1, 5, 10, 20]
)
_ = axes.legend(frameon=False)
