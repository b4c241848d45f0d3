"""DEQ-Sequence: equilibrium transformers on text."""

from deq_sequence.model import DEQTransformerLM

__all__ = ["DEQTransformerLM"]
