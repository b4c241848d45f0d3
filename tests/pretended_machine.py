"""A machine with pretended GPUs: what ``torch.cuda`` and the C++ side of DataParallel are there.

PyTorch's own ``replicate``, ``parallel_apply`` and ``gather`` run in it, threads and all.
"""

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.nn.parallel import _functions, comm

from pretended_gpu import PretendedGpu


@contextlib.contextmanager
def pretended_machine(gpus: int = 2) -> Iterator[PretendedGpu]:
    """In a ``with`` block, this machine has so many GPUs, and "cuda" has autocast."""
    mode = PretendedGpu()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        for owner, replaced in (
            (torch.cuda, _cuda(gpus)),
            (torch.cuda.nccl, {"is_available": lambda tensors: False}),
            (torch.cuda.amp.common, {"amp_definitely_not_available": lambda: False}),
            (torch.accelerator, _accelerator(mode)),
            (torch, _autocast()),
            (torch._C, {"_broadcast_coalesced": _broadcast, "_gather": _gather,
                        "_scatter": _scatter}),
            (_functions.Broadcast, {"backward": staticmethod(_broadcast_backward)}),
        ):  # fmt: skip
            for name, value in replaced.items():
                stack.enter_context(patch.object(owner, name, value, create=True))
        yield mode


def _cuda(gpus: int) -> dict:
    generators = [torch.Generator().manual_seed(i) for i in range(gpus)]
    current = threading.local()

    def number(device) -> int:
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return getattr(current, "device", 0) if index is None else index

    return {
        "is_available": lambda: True,
        "device_count": lambda: gpus,
        "current_device": lambda: getattr(current, "device", 0),
        "set_device": lambda device: setattr(current, "device", number(device)),
        "get_device_properties": lambda device: SimpleNamespace(
            total_memory=2**34, multi_processor_count=100, major=9
        ),
        "Stream": lambda device=None: _Stream(),
        "current_stream": lambda device=None: _Stream(),
        "stream": contextlib.nullcontext,
        "is_current_stream_capturing": lambda: False,
        "max_memory_allocated": lambda *_: 0,
        "is_bf16_supported": lambda *_: True,
        "get_rng_state": lambda device="cuda": generators[number(device)].get_state(),
        "set_rng_state": lambda state, device="cuda": generators[number(device)].set_state(state),
    }


def _accelerator(mode: PretendedGpu) -> dict:
    return {
        "is_available": lambda: True,
        "current_accelerator": lambda **_: torch.device("cuda"),
        "current_stream": lambda device=None: _Stream(),
        # parallel_apply enters it in every thread, where no mode is active yet.
        "device_index": lambda device: mode.again(),
    }


class _Stream(contextlib.nullcontext):
    """All is computed at once here: there is nothing to wait for."""

    def is_capturing(self) -> bool:
        return False

    def record_event(self) -> None:
        pass

    def wait_event(self, event) -> None:
        pass


def _autocast() -> dict:
    """Autocast of "cuda" by that of the CPU, which casts to the same formats.

    As there, each thread has its own switch, and its own dtype: float16 at first.
    """
    enabled, switch = torch.is_autocast_enabled, torch.set_autocast_enabled
    set_dtype, get_dtype = torch.set_autocast_dtype, torch.get_autocast_dtype
    own = threading.local()

    def set_own(kind: str, dtype: torch.dtype) -> None:
        if kind == "cuda":
            own.dtype = dtype
        set_dtype("cpu" if kind == "cuda" else kind, dtype)

    def get_own(kind: str) -> torch.dtype:
        return getattr(own, "dtype", torch.float16) if kind == "cuda" else get_dtype(kind)

    return {
        "is_autocast_enabled": lambda kind="cuda": enabled("cpu" if kind == "cuda" else kind),
        "set_autocast_enabled": lambda kind, on: switch("cpu" if kind == "cuda" else kind, on),
        "get_autocast_dtype": get_own,
        "set_autocast_dtype": set_own,
    }


def _on(tensor: torch.Tensor, number: int) -> torch.Tensor:
    return tensor.detach().to(torch.device("cuda", number), non_blocking=True)


def _broadcast(tensors, devices, buffer_size):
    if any(t.get_device() != devices[0] for t in tensors):
        raise RuntimeError(f"All tensors must be on devices[0]: {devices[0]}")
    return [list(tensors), *([_on(t, d) for t in tensors] for d in devices[1:])]


def _broadcast_backward(ctx, *grads, backward=_functions.Broadcast.backward):
    """Zeros, for a replica that nothing came from, are made by C++, which says another device."""
    count = ctx.num_inputs
    placed = [_on(grad, ctx.target_gpus[i // count]) for i, grad in enumerate(grads)]
    return backward(ctx, *placed)


def _gather(tensors, dim, destination):
    return torch.cat([_on(t, destination) for t in tensors], dim)


def _scatter(tensor, devices, sizes, dim, streams):
    parts = torch.split(tensor, sizes, dim)
    return tuple(_on(part, d) for part, d in zip(parts, devices, strict=True))


assert comm.broadcast_coalesced.__globals__["torch"]._C is torch._C  # whose names are replaced
