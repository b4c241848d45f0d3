"""DEQ-Sequence: equilibrium transformers on text."""

from deq_sequence.corpus import Corpus, get_lm_corpus
from deq_sequence.iterators import LMOrderedIterator
from deq_sequence.model import DEQTransformerLM
from deq_sequence.vocabulary import Vocab

__all__ = ["Corpus", "DEQTransformerLM", "LMOrderedIterator", "Vocab", "get_lm_corpus"]
