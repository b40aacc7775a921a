"""
Contrastive fine-tuning
=======================

Teach the model what belongs together in your own texts, and measure on pairs it has not seen.
"""

# sphinx_gallery_thumbnail_number = 2

# %%
# The pairs are one-line summaries of functions and the descriptions that go with them. Long ones
# are left out to keep this page to seconds, and a third is held out.

import numpy as np

from skembed.datasets import load_docstrings

pairs = load_docstrings(min_per_class=150).pairs
pairs = [(summary, document) for summary, document in pairs if len(document) <= 400]
order = np.random.default_rng(0).permutation(len(pairs))
train = [pairs[i] for i in order[: 2 * len(pairs) // 3]]
test = [pairs[i] for i in order[2 * len(pairs) // 3 :]]
print(len(train), "pairs to train on,", len(test), "held out")

# %%
# Fit
# ---
#
# ``fit`` on pairs trains a LoRA adapter, and the pooling layer beside it: each summary is to be
# nearer to its own description than to the others of the batch. The weights underneath are shared
# with every other estimator and do not change.

from skembed import ContrastiveTrainer, NVEmbedVectorizer

trainer = ContrastiveTrainer(epochs=2, batch_size=64, random_state=0)
tuned = NVEmbedVectorizer(trainer=trainer)
tuned.fit(train)
print(len(tuned.history_), "steps of up to 64 pairs")
_ = tuned.history_.plot()

# %%
# Before and after
# ----------------
#
# Every held-out summary searches all held-out descriptions.

from skembed import Retriever

queries = [query for query, _ in test]
corpus = [document for _, document in test]
right = [[i] for i in range(len(test))]
frozen = NVEmbedVectorizer()
rankings = {}
for name, vectorizer in {"frozen": frozen, "fine-tuned": tuned}.items():
    documents = vectorizer.encode_document(corpus)
    retriever = Retriever(vectorizer=None).fit(documents)
    vectors = vectorizer.encode_query(queries)
    rankings[name] = retriever.search(vectors, top_k=20).indices
    print(f"{name:10s} nDCG@10 {retriever.score(vectors, right):.3f}")

# %%
# How many queries have their description among the first k:

from matplotlib import pyplot as plt

figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
for name, found in rankings.items():
    hits = (found == np.arange(len(test))[:, None]).cumsum(axis=1).mean(axis=0)
    axes.plot(np.arange(1, found.shape[1] + 1), hits, marker=".", label=name)
axes.set(
    xlabel="first k documents", ylabel="share of queries that find theirs", xticks=[1, 5, 10, 20]
)
_ = axes.legend(frameon=False)

# %%
# The adapter is a folder of a few megabytes in peft's format: ``tuned.save_pretrained("adapter")``,
# and later ``NVEmbedVectorizer("adapter")``.
