"""Files of the right form with wrong content: seeded changes of what a trainer has saved.

Every change leaves a file that torch reads without complaint: all checksums are right. Each breaks
the form of one entry. Allowed is a refusal in one line, or a run that goes on as if nothing had
been changed. The kinds leave out what no form reveals, such as another number in a number's place.
"""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.errors import InputError
from lib.runs.checkpoint import load

OUTCOMES = ("refused", "unharmed", "silent wrong", "traceback")
ALLOWED = OUTCOMES[:2]


@dataclass(frozen=True)
class Change:
    """One change of a nested content: where, and what became of the entry there."""

    place: str
    kind: str
    content: Any  # as a whole, after the change


def changes(content: Any, count: int, seed: int) -> Iterator[Change]:
    """``count`` changes of ``content``, one entry each; ``content`` itself stays as it is."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(content)
        path = _path(changed, rng)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        value = parent[path[-1]] if path else changed
        kind, new = _instead_of(value, rng)
        # An optimiser has no state for a parameter that had no gradient, so numbered keys may lack.
        if path and isinstance(path[-1], str) and rng.random() < 0.1:
            kind = "gone"
            parent.pop(path[-1])
        else:
            changed = _with(changed, path, new)
        yield Change("".join(f"[{key!r}]" for key in path), kind, changed)


_ODD = {
    "none": None,
    "text": "wrong",
    "bytes": b"wrong",
    "huge": 10**400,
    "true": True,
    "complex": 1j,
    "list": [],
    "tuple": (1, 2),
    "set": {1, 2},
    "dict": {"wrong": 1},
    "tensor": torch.ones(2, 3),
    "tensor of one": torch.ones(()),
    "dtype": torch.float32,
}


def _path(value: Any, rng: random.Random) -> list:
    """A random way down into nested containers; every level is its end as often as not."""
    path = []
    while isinstance(value, (dict, list, tuple)) and value and (not path or rng.random() < 0.75):
        path.append(rng.choice(list(value) if isinstance(value, dict) else range(len(value))))
        value = value[path[-1]]
    return path


def _with(value: Any, path: list, new: Any) -> Any:
    """``value`` with another entry at ``path``; tuples are made anew."""
    if not path:
        return new
    entries = dict(value) if isinstance(value, dict) else list(value)
    entries[path[0]] = _with(entries[path[0]], path[1:], new)
    return tuple(entries) if isinstance(value, tuple) else entries


def _instead_of(value: Any, rng: random.Random) -> tuple[str, Any]:
    """A kind of change that suits ``value``, and what stands there instead."""
    if isinstance(value, Tensor) and rng.random() < 0.8:
        kind = rng.choice(list(_OF_TENSORS))
        return kind, _OF_TENSORS[kind](value)
    if type(value) is int and rng.random() < 0.4:
        return rng.choice([("negative", -1 - value), ("fraction", value + 0.5)])
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.4:
        kind, new = rng.choice([("longer", [*value, value[0]]), ("shorter", list(value[:-1]))])
        return kind, type(value)(new)
    if isinstance(value, dict) and value and rng.random() < 0.4:
        other = rng.choice([-1, "wrong", None, (1, 2)])
        return "another key", value | {other: 1}
    odd = {kind: new for kind, new in _ODD.items() if type(new) is not type(value)}
    kind = rng.choice(list(odd))
    return kind, odd[kind]


def _filled(number: float) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        if not value.is_floating_point() or not value.numel():
            return torch.full((3, 5), number)
        changed = value.clone()
        changed.view(-1)[0] = number
        return changed

    return change


_OF_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "another row": lambda v: torch.cat([v.reshape(1, -1), v.reshape(1, -1)]),
    "flat": lambda v: v.reshape(-1) if v.dim() > 1 else v.reshape(1, -1),
    "one dimension more": lambda v: v[None],
    "shorter": lambda v: v.reshape(-1)[1:] if v.numel() else torch.ones(4),
    "empty": lambda v: v.new_empty(0) if v.numel() else v.new_ones(1),
    "huge, without memory": lambda v: v.new_ones(1).expand(10**12),
    "double": lambda v: v.float() if v.dtype == torch.float64 else v.double(),
    "half": lambda v: v.to(torch.float16),
    "integers": lambda v: v.to(torch.int32),
    "bytes": lambda v: v.to(torch.int8),
    "booleans": lambda v: v.bool(),
    "complex": lambda v: v.to(torch.complex64),
    "sparse": lambda v: v.reshape(1, -1).float().to_sparse(),
    "meta": lambda v: v.to("meta"),
    "nan": _filled(float("nan")),
    # The same numbers, stored in another way: these must do no harm.
    "strided": lambda v: torch.stack([v, v], dim=-1)[..., 0],
    "transposed": lambda v: v.t().contiguous().t() if v.dim() == 2 else v.clone(),
}


def judge(path: Path, change: Change, use: Callable[[Any], Any], expected: Any, same) -> str:
    """What becomes of a change: one of OUTCOMES, with the reason of a bad one behind it.

    Args:
        path: a file to write.
        use: loads the content and goes on with it; returns what can be compared.
        expected: what ``use`` returns of the unchanged content.
        same: whether two such results are the same to the last bit.
    """
    torch.save(change.content, path)
    try:
        found = use(load(path))
    except InputError as error:
        return f"traceback: {error}" if "\n" in str(error) else "refused"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    return "unharmed" if same(found, expected) else "silent wrong"
