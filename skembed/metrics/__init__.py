"""Metrics equal to mteb 2.26 and pytrec_eval: classification, clustering, correlation, ranking.

The first three wrap scikit-learn and scipy. The metrics of rankings (`ndcg_at_k` and so
on) are trec_eval's; they take ``{query_id: {document_id: ...}}`` or two matrices.
"""

from skembed.metrics.agreement import ami, pearson, spearman, v_measure
from skembed.metrics.classification import accuracy, average_precision, classification_metrics, f1
from skembed.metrics.qrels import search_to_run
from skembed.metrics.ranking import (
    K_VALUES,
    RANKING_METRICS,
    hit_rate_at_k,
    map_at_k,
    mrr_at_k,
    ndcg_at_k,
    precision_at_k,
    ranking_metrics,
    ranking_summary,
    recall_at_k,
)

__all__ = [
    "K_VALUES",
    "RANKING_METRICS",
    "accuracy",
    "ami",
    "average_precision",
    "classification_metrics",
    "f1",
    "hit_rate_at_k",
    "map_at_k",
    "mrr_at_k",
    "ndcg_at_k",
    "pearson",
    "precision_at_k",
    "ranking_metrics",
    "ranking_summary",
    "recall_at_k",
    "search_to_run",
    "spearman",
    "v_measure",
]
