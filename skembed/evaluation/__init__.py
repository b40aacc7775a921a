"""`evaluate`: vectorizers on a user's own data by mteb's protocols, with intervals and pairs.

A task is a small dataclass; its draws and bootstrap samples are the same for every vectorizer, so
two vectorizers, or two instructions of one, are compared on the same data by
`EvaluationResult.compare`.
"""

from skembed.evaluation.harness import evaluate
from skembed.evaluation.results import (
    Comparison,
    ComparisonResult,
    EvaluationError,
    EvaluationResult,
    TaskScore,
)
from skembed.evaluation.scorers import (
    clustering_scorer,
    reranking_scorer,
    retrieval_scorer,
    sts_scorer,
)
from skembed.evaluation.tasks import (
    CLASSIFICATION_METRICS,
    CLUSTERING_METRICS,
    STS_METRICS,
    ClassificationTask,
    ClusteringTask,
    RerankingTask,
    RetrievalTask,
    STSTask,
)

__all__ = [
    "CLASSIFICATION_METRICS",
    "CLUSTERING_METRICS",
    "ClassificationTask",
    "ClusteringTask",
    "Comparison",
    "ComparisonResult",
    "EvaluationError",
    "EvaluationResult",
    "RerankingTask",
    "RetrievalTask",
    "STSTask",
    "STS_METRICS",
    "TaskScore",
    "clustering_scorer",
    "evaluate",
    "reranking_scorer",
    "retrieval_scorer",
    "sts_scorer",
]
