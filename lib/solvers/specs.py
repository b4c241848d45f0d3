"""Texts for a choice and its options: ``name`` or ``name:option=value,option=value``.

They work in command lines, configuration files and notebooks, and need no quotes in a shell.

    >>> from lib.solvers.specs import parse
    >>> parse("anderson:m=4,stop=sample")
    ('anderson', {'m': 4, 'stop': 'sample'})
"""

import ast
import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import partial

from lib.errors import InputError, check, did_you_mean


def parse(text: str) -> tuple[str, dict]:
    """Return name and options. A value is a Python literal, or true, false, none, or a word.

    Raises:
        InputError: an option has no value, or appears twice.
    """
    name, colon, rest = text.partition(":")
    options: dict = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = part.partition("=")
        key = key.strip()
        if not key or not equals or not value.strip():
            raise InputError(f"{part!r} in {text!r} is not option=value")
        if key in options:
            raise InputError(f"{key} stands twice in {text!r}")
        options[key] = _value(value.strip())
    return name.strip(), options


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


class Names(list):
    """Names as the choices of a command line. A name followed by options is also a choice."""

    def __contains__(self, text: object) -> bool:
        return super().__contains__(str(text).partition(":")[0])


def accepts(function: Callable, option: str) -> bool:
    """Whether a function takes the keyword ``option``, by name or through ``**keywords``."""
    parameters = inspect.signature(function).parameters.values()
    return any(
        p.kind is p.VAR_KEYWORD
        or (p.name == option and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        for p in parameters
    )


def unwrapped(function: Callable) -> tuple[Callable, dict]:
    """The function of a partial and its keywords; any other callable itself, and no keywords."""
    return getattr(function, "func", function), getattr(function, "keywords", {})


def choice(
    kind: str,
    text: str,
    choices: dict[str, Callable],
    *,
    without: Collection[str] = (),
    more: type | None = None,
) -> Callable:
    """Return the choice that ``text`` names; with options, a partial of that choice.

    Args:
        kind: the kind of choice ("solver"), for messages.
        without: parameters that a text may not set.
        more: a dataclass whose fields are also options, for choices that take ``**keywords``.

    Raises:
        InputError: ``text`` is not a string, or a name or option is unknown. The message lists the
            accepted ones, or the nearest option.
    """
    check(isinstance(text, str), kind, text, "a name or a callable")
    name, options = parse(text)
    if name not in choices:
        raise InputError(f"unknown {kind} {name!r}: choose from {', '.join(sorted(choices))}")
    accepted = set()
    for parameter in inspect.signature(choices[name]).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            accepted.add(parameter.name)
        elif more is not None:
            accepted |= {field.name for field in fields(more)}
    accepted -= set(without)
    for option in options:
        if option not in accepted:
            listed = ", ".join(sorted(accepted)) or "none"
            hint = did_you_mean(option, sorted(accepted), otherwise=f" (it has: {listed})")
            raise InputError(f"{kind} {name} has no option {option}{hint}")
    return partial(choices[name], **options) if options else choices[name]
