"""
Semantic textual similarity
===========================

Score how alike two texts are: first by the cosine of their embeddings, then on a scale of your own.
"""

# %%
# No set of human judgements comes with the package, so this page makes a stand-in from the
# documentation: two passages about the same function count 3, about two functions of one subpackage
# 2, of two subpackages of one package 1, of two packages 0. A set of your own, such as STS-B, goes
# in the same way: a list of pairs and a list of numbers.

import numpy as np

from skembed.datasets import load_docstrings

docs = load_docstrings(min_per_class=150)
kept = [i for i, text in enumerate(docs.data) if len(text) <= 1000]
texts, functions = [docs.data[i] for i in kept], docs.groups[kept]
subpackages = np.array(docs.target_names)[docs.target[kept]]
packages = np.array([name.partition(".")[0] for name in subpackages])
rng = np.random.default_rng(0)

pairs, scores, objects = [], [], []
for i in rng.permutation(len(texts)):
    same = np.array([functions == functions[i], subpackages == subpackages[i]])
    same = np.vstack([same, packages == packages[i]])  # function, subpackage, package
    same[0, i] = False
    score = len(pairs) % 4
    kinds = {3: same[0], 2: same[1] & ~same[0], 1: same[2] & ~same[1], 0: ~same[2]}
    others = np.flatnonzero(kinds[score])
    others = others[others != i]
    if len(others):
        pairs.append((texts[i], texts[rng.choice(others)]))
        scores.append(float(score))
        objects.append(functions[i])
    if len(pairs) == 400:
        break
scores = np.array(scores)
print(len(pairs), "pairs; the first counts", scores[0])

# %%
# The cosine
# ----------
#
# Fitted without scores, :class:`~skembed.SimilarityRegressor` predicts the cosine. It learns
# nothing, so every pair is a fair test. ``score`` is Spearman's rank correlation.

from skembed import SimilarityRegressor

cosine = SimilarityRegressor().fit(pairs)
print(f"Spearman correlation of the cosine: {cosine.score(pairs, scores):.3f}")

# %%
# A scale of your own
# -------------------
#
# Fitted with scores, it also learns the curve from cosine to score. The curve only rises, so the
# order of the pairs, and with it the rank correlation, stays what it was; what changes is that the
# numbers mean something. Cross-validation shows the error on unseen pairs.

from sklearn.model_selection import GroupKFold, cross_val_predict

predicted = cross_val_predict(
    SimilarityRegressor(), pairs, scores, groups=objects, cv=GroupKFold(5)
)
constant = np.abs(scores - np.median(scores)).mean()
print(f"mean absolute error {np.abs(scores - predicted).mean():.2f}, ", end="")
print(f"of a constant {constant:.2f}, on a scale from 0 to 3")

# %%
# Cosines and fitted curve. Each dot is a pair, moved a little up or down so that they do not hide
# one another.

from matplotlib import pyplot as plt

fitted = SimilarityRegressor().fit(pairs, scores)
cosines = cosine.predict(pairs)
order = cosines.argsort()
figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
axes.scatter(cosines, scores + rng.uniform(-0.15, 0.15, len(scores)), s=10, alpha=0.5)
axes.plot(cosines[order], fitted.predict(pairs)[order], color="C1", label="fitted curve")
axes.set(xlabel="cosine", ylabel="score", yticks=range(4))
axes.set_yticklabels(["other package", "package", "subpackage", "function"])
_ = axes.legend(frameon=False)
