"""
Grid search
===========

Search over the parameters of model and classifier together. What a grid search repeats, the cache
has already: each text goes through the model once for each pooling, however large the grid.
"""

# %%
# A pipeline of embeddings and a classifier, and a grid over three parameters: how many dimensions
# to keep, how strongly to regularise, and how to pool the tokens.

import numpy as np

from skembed.datasets import load_docstrings

docs = load_docstrings(min_per_class=150)
kept = [i for i, text in enumerate(docs.data) if len(text) <= 1000][::6]
texts, groups = [docs.data[i] for i in kept], docs.groups[kept]
labels = np.array(docs.target_names)[docs.target[kept]]

from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import Pipeline

from skembed import EmbeddingCache, NVEmbedVectorizer

cache = EmbeddingCache()
pipe = Pipeline(
    [("emb", NVEmbedVectorizer(cache=cache)), ("clf", LogisticRegression(max_iter=1000))]
)
grid = {
    "emb__truncate_dim": [32, 64, 128, 256, None],
    "emb__pooling": ["latent", "mean"],
    "clf__C": [1, 10, 100],
}
cv = StratifiedGroupKFold(4, shuffle=True, random_state=0)
search = GridSearchCV(pipe, grid, cv=cv).fit(texts, labels, groups=groups)
print(f"accuracy {search.best_score_:.3f} with {search.best_params_}")

# %%
# What it cost
# ------------
#
# Every candidate was fitted and scored in each fold. Without the cache, each would have embedded
# all texts.

n_fits = len(search.cv_results_["params"]) * search.n_splits_ + 1
print(f"{n_fits} fits of {len(texts)} texts: {len(cache)} vectors were computed")

# %%
# The scores
# ----------
#
# One panel for each pooling. Dimensions are cut from the end and the rest is scaled to unit
# length again.

from matplotlib import pyplot as plt

dims, strengths = grid["emb__truncate_dim"], grid["clf__C"]
scores = search.cv_results_["mean_test_score"]
params = search.cv_results_["params"]
figure, panels = plt.subplots(
    1, 2, figsize=(7.2, 3.8), sharey=True, layout="constrained", squeeze=False
)
for panel, pooling in zip(panels[0], grid["emb__pooling"], strict=True):
    table = np.full((len(dims), len(strengths)), np.nan)
    for score, choice in zip(scores, params, strict=True):
        if choice["emb__pooling"] == pooling:
            row = dims.index(choice["emb__truncate_dim"])
            table[row, strengths.index(choice["clf__C"])] = score
    panel.imshow(table, cmap="viridis", vmin=scores.min(), vmax=scores.max(), aspect="auto")
    for (row, column), score in np.ndenumerate(table):
        dark = score < (scores.min() + scores.max()) / 2
        color = "white" if dark else "black"
        panel.text(column, row, f"{score:.3f}", ha="center", va="center", color=color)
    panel.set_xticks(range(len(strengths)), strengths)
    panel.set_yticks(range(len(dims)), ["all" if dim is None else dim for dim in dims])
    panel.set(xlabel="C", title=f"{pooling} pooling")
_ = panels[0, 0].set_ylabel("dimensions")
