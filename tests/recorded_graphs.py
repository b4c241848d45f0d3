"""CUDA graphs without a GPU: the operations of a recording, on the same memory at each replay."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.graphs import Graphs


class Recorder(TorchDispatchMode):
    """Notes each operation, what it read, and the tensors whose memory it made."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        read = {_memory(t) for t in _tensors((args, kwargs))}
        made = [None if _memory(t) in read else t for t in _tensors(out)]
        self.calls.append((op, args, kwargs or {}, made))
        return out


class OnCpu(Graphs):
    """Records and replays as CUDA does; counts replays.

    A replay runs no line of Python of f. Each operation reads and writes the memory of the
    recording: a tensor that somebody keeps changes with the next replay. Numbers of a recording
    are not computed: they are NaN until the first replay. Unlike on a GPU, memory that f frees
    inside a recording is not used again.
    """

    kind = "cpu"

    def __init__(self):
        super().__init__()
        self.recorded, self.replays = 0, []

    def record(self, function):
        function()
        with Recorder() as recorder:
            function()
        number, calls = self.recorded, recorder.calls
        self.recorded += 1
        for *_, made in calls:
            for t in made:
                if t is not None and t.is_floating_point():
                    t.data.fill_(torch.nan)  # data: autograd must not see a change

        @torch.no_grad()
        @torch.autocast("cpu", enabled=False)  # the operations have been cast already
        def replay():
            self.replays.append(number)
            for op, args, kwargs, made in calls:
                again = _tensors(op(*args, **kwargs))
                for to, t in zip(made, again, strict=True):
                    if to is not None:
                        to.data.copy_(t)

        return replay


def check_steps(build, *, amp: bool) -> None:
    """Training steps from a recording give the bits of steps without, as the weights change.

    ``build()`` gives a model and its forward pass, step -> loss.
    """

    def run(graphs) -> list[Tensor]:
        model, forward = build()
        model.deq.graphs, found = graphs, []
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for step in range(3):
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = forward(step)
            optimizer.zero_grad()
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
            optimizer.step()
        return found

    expected, found = run(None), run(graphs := OnCpu())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert graphs.replays
    assert None not in graphs._forms.values()


def _tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
