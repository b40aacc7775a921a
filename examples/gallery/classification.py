"""
Classification
==============

Label texts with a classifier on their embeddings, and ask three questions of it: how good is it on
functions it has not seen, how many labelled texts does it need, and what does it confuse?
"""

# %%
# The texts are passages of documentation, labelled with the subpackage that they document. Passages
# about one function share a group, and a group is never on both sides of a split: else a passage
# could be recognised by its neighbour. A quarter of the set, without the longest, keeps this page
# to seconds.

import numpy as np

from skembed.datasets import load_docstrings

docs = load_docstrings(min_per_class=150)
kept = [i for i, text in enumerate(docs.data) if len(text) <= 1000][::4]
texts, groups = [docs.data[i] for i in kept], docs.groups[kept]
labels = np.array(docs.target_names)[docs.target[kept]]
print(len(texts), "texts,", len(set(groups)), "functions and classes,", len(set(labels)), "labels")
print(repr(texts[0]), "->", labels[0])

# %%
# Cross-validation
# ----------------
#
# :class:`~skembed.EmbeddingClassifier` embeds texts and fits a logistic regression.
# It stands beside the usual baseline: counts of character n-grams, weighed by TF-IDF. Every text
# goes through the model once, in whichever fold it comes first; the others find its vector in the
# cache.

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline

from skembed import EmbeddingClassifier

models = {
    "embeddings": EmbeddingClassifier(),
    "TF-IDF": make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    ),
}
cv = StratifiedGroupKFold(4, shuffle=True, random_state=0)
for name, model in models.items():
    scores = cross_val_score(model, texts, labels, groups=groups, cv=cv)
    print(f"{name:10s} accuracy {scores.mean():.3f} +- {scores.std():.3f} over {len(scores)} folds")

# %%
# Learning curve
# --------------
#
# Embeddings know something of words that no labelled text holds, which counts most where labels
# are few.

from matplotlib import pyplot as plt
from sklearn.model_selection import learning_curve

figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
for name, model in models.items():
    sizes, _, scores = learning_curve(
        model,
        texts,
        labels,
        groups=groups,
        cv=cv,
        train_sizes=[0.1, 0.2, 0.5, 1.0],
        shuffle=True,
        random_state=0,
    )
    mean, spread = scores.mean(axis=1), scores.std(axis=1)
    (line,) = axes.plot(sizes, mean, marker="o", label=name)
    axes.fill_between(sizes, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
axes.set(xscale="log", xlabel="labelled texts", ylabel="accuracy on unseen functions")
axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
axes.minorticks_off()
_ = axes.legend(frameon=False)

# %%
# What is confused
# ----------------
#
# Each text is predicted by the model of the fold that did not see it. Rows add up to one.

from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import cross_val_predict

predicted = cross_val_predict(models["embeddings"], texts, labels, groups=groups, cv=cv)
figure, axes = plt.subplots(figsize=(7, 6.4), layout="constrained")
_ = ConfusionMatrixDisplay.from_predictions(
    labels,
    predicted,
    normalize="true",
    values_format=".1f",
    xticks_rotation="vertical",
    colorbar=False,
    cmap="Blues",
    ax=axes,
)
