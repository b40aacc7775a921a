"""
Instructions compared
=====================

An instruction tells the model what texts are to be compared for. It helps models that learned
instructions, such as NV-Embed. The bundled model did not; here is what one costs it: on the same
draws, with an interval.
"""

# %%
# Three tasks on one set of documentation: classify passages by subpackage, cluster them, and find
# the description that belongs to a summary. MTEB draws 16,384 texts for each clustering; 1,000 keep
# this page to seconds.

from skembed import evaluate
from skembed.datasets import load_docstrings
from skembed.evaluation import ClassificationTask, ClusteringTask, RetrievalTask

docs = load_docstrings(min_per_class=150)
kept = [i for i, text in enumerate(docs.data) if len(text) <= 1000][::6]
texts, labels = [docs.data[i] for i in kept], docs.target[kept]
pairs = [(summary, document) for summary, document in docs.pairs if len(document) <= 1000][::3]
tasks = [
    ClassificationTask(texts, labels, samples_per_label=8),
    ClusteringTask(texts, labels, sample_size=1000),
    RetrievalTask(
        [query for query, _ in pairs],
        [document for _, document in pairs],
        [[i] for i in range(len(pairs))],
    ),
]

# %%
# The same model with no instruction, with a general one, and with one that names the subject. An
# instruction is the task in words; the template around it is NV-Embed's. The model warns of both.

import warnings

from skembed import NVEmbedVectorizer
from skembed.instructions import format_instruction

warnings.filterwarnings("ignore", message="The model .* learned no instructions")
general = "Retrieve semantically similar text"
subject = "Identify the mathematical topic that the documentation of a function is about"
vectorizers = {
    "none": NVEmbedVectorizer(),
    "general": NVEmbedVectorizer(instruction=general),
    "subject": NVEmbedVectorizer(instruction=subject),
}
print(format_instruction("Instruct: {instruction}\nQuery: ", subject) + texts[0][:60])

# %%
# :func:`~skembed.evaluate` scores each by MTEB's protocol for the task.

result = evaluate(vectorizers, tasks)
_ = result.plot()
print(result)

# %%
# The intervals above say how much a score depends on the draw. For the question which instruction
# is better, the paired difference says more: both see the same draws and the same queries. An
# interval that holds zero means that this data cannot tell.

print(result.compare("subject", "none"))
print(result.compare("general", "none"))
