"""DEQ-Sequence: equilibrium transformers on text."""

from deq_sequence.model import DEQTransformerLM
from deq_sequence.text.corpus import Corpus, get_lm_corpus
from deq_sequence.text.iterators import LMOrderedIterator
from deq_sequence.text.vocabulary import Vocab
from deq_sequence.trained import TrainedModel, load

__all__ = [
    "Corpus",
    "DEQTransformerLM",
    "LMOrderedIterator",
    "TrainedModel",
    "Vocab",
    "get_lm_corpus",
    "load",
]
