"""How many bytes of tensors are alive at once, also on the meta device, where nothing is stored."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """In a ``with`` block, counts the storages that operations make until they are freed.

    ``live`` are the bytes alive now, ``peak`` the most at once. The tensors ``before`` (weights,
    data) are not counted. What a kernel holds only while it runs is not seen.
    """

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._before = [t.untyped_storage() for t in before]  # alive, so that no number is reused
        self._known.update(s._cdata for s in self._before)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
