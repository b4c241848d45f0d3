"""Faster forms of f: compiled by torch.compile, or CUDA graphs of f and of its products J'v.

A small f is done before the host has started its next kernels, and the GPU waits. A CUDA graph is
started by one call. It repeats kernels on the same memory: z is copied there for each evaluation,
the tensors of ``f.source`` (:mod:`lib.solvers.maps`) once per solve. What autograd records runs as
ever.
"""

import warnings
from collections.abc import Callable
from functools import cache, reduce

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lib.errors import DEQWarning, InputError
from lib.solvers.maps import Map, plain, vjp

MOST = 16  # shapes; the graphs of each have their own memory

# Most compiled forms of one function. PyTorch's own limit is 8: further shapes would stay
# uncompiled, with only a warning.
MAX_FORMS = 64


class Graphs:
    """The graphs of one DEQ. Without one f runs, and a DEQWarning says why.

    Each is of steps, functions of the inputs (fixed, moving); the last one gives the result.
    """

    kind = "cuda"

    def __init__(self):
        self._forms: dict[tuple, Callable | None] = {}

    def __reduce__(self):
        return type(self), ()  # a copy records its own

    @staticmethod
    def record(function: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats the kernels of ``function``, which must not wait for the GPU."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # first calls choose algorithms and make workspaces
            function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins memory for a DataLoader may go on.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
        return graph.replay

    def of(self, f: Map) -> Map:
        """f, from graphs where autograd does not record; with ``product``."""
        build, held = getattr(f, "source", lambda: (None, None))()
        if build is None:
            warnings.warn("no CUDA graph: f has no source", DEQWarning, stacklevel=4)
            return f
        held = tree_map_only(Tensor, Tensor.detach, held)
        key, user = (build, _shapes(held)), object()

        def graphed(z):
            steps = [lambda inputs: build(inputs[0])(inputs[1])]
            form = None if torch.is_grad_enabled() else self._form(key, (held, z), steps)
            return form(user, held, z) if form else f(z)

        def product(point: Tensor, fz: Tensor, *changes: Callable[[Map], Map]) -> Map | None:
            """v -> J'v at ``point``, for f with the changes of ``transformed``, the last first."""
            linear: list[Tensor] = []  # f at the point, and the point

            def linearise(inputs):
                with torch.enable_grad():
                    at = inputs[0][1].detach().requires_grad_()
                    form = reduce(lambda f, change: change(f), changes[::-1], build(inputs[0][0]))
                    linear[:] = form(at), at

            fixed, user = (held, point.detach()), object()
            steps = [linearise, lambda inputs: vjp(linear[0], linear[1], inputs[1])]
            form = self._form((*key, "J"), (fixed, fz.detach()), steps)
            # This holds neither f nor the graph of f(z*), which may hold the caller.
            return form and (lambda v: form(user, fixed, v))

        graphed.plain, graphed.product = plain(f), product
        if hasattr(f, "select"):
            graphed.select = f.select
        return graphed

    def _form(self, key: tuple, inputs: tuple, steps: list[Callable]) -> Callable | None:
        key += torch.is_autocast_enabled(self.kind), _shapes(inputs[1])
        if key not in self._forms:
            self._forms[key] = None
            try:
                if {t.device.type for t in _tensors(inputs)} != {self.kind}:
                    raise RuntimeError("f is on no GPU")
                if len(self._forms) > MOST:
                    raise RuntimeError(f"f has more than {MOST} shapes")
                self._forms[key] = self._recorded(inputs, steps)
            except Exception as error:  # CUDA refuses in many ways
                said = str(error).partition("\n")[0]
                warnings.warn(f"no CUDA graph: {said}", DEQWarning, stacklevel=5)
        return self._forms[key]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _recorded(self, inputs: tuple, steps: list[Callable]) -> Callable:
        own = tree_map_only(Tensor, Tensor.clone, inputs)
        fixed_here, moving_here = map(_tensors, own)
        expected = [step(own) for step in steps][-1]
        found = [None] * len(steps)
        last = None  # whose fixed inputs are copied

        def take(i: int) -> Callable[[], None]:
            def run():
                found[i] = steps[i](own)

            with torch.cuda.device_of(moving_here[0]):
                return self.record(run)

        *first, newest = [take(i) for i in range(len(steps))]
        for t in _tensors(found[-1]):
            t.zero_()  # for the replay below to write to

        @torch.no_grad()
        def replayed(user, fixed, moving):
            nonlocal last
            if last is not user:
                last = user
                _copy(fixed_here, fixed)
                for replay in first:
                    replay()
            _copy(moving_here, moving)
            newest()
            return tree_map_only(Tensor, Tensor.clone, found[-1])

        torch.testing.assert_close(replayed(own, *inputs), expected, rtol=0.01, atol=0.01)
        return replayed


def _tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _copy(to: list[Tensor], tree) -> None:
    torch._foreach_copy_(to, _tensors(tree))  # pyright: ignore[reportPrivateImportUsage]


def _shapes(tree) -> str:
    return str(tree_map_only(Tensor, lambda t: (t.shape, t.dtype), tree))


def compiled(function: Callable, device: torch.device | str = "cpu") -> Callable:
    """``function`` compiled by torch.compile, after a check that this works on ``device``.

    All tensors that ``function`` uses should be its arguments: then only new shapes are compiled
    again.

    Sizes are constants. Otherwise earlier shapes would decide which become variables, and so the
    rounding: a resumed run would not repeat an uninterrupted one.

    Raises:
        InputError: torch.compile does not work here, for example without a C++ compiler.
    """
    _try_compiler(torch.device(device).type)
    for name in ("recompile_limit", "cache_size_limit"):  # new and old name in PyTorch
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, MAX_FORMS)
            break
    return torch.compile(function, dynamic=False)


@cache
def _try_compiler(device: str) -> None:
    x = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: (x + 1).sin())(x)
    except Exception as error:  # a failing compiler can raise anything
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"torch.compile does not work here ({first[0]}): install a C++ compiler such as g++, "
            "or switch compilation off"
        ) from error
