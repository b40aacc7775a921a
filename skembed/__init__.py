"""NV-Embed text embeddings as scikit-learn estimators.

Every public name loads at its first use, so that ``import skembed`` costs next to nothing and
imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skembed import datasets, metrics
    from skembed.cache import EmbeddingCache
    from skembed.classification import EmbeddingClassifier, ZeroShotClassifier
    from skembed.clustering import EmbeddingClusterer
    from skembed.evaluation import evaluate
    from skembed.examples import TrainingTask
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
    from skembed.mining import MinedNegatives, mine_hard_negatives
    from skembed.mteb import MTEBEncoder
    from skembed.parallel import EmbeddingMapper
    from skembed.plotting import EmbeddingMapDisplay
    from skembed.quantization import EmbeddingQuantizer
    from skembed.reranking import Reranker
    from skembed.retrieval import Retriever
    from skembed.streaming import open_embeddings
    from skembed.sts import SimilarityRegressor
    from skembed.trainer import ContrastiveTrainer
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
    "ContrastiveTrainer": "skembed.trainer",
    "EmbeddingCache": "skembed.cache",
    "EmbeddingClassifier": "skembed.classification",
    "EmbeddingClusterer": "skembed.clustering",
    "EmbeddingMapDisplay": "skembed.plotting",
    "EmbeddingMapper": "skembed.parallel",
    "EmbeddingQuantizer": "skembed.quantization",
    "FreshPoolingWarning": "skembed.exceptions",
    "MTEBEncoder": "skembed.mteb",
    "MinedNegatives": "skembed.mining",
    "ModelNotFoundError": "skembed.exceptions",
    "NVEmbedVectorizer": "skembed.vectorizer",
    "Reranker": "skembed.reranking",
    "Retriever": "skembed.retrieval",
    "SimilarityRegressor": "skembed.sts",
    "SkembedError": "skembed.exceptions",
    "SkembedWarning": "skembed.exceptions",
    "TrainingError": "skembed.exceptions",
    "TrainingTask": "skembed.examples",
    "TruncationWarning": "skembed.exceptions",
    "ZeroShotClassifier": "skembed.classification",
    "datasets": "skembed.datasets",
    "evaluate": "skembed.evaluation",
    "metrics": "skembed.metrics",
    "mine_hard_negatives": "skembed.mining",
    "open_embeddings": "skembed.streaming",
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
