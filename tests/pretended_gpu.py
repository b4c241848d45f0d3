"""A pretended GPU, for machines without one: ``with PretendedGpu() as gpu: model.to("cuda:0")``.

Its tensors say cuda:0 and keep their values in the CPU's memory, so results are those of the CPU,
digit for digit. What CUDA refuses is refused: an operation on tensors of several devices (but for
CPU numbers of no dimension, and CPU indices), a CPU generator, ``numpy()``. What makes the host
wait for a GPU is counted, by file and line: reads of values, and copies to the GPU that block.

PyTorch's C++ side still takes them for CPU tensors: without CUDA, autograd would end the process.
So transfers and factories are met in Python (``__torch_function__``), all else below autograd
(``__torch_dispatch__``). Kernels of CUDA, streams and memory are beyond it.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ROOT = f"{Path(__file__).parent.parent}/"
CPU = torch.device("cpu")
aten = torch.ops.aten
# They accept CPU indices, or a CPU number, beside tensors of a GPU.
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
_NUMBERS = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
# The host has to know their value, or the size of what they return.
_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}
_TO_HOST = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__}
_TO_HOST |= {Tensor.__index__, Tensor.__format__}


class PretendedTensor(Tensor):
    """A tensor of the pretended GPU: ``value`` is the CPU's tensor, ``gpu`` the device it says."""

    @staticmethod
    def __new__(cls, value: Tensor, gpu: torch.device):
        return Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype
        )

    def __init__(self, value: Tensor, gpu: torch.device):
        self.value, self.gpu = value, gpu

    device = property(lambda self: self.gpu)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    def get_device(self) -> int:
        return self.gpu.index

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def record_stream(self, stream) -> None:
        pass

    def __reduce_ex__(self, protocol):
        return self.value.__reduce_ex__(protocol)  # in a file it is a CPU's

    def __repr__(self, **_) -> str:
        return f"Pretended({self.value!r}, {self.gpu})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        gpu = _common_device(func, args, kwargs)
        _refuse_generator(gpu, kwargs)
        if func in _READS or (func is aten.index.Tensor and _has_mask(args[1])):
            _count("read")
        with torch._C.DisableTorchFunction():
            found = func(*tree_map(_value, args), **tree_map(_value, kwargs))
        if torch.Tag.inplace_view in func.tags:  # unsqueeze_ and the like: its own sizes, too
            with no_dispatch():
                func(*args, **kwargs)
        written = _written(func, args, kwargs)
        if written:  # in place, or into ``out``
            return written[0] if len(written) == 1 else tuple(written)
        return _on(gpu, found)


