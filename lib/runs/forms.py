"""The form of what a checkpoint holds, compared with what the run that reads it would save.

A file can be undamaged and still hold wrong content: a tensor of another shape, or a text instead
of a number. With such a state a fused optimiser writes outside its memory.
"""

from types import EllipsisType

import torch
from torch import Tensor

from lib.errors import InputError

_MOST = 2**53  # above it, floats do not count in steps of one


def check_form(found, own, name: str) -> None:
    """Raise an InputError unless ``found`` has the form of ``own``, with all their entries:

    - a tensor: the same shape and dtype, stored as an array, without NaN;
    - a dict: the same keys; a list or tuple: the same length;
    - an integer: an integer of at least 0; a float: a number;
    - ``...``: anything;
    - anything else, such as a text: the same type.

    ``name`` begins the message.
    """
    match own:
        case EllipsisType():
            fits = True
        case Tensor():
            fits = isinstance(found, Tensor) and not found.is_meta
            fits = fits and _of_tensor(found) == _of_tensor(own)
        case dict():
            fits = isinstance(found, dict) and found.keys() == own.keys()
        case list() | tuple():
            fits = isinstance(found, (list, tuple)) and len(found) == len(own)
        case int() if not isinstance(own, bool):
            fits = type(found) is int and 0 <= found <= _MOST
        case float():
            fits = type(found) is float or (type(found) is int and abs(found) <= _MOST)
        case _:
            fits = type(found) is type(own)
    if not fits:
        raise InputError(
            f"{name} is {_words(found)}, and this run has {_words(own)}: use another checkpoint"
        )
    if isinstance(own, Tensor) and found.isnan().any():
        raise InputError(f"{name} holds NaN: use another checkpoint")
    if isinstance(own, (dict, list, tuple)):
        for key in own if isinstance(own, dict) else range(len(own)):
            check_form(found[key], own[key], f"{name}[{key!r}]")


def check_plain(found, name: str) -> None:
    """Refuse anything else than a dict of texts, numbers and None."""
    values = found.values() if isinstance(found, dict) else [()]
    for value in values:
        number = isinstance(value, (int, float)) and not abs(value) >= 2**64
        if not (number or value is None or isinstance(value, str)):
            raise InputError(f"{name} holds {_words(value)}: use another checkpoint")


def _of_tensor(value: Tensor) -> tuple:
    plain = value.layout is torch.strided and not value.is_quantized
    return tuple(value.shape), value.dtype, plain


def _words(value) -> str:
    if isinstance(value, Tensor):
        shape, dtype, plain = _of_tensor(value)
        return f"a tensor {shape} of {dtype}{'' if plain else ' that is no plain array'}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)} entries"
    if type(value) is int and not 0 <= value <= _MOST:
        return "a number out of range"
    return f"of type {type(value).__name__}"
