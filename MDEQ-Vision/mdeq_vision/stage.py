"""Checks of MODEL.EXTRA.FULL_STAGE, the shape of a multiscale model."""

import difflib
from collections.abc import Mapping

from yacs.config import CfgNode

from lib.errors import InputError, check, did_you_mean

NAME = "MODEL.EXTRA.FULL_STAGE"
_ONLY = {"BLOCK": "BASIC", "FUSE_METHOD": "SUM", "NUM_MODULES": 1}
# Lists of one integer per branch: (least value, largest value or None).
_LISTS = {"NUM_CHANNELS": (1, None), "NUM_BLOCKS": (1, None), "BIG_KERNELS": (0, 2)}
_NUMBERS = ("NUM_BRANCHES", "FINAL_CHANSIZE")  # FINAL_CHANSIZE belongs to the classification head
_HEAD_LISTS = {"HEAD_CHANNELS": (1, None)}
_KEYS = (*_NUMBERS, *_LISTS, *_HEAD_LISTS, *_ONLY)
_OF_EXTRA = ("FULL_STAGE", "FINAL_CONV_KERNEL")


def full_stage(cfg: CfgNode, *, head: bool = False) -> CfgNode:
    """Return FULL_STAGE after checking that it is complete and in range.

    Args:
        cfg: the configuration.
        head: also require the classification head's HEAD_CHANNELS and FINAL_CHANSIZE.

    Raises:
        InputError: a key is missing, or a value is out of range or not available.
    """
    stage = cfg.MODEL.EXTRA.get("FULL_STAGE")
    if not isinstance(stage, Mapping):
        raise InputError(f"the configuration has no {NAME}: start from a file in experiments/")
    lists = _LISTS | (_HEAD_LISTS if head else {})
    numbers = _NUMBERS if head else _NUMBERS[:1]
    if missing := [key for key in (*numbers, *lists) if key not in stage]:
        raise InputError(f"{NAME} lacks {', '.join(missing)}")
    for key in numbers:
        check_integer(f"{NAME}.{key}", stage[key], 1)
    for key, (least, largest) in lists.items():
        values = stage[key]
        n = stage.NUM_BRANCHES
        if not isinstance(values, list) or len(values) != n:
            raise InputError(f"{NAME}.{key} is {values!r}, but must list {n} values")
        for i, value in enumerate(values):
            check_integer(f"{NAME}.{key}[{i}]", value, least, largest)
    for key, value in _ONLY.items():
        if stage.get(key, value) != value:
            raise InputError(f"{NAME}.{key} is {stage[key]!r}, but only {value!r} is available")
    return stage


def check_keys(cfg: CfgNode) -> None:
    """Refuse an unknown key of FULL_STAGE, and a key of MODEL.EXTRA that is nearly a known one.

    Other keys of MODEL.EXTRA are free, for models of one's own.
    """
    extra = cfg.MODEL.EXTRA
    stage = extra.get("FULL_STAGE")
    for key in stage if isinstance(stage, Mapping) else ():
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS, otherwise=f": it has {', '.join(_KEYS)}")
            raise InputError(f"unknown key {NAME}.{key}{hint}")
    for key in extra:
        near = difflib.get_close_matches(key.upper(), _OF_EXTRA, n=1, cutoff=0.8)
        if near and key not in _OF_EXTRA:
            raise InputError(f"unknown key MODEL.EXTRA.{key}: did you mean {near[0]}?")


def unused_keys(cfg: CfgNode) -> list[str]:
    """Return a log line for each key of MODEL.EXTRA that no model uses."""
    unused = sorted(cfg.MODEL.EXTRA.keys() - set(_OF_EXTRA))
    return [f"note: MODEL.EXTRA.{key} has no effect" for key in unused]


def check_integer(name: str, value, least: int, largest: int | None = None) -> None:
    """Raise an InputError unless ``value`` is an integer, least <= value <= largest."""
    fits = type(value) is int and value >= least and (largest is None or value <= largest)
    bound = f"from {least} on" if largest is None else f"from {least} to {largest}"
    check(fits, name, value, f"an integer {bound}")