class PretendedGpu(TorchFunctionMode):
    """In a ``with`` block, "cuda:0", "cuda:1" ... exist; ``waits`` are counted by kind and place.

    ``waits["read", "lib/deq.py:12"]`` is how often that line read from a GPU; "upload" is a copy
    to it that blocks. "elsewhere" are lines that are not of this project.
    """

    active: "PretendedGpu | None" = None

    def __init__(self):
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._called = 0  # how many functions of PyTorch deep Python is

    def __enter__(self):
        PretendedGpu.active = self
        # Parameters stay the same objects, as on a GPU.
        torch.__future__.set_swap_module_params_on_conversion(True)
        # PyTorch leaves the mode while it runs a function that the mode has met.
        self._engine = torch.autograd._engine_run_backward
        torch.autograd._engine_run_backward = self._run_backward
        return super().__enter__()

    def __exit__(self, *error):
        PretendedGpu.active = None
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch.autograd._engine_run_backward = self._engine
        return super().__exit__(*error)

    def again(self) -> TorchFunctionMode:
        """The mode once more: within itself, or in another thread."""
        return _Again(self)

    def count(self, kind: str, path: str = "") -> int:
        """How often the host waited for a reason of that kind, in files of that path."""
        return sum(n for (k, place), n in self.waits.items() if k == kind and path in place)

    def _run_backward(self, roots, *args, **kwargs):
        called, self._called = self._called, 0
        try:
            with self.again(), _FromC(self, roots[0].device):
                return self._engine(roots, *args, **kwargs)
        finally:
            self._called = called

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self._called += 1
        try:
            return self._run(func, args, dict(kwargs or {}))
        finally:
            self._called -= 1

    def _run(self, func, args, kwargs: dict):
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        pretended = isinstance(first, PretendedTensor)
        if pretended and name in ("numpy", "__array__"):
            raise TypeError(f"can't convert {first.gpu} device type tensor to numpy: .cpu() first")
        if pretended and func in _TO_HOST:
            _count("read")
            return func(first.value, *args[1:], **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _move(func, *args, **kwargs)
        if pretended and func is Tensor.new_tensor:
            func, args = torch.tensor, args[1:]
            kwargs.setdefault("device", first.gpu)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        return _make(func, name, args, kwargs)


class _Again(TorchFunctionMode):
    def __init__(self, mode: PretendedGpu):
        super().__init__()
        self._meet = mode.__torch_function__

    def __torch_function__(self, *args, **kwargs):
        return self._meet(*args, **kwargs)


class _FromC(TorchDispatchMode):
    """Within a backward: what C++ makes from nothing, such as zeros for an output without a
    gradient, is on the GPU. What Python makes there is where it says."""

    def __init__(self, mode: PretendedGpu, gpu: torch.device):
        super().__init__()
        self._mode, self._gpu = mode, gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            found = func(*args, **(kwargs or {}))
        from_nothing = not self._mode._called and not _tensors((args, kwargs))
        return _on(self._gpu, found) if from_nothing else found


class _Moved(torch.autograd.Function):
    """A copy on another device, whose gradient goes the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, device: torch.device) -> Tensor:
        ctx.back = x.device
        return _on(device, _value(x).detach().clone())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Moved.apply(grad, ctx.back), None


def _make(func, name: str, args, kwargs: dict):
    """A new tensor on the device that the keyword names."""
    device = _device(kwargs["device"])
    if name.endswith("_like") or name.startswith("new_"):
        args = (_value(args[0]), *args[1:])
    if device.type != "cuda":
        return func(*args, **kwargs)
    _refuse_generator(device, kwargs)
    if func in (torch.tensor, torch.as_tensor):
        _count("upload")
    grad = kwargs.pop("requires_grad", False)
    found = func(*args, **{**kwargs, "device": CPU})
    return _on(device, found).requires_grad_(grad)


def _move(func, x: Tensor, *args, **kwargs) -> Tensor:
    """``x.to(...)``, ``x.cpu()``, ``x.cuda()``."""
    if func is not Tensor.to:
        args = () if func is Tensor.cpu else args
        kwargs["device"] = CPU if func is Tensor.cpu else (*args, kwargs.get("device"), "cuda")[0]
        args = args[1:]
    device, dtype, non_blocking, copy = _request(*args, **kwargs)
    device = x.device if device is None else _device(device)
    with torch._C.DisableTorchFunction():
        if dtype not in (None, x.dtype):
            x = Tensor.to(x, dtype)
        elif copy and device == x.device:
            return x.clone()
    if device == x.device:
        return x
    if x.is_cuda and device == CPU:
        _count("read")
    elif device.type == "cuda" and not non_blocking:
        _count("upload")
    return _Moved.apply(x, device)


def _request(*args, device=None, dtype=None, non_blocking=False, copy=False, **_) -> tuple:
    """What the arguments of ``Tensor.to`` ask for, in any order that it takes."""
    rest = list(args)
    if rest and isinstance(rest[0], Tensor):
        device, dtype = rest[0].device, rest[0].dtype
        rest = rest[1:]
    for kind in (str | torch.device | int, torch.dtype):
        if rest and isinstance(rest[0], kind) and not isinstance(rest[0], bool):
            device, dtype = (device, rest[0]) if kind is torch.dtype else (rest[0], dtype)
            rest = rest[1:]
    non_blocking, copy = (*rest, *(non_blocking, copy)[len(rest) :])
    return device, dtype, non_blocking, copy


def _device(device: torch.device | str | int) -> torch.device:
    """With its number: PyTorch itself knows of no GPU here."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def _value(x):
    return x.value if isinstance(x, PretendedTensor) else x


def _on(device: torch.device, found):
    """What an operation returned, its tensors on that device."""
    if device == CPU:
        return found
    return tree_map(lambda x: PretendedTensor(x, device) if isinstance(x, Tensor) else x, found)


def _has_mask(indices) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _common_device(func, args, kwargs) -> torch.device:
    """The device of all tensors; else an error, as CUDA's."""
    if func is aten.copy_.default:
        _count_copy(*args)
        return args[0].device
    tensors = _tensors((args, kwargs))
    if func in _INDEXING:
        indices = [x for x in _tensors(args[1]) if x.is_cuda]
        tensors = [args[0], *indices, *_tensors(args[2:])]
    if torch.Tag.pointwise in func.tags or func in _INDEXING | _NUMBERS:
        tensors = [x for x in tensors if x.is_cuda or x.dim()]
    devices = dict.fromkeys(x.device for x in tensors)
    if len(devices) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(map(str, devices))}! ({func})"
        )
    return next(iter(devices))


def _tensors(values) -> list[Tensor]:
    return [x for x in tree_flatten(values)[0] if isinstance(x, Tensor)]


def _count_copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> None:
    if source.is_cuda and not target.is_cuda:
        _count("read")
    elif target.is_cuda and not source.is_cuda and not non_blocking:
        _count("upload")


def _refuse_generator(device: torch.device, kwargs) -> None:
    generator = kwargs.get("generator")
    if generator is not None and device != CPU and generator.device == CPU:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _written(func, args, kwargs) -> list[Tensor]:
    """The arguments that an operation writes to and returns."""
    schema = func._schema
    named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    returned = [r.alias_info.before_set for r in schema.returns if _is_write(r)]
    return [
        named[a.name]
        for a in schema.arguments
        if _is_write(a) and a.alias_info.before_set in returned and a.name in named
    ]


def _is_write(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _count(kind: str) -> None:
    """Note that the host waits, under the first line on the stack that is this project's."""
    if PretendedGpu.active is None:
        return
    frame, place = sys._getframe(1), "elsewhere"
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and path != __file__ and "site-packages" not in path:
            place = f"{path.removeprefix(ROOT)}:{frame.f_lineno}"
            break
        frame = frame.f_back
    PretendedGpu.active.waits[kind, place] += 1
