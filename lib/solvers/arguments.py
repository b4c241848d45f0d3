"""Arguments of solvers: the keywords that they share, checks, and texts that choose and set them.

A text is ``name`` or ``name:option=value,option=value``: it needs no quotes in a shell.
"""

import ast
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from lib.errors import InputError, check, check_count, check_number, did_you_mean, is_number
from lib.solvers.transforms import refuse_batched, tangent_of


@dataclass(frozen=True, kw_only=True)
class Control:
    """Keywords that all solvers take.

    Attributes:
        stop: 'batch' stops by norms over the whole batch, as published. 'sample' stops each sample
            by its own norms: see :mod:`lib.solvers.sample_solve`.
        best: the iterate to return. 'batch': that with the lowest residual over the whole batch, as
            published. 'sample': for each sample, its own, at no cost; a sample that wanders then
            does not spoil the result of the others. ``best`` has no effect on when the solve stops.
            None means the value of ``stop``; stop='sample' refuses best='batch'.
        check_every: check the residual only once in this many evaluations. Between checks a GPU
            does not wait for the host. Up to ``check_every - 1`` evaluations may be wasted, and as
            many more iterates are held in memory. The best iterate is still returned. If it is
            above the threshold, the host reads once, at the end. A line search and Krylov methods
            need every residual and ignore ``check_every``.
        floor: in either ``stop_mode``, also stop once ||f(z) - z|| / ||f(z)|| is below ``floor``,
            such as the level of the rounding of f.
        max_nfe: stop after this many evaluations of f and products with the Jacobian together,
            whatever ``threshold`` counts.
        max_seconds: start no evaluation or product after this time, except the evaluation at the
            point to which products have led. How far a solve gets by then depends on the machine:
            a run is no longer reproducible.
    """

    stop: str = "batch"
    best: str | None = None
    check_every: int = 1
    floor: float = 0.0
    max_nfe: int | None = None
    max_seconds: float | None = None

    def __post_init__(self):
        check(self.stop in ("batch", "sample"), "stop", self.stop, "'batch' or 'sample'")
        best = (None, "batch", "sample")
        check(self.best in best, "best", self.best, "None, 'batch' or 'sample'")
        if self.stop == "sample" and self.best == "batch":
            raise InputError("stop='sample' returns each sample's own best point: leave best out")
        check_count("check_every", self.check_every)
        check_number("floor", self.floor)
        if self.max_nfe is not None:
            check_count("max_nfe", self.max_nfe)
        if self.max_seconds is not None:
            check_number("max_seconds", self.max_seconds, positive=True)
        if self.stop == "sample" and self.check_every > 1:
            raise InputError("stop='sample' looks at every residual: leave check_every out")


def check_state(f, x0) -> None:
    """Refuse a map and a state that no solve can start from."""
    check(callable(f), "f", f, "a function of the state")
    check(isinstance(x0, Tensor), "x0", type(x0).__name__, "a tensor (see list2vec for lists)")
    check(x0.is_floating_point(), "dtype of x0", x0.dtype, "a floating dtype")
    check(x0.dim() >= 1 and x0.numel() > 0, "shape of x0", tuple(x0.shape), "(batch, ...)")


def check_stop_mode(value) -> None:
    check(value in ("abs", "rel"), "stop_mode", value, "'abs' or 'rel'")


def check_finite(x0: Tensor) -> None:
    check(bool(torch.isfinite(x0).all()), "x0", "not finite", "finite everywhere")


def check_damping(value) -> None:
    check(is_number(value) and 0 < value <= 1, "damping", value, "in (0, 1]")


def checked_value(f: Callable, z: Tensor) -> Tensor:
    """f(z); refuse an f that changes the shape or writes to a state."""
    writes = None if z.is_inference() else z._version  # as autograd counts them
    fz = f(z)
    if writes is not None and z._version != writes:
        raise InputError(
            "f writes to a state that it was given, or gave: let it return a new tensor at "
            "every call (no operation in place on its argument, no buffer of its own)"
        )
    if not isinstance(fz, Tensor) or fz.shape != z.shape:
        found = tuple(fz.shape) if isinstance(fz, Tensor) else type(fz).__name__
        raise InputError(f"f must map {tuple(z.shape)} to the same shape, but gave {found}")
    refuse_batched(tangent_of(fz))
    return fz


def parse(text: str) -> tuple[str, dict]:
    """Return name and options. A value is a Python literal, or true, false, none, or a word.

    >>> parse("anderson:m=4,stop=sample")
    ('anderson', {'m': 4, 'stop': 'sample'})

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
    """Names as the choices of a command line, also with options."""

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
        InputError: ``text`` is not a string, or a name or option is unknown.
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
