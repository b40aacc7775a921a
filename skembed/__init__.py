"""NV-Embed text embeddings as scikit-learn estimators.

Every public name loads at its first use, so that ``import skembed`` costs next to nothing and
imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skembed import datasets, metrics
    from skembed.cache.embedding_cache import EmbeddingCache
    from skembed.estimators.classification import EmbeddingClassifier
    from skembed.estimators.clustering import EmbeddingClusterer
    from skembed.estimators.quantization import EmbeddingQuantizer
    from skembed.estimators.reranking import Reranker
    from skembed.estimators.retrieval import Retriever
    from skembed.estimators.sts import SimilarityRegressor
    from skembed.estimators.zero_shot import ZeroShotClassifier
    from skembed.evaluation.harness import evaluate
    from skembed.exceptions import (
        CacheError,
        CausalLeakError,
        CheckpointError,
        FreshPoolingWarning,
        ModelNotFoundError,
        SkembedError,
        SkembedWarning,
        TrainingError,
        TruncationWarning,
    )
    from skembed.mteb import MTEBEncoder
    from skembed.parallel import EmbeddingMapper
    from skembed.plotting.display import EmbeddingMapDisplay
    from skembed.streaming.stream import open_embeddings
    from skembed.training.examples import TrainingTask
    from skembed.training.mining import MinedNegatives, mine_hard_negatives
    from skembed.training.trainer import ContrastiveTrainer
    from skembed.vectorizer import NVEmbedVectorizer

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "CausalLeakError",
    "CheckpointError",
    "ContrastiveTrainer",
    "EmbeddingCache",
    "EmbeddingClassifier",
    "EmbeddingClusterer",
    "EmbeddingMapDisplay",
    "EmbeddingMapper",
    "EmbeddingQuantizer",
    "FreshPoolingWarning",
    "MTEBEncoder",
    "MinedNegatives",
    "ModelNotFoundError",
    "NVEmbedVectorizer",
    "Reranker",
    "Retriever",
    "SimilarityRegressor",
    "SkembedError",
    "SkembedWarning",
    "TrainingError",
    "TrainingTask",
    "TruncationWarning",
    "ZeroShotClassifier",
    "datasets",
    "evaluate",
    "metrics",
    "mine_hard_negatives",
    "open_embeddings",
]

# Public name -> module that holds it (a public module stands for itself).
_HOMES = {
    "CacheError": "skembed.exceptions",
    "CausalLeakError": "skembed.exceptions",
    "CheckpointError": "skembed.exceptions",
    "ContrastiveTrainer": "skembed.training.trainer",
    "EmbeddingCache": "skembed.cache.embedding_cache",
    "EmbeddingClassifier": "skembed.estimators.classification",
    "EmbeddingClusterer": "skembed.estimators.clustering",
    "EmbeddingMapDisplay": "skembed.plotting.display",
    "EmbeddingMapper": "skembed.parallel",
    "EmbeddingQuantizer": "skembed.estimators.quantization",
    "FreshPoolingWarning": "skembed.exceptions",
    "MTEBEncoder": "skembed.mteb",
    "MinedNegatives": "skembed.training.mining",
    "ModelNotFoundError": "skembed.exceptions",
    "NVEmbedVectorizer": "skembed.vectorizer",
    "Reranker": "skembed.estimators.reranking",
    "Retriever": "skembed.estimators.retrieval",
    "SimilarityRegressor": "skembed.estimators.sts",
    "SkembedError": "skembed.exceptions",
    "SkembedWarning": "skembed.exceptions",
    "TrainingError": "skembed.exceptions",
    "TrainingTask": "skembed.training.examples",
    "TruncationWarning": "skembed.exceptions",
    "ZeroShotClassifier": "skembed.estimators.zero_shot",
    "datasets": "skembed.datasets",
    "evaluate": "skembed.evaluation.harness",
    "metrics": "skembed.metrics",
    "mine_hard_negatives": "skembed.training.mining",
    "open_embeddings": "skembed.streaming.stream",
}


def __getattr__(name: str) -> object:
    """Load a public name at its first use (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(home)
    value = module if home == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    """List the public names too, loaded or not."""
    return sorted({*globals(), *__all__})
