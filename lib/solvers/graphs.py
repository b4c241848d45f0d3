"""CUDA graphs of f and of products with its Jacobian: recorded once, then started by one call.

A small f is done before the host has started its next kernels, and the GPU waits. A graph repeats
an evaluation's kernels on the same memory. So inputs are copied there: z for each evaluation, and
the tensors of ``f.source`` (:mod:`lib.solvers.maps`), weights and masks among them, once per solve.
What autograd records runs as ever: f(z*), the Jacobian loss.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lib.errors import DEQWarning
from lib.solvers.maps import Map, plain, vjp

MOST = 16  # graphs of one DEQ: each shape has its own, with memory of its own


def record(function: Callable[[], None], pool) -> Callable[[], None]:
    """A function that repeats the kernels of ``function``, which must not wait for the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # at first, libraries choose algorithms and make workspaces
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: the thread that pins memory for a DataLoader may go on.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph.replay


class Graphs:
    """The graphs of one DEQ. A copy records its own.

    Where no graph is possible, f runs without one, and a DEQWarning says why, once.
    """

    def __init__(self, recorder: Callable | None = None):
        self._recorder, self._pool, self._said = recorder, None, False
        self._forms: dict[tuple, _Form | None] = {}

    def __reduce__(self):
        return Graphs, (self._recorder,)

    def of(self, f: Map) -> Map:
        """f, or a :class:`Graphed` f."""
        build, held = getattr(f, "source", lambda: (None, None))()
        owner = getattr(build, "__self__", None)
        modules = [*owner.modules()] if isinstance(owner, torch.nn.Module) else []
        leaves, spec = tree_flatten(held)
        tensors = [t.detach() for t in leaves if isinstance(t, Tensor)]
        if build is None:
            return self.without(f, "f has no source (lib.solvers.maps)")
        if self._recorder is None and not all(t.is_cuda for t in tensors):
            return self.without(f, "this is no GPU")
        if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
            return self.without(f, "f has a hook")
        if getattr(owner, "_is_replica", False):
            return self.without(f, "DataParallel makes a new f each time")
        return Graphed(self, f, build, tensors, (leaves, spec))

    def without(self, f, reason: object):
        """f, after a warning that says why it has no graph."""
        if not self._said:
            self._said = True
            said = next(iter(str(reason).splitlines()), type(reason).__name__)
            warnings.warn(f"no CUDA graph ({said}): f runs without", DEQWarning, stacklevel=5)
        return f

    def form(self, key: tuple, inputs: list[Tensor], steps: list[Callable]) -> "_Form | None":
        """The graphs of ``steps`` for inputs of these shapes; None if there are none."""
        kind = inputs[0].device.type
        key += torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        key += tuple((t.shape, t.dtype, t.device) for t in inputs)
        if key not in self._forms:
            self._forms[key] = None
            if len(self._forms) > MOST:
                return self.without(None, f"more than {MOST} shapes")
            try:
                self._forms[key] = _Form(inputs, steps, self._record)
            except Exception as error:  # CUDA refuses in many ways
                self.without(None, error)
        return self._forms[key]

    def _record(self, function: Callable[[], None]) -> Callable[[], None]:
        if self._recorder is not None:
            return self._recorder(function)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return record(function, self._pool)


class _Form:
    """Graphs of ``steps``, one after another, on own copies of ``inputs``.

    A step takes the inputs and returns tensors; the last one's are the result.
    """

    def __init__(self, inputs: list[Tensor], steps: list[Callable], recorder: Callable):
        self._user: object = None  # whose fixed inputs these are
        self._steps = steps  # their closures keep tensors between steps
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(inputs[0]):
            self._inputs = [t.detach().clone() for t in inputs]
            self._replays = [recorder(lambda step=step: self._take(step)) for step in steps]

    def _take(self, step: Callable) -> None:
        self._found = step(self._inputs)

    def __call__(self, user: object, fixed: list[Tensor], moving: list[Tensor]) -> list[Tensor]:
        """The result for these inputs. Of one user, the fixed ones are copied once."""
        n = len(fixed)
        if self._user is not user:
            self._user = user
            torch._foreach_copy_(self._inputs[:n], fixed)
            for replay in self._replays[:-1]:
                replay()
        torch._foreach_copy_(self._inputs[n:], moving)
        self._replays[-1]()
        return [t.clone() for t in self._found]


class Graphed:
    """f, from a graph where autograd does not record."""

    def __init__(self, graphs: Graphs, f: Map, build: Callable, tensors: list[Tensor], tree):
        self._graphs, self._f, self._build, self._tensors = graphs, f, build, tensors
        leaves, spec = tree
        places = [isinstance(t, Tensor) for t in leaves]
        others = [None if tensor else leaf for tensor, leaf in zip(places, leaves, strict=True)]
        self._key = build, str(spec), str(others)

        def made(inputs: list[Tensor]) -> Map:
            found = iter(inputs)
            parts = [next(found) if place else o for place, o in zip(places, others, strict=True)]
            return build(tree_unflatten(parts, spec))

        self._made, self._known, self._user = made, {}, object()
        self.plain = plain(f)
        if hasattr(f, "select"):
            self.select = f.select

    def __call__(self, z):
        if torch.is_grad_enabled():
            return self._f(z)
        single, made, n = isinstance(z, Tensor), self._made, len(self._tensors)
        parts = [z] if single else [*z]

        def value(inputs: list[Tensor]) -> list[Tensor]:
            found = made(inputs)(inputs[n] if single else inputs[n:])
            return [found] if single else [*found]

        kind = parts[0].device.type
        key = single, torch.is_autocast_enabled(kind), *((t.shape, t.dtype) for t in parts)
        if key not in self._known:
            inputs = [*self._tensors, *parts]
            self._known[key] = self._graphs.form((*self._key, single), inputs, [value])
        form = self._known[key]
        if form is None:
            return self._f(z)
        found = form(self._user, self._tensors, parts)
        return found[0] if single else found

    def product(self, point: Tensor, fz: Tensor, change: Callable = lambda f: f) -> Map | None:
        """v -> J'v at ``point`` for J of ``change(f)``; None without a graph."""
        made, n = self._made, len(self._tensors)
        at = image = point

        def linearise(inputs: list[Tensor]) -> list[Tensor]:
            nonlocal at, image
            with torch.enable_grad():
                at = inputs[n].detach().requires_grad_()
                image = change(made(inputs))(at)
            return []

        def multiply(inputs: list[Tensor]) -> list[Tensor]:
            return [vjp(image, at, inputs[n + 1])]

        fixed, user = [*self._tensors, point.detach()], object()
        form = self._graphs.form((*self._key, "product"), [*fixed, fz], [linearise, multiply])
        # The result holds neither f nor the graph of f(z*), which may hold the caller.
        return None if form is None else lambda v: form(user, fixed, [v])[0].to(v.dtype)
