"""
Clustering with a map
=====================

Find groups in texts that nobody has labelled, name them, and look at them from above.
"""

# sphinx_gallery_thumbnail_number = 2

# %%
# Passages of documentation again. Their labels are put aside: they only serve to judge the result
# at the end.

from skembed.datasets import load_docstrings

docs = load_docstrings(min_per_class=150)
kept = [i for i, text in enumerate(docs.data) if len(text) <= 1000][::4]
texts, labels = [docs.data[i] for i in kept], docs.target[kept]
print(len(texts), "texts")

# %%
# Clusters and their names
# ------------------------
#
# :class:`~skembed.EmbeddingClusterer` embeds the texts, tries the numbers of clusters
# that it is given, and keeps the one with the best silhouette. The names come from the words that
# set a cluster apart from the others (class-based TF-IDF).

from skembed import EmbeddingClusterer

clusterer = EmbeddingClusterer(n_clusters=[4, 6, 8, 12, 16, 24], random_state=0).fit(texts)
for cluster, terms in clusterer.top_terms_.items():
    size = (clusterer.labels_ == cluster).sum()
    print(f"{cluster:2d} {size:4d} texts: {', '.join(terms[:6])}")

# %%
# The silhouette by number of clusters. It is a hint, not a verdict: where the curve is flat, take
# the number that is useful.

_ = clusterer.plot_silhouettes()

# %%
# The texts nearest to the centre of the largest cluster:

import numpy as np

largest = int(np.bincount(clusterer.labels_).argmax())
for text in clusterer.representative_texts_[largest]:
    print("-", text[:150])

# %%
# The map
# -------
#
# :class:`~skembed.EmbeddingMapDisplay` projects the embeddings with UMAP. The vectorizer's
# cache holds them already.

from skembed import EmbeddingMapDisplay

embeddings = clusterer.vectorizer_.transform(texts)
display = EmbeddingMapDisplay.from_embeddings(
    embeddings, clusterer.labels_, names=clusterer.cluster_names_
)

# %%
# The same map, coloured by the labels that were put aside. The coordinates are those of the first
# map, so that both can be compared point by point.

names = dict(enumerate(docs.target_names))
_ = EmbeddingMapDisplay.from_embeddings(
    embeddings, labels, names=names, coordinates=display.coordinates
)

# %%
# How well do clusters and labels agree? The V-measure is 1 for a perfect match and 0 for chance.
# New texts are placed into the clusters without a new fit.

from sklearn.metrics import v_measure_score

print(f"V-measure {v_measure_score(labels, clusterer.labels_):.3f}")
new = ["Fit a straight line through noisy points.", "Zeros of the Bessel function."]
for text, cluster in zip(new, clusterer.predict(new), strict=True):
    print(f"{text} -> {clusterer.cluster_names_[cluster]}")
