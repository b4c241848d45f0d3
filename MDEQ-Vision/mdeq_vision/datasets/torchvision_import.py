"""Importing torchvision next to any build of PyTorch."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from lib.errors import needs

# While it is imported, torchvision describes these two compiled operators to PyTorch. If
# torchvision was built for another PyTorch (a CUDA wheel next to a CPU wheel), the operators do
# not exist and the import fails. Reading and transforming images needs neither of them.
MISSING_OPERATORS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_torchvision() -> ModuleType:
    """The module ``torchvision``, for its ``transforms`` and ``datasets``.

    Call this function where images are read, not at the top of a module. If torchvision's compiled
    operators cannot be loaded, their names are declared without an implementation. Calling one of
    them fails then; everything else works.

    Raises:
        MissingExtra: torchvision is not installed.
        RuntimeError: torchvision cannot be imported for another reason.
    """
    try:
        with needs("images"):
            import torchvision
    except RuntimeError as error:
        if not any(name in str(error) for name in MISSING_OPERATORS):
            raise
        for name, schema in MISSING_OPERATORS.items():
            namespace, operator = name.split("::")
            if not hasattr(getattr(torch.ops, namespace), operator):
                torch.library.define(name, schema)
        import torchvision
    return torchvision


class LazyTransform:
    """A chain of torchvision transforms that is built at its first call.

    Only ``build``, a module-level function, and its arguments are pickled. So a data set with a
    LazyTransform can be sent to a process that cannot import torchvision by itself.
    """

    def __init__(self, build: Callable[..., Callable], *arguments: Any):
        self.build, self.arguments = build, arguments
        self._transform: Callable | None = None

    def __call__(self, image: Any) -> Any:
        if self._transform is None:
            self._transform = self.build(*self.arguments)
        return self._transform(image)

    def __reduce__(self):
        return LazyTransform, (self.build, *self.arguments)
