"""Every gradient in every mode of autograd; a solve under torch.compile and checkpointing.

    python scripts/benchmarks/bench_modes.py

f(z) = z / 2 + x has z* = 2 x and dz*/dx = 2. The first table uses the defaults (except for shine,
which needs Broyden's method). It shows the gradient that backward gives; or "value", if autograd
does not record and the value is right; or the error message. The other tables are for a model of
a linear injection, an equilibrium and a head. They show the number of graphs, the seconds per
training step (eager and compiled steps alternate), and the evaluations of f in a step with and
without torch.utils.checkpoint.
"""

import statistics
import sys
import warnings

import torch
from helpers.arguments import Parser, write_json
from helpers.measure import describe_machine, in_turns, seconds, table
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lib.deq import DEQ
from lib.runs.command_line import exit_code

GRADS = ("ift", "ift:order=2", "shine", "jfb", "phantom", "phantom:form=neumann", "reversible",
         "unroll")  # fmt: skip
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def cell(grad: str, mode: str, training: bool) -> str:
    """The table cell of one gradient in one mode."""
    deq, x = DEQ("broyden" if grad == "shine" else "anderson", grad=grad), torch.ones(1, 3)
    with MODES[mode](), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            x.requires_grad_()
            z = deq(lambda z: 0.5 * z + x, torch.zeros(1, 3), training=training).z
            if mode != "grad":
                return "value" if (z - 2).abs().max() < 0.01 else f"WRONG VALUE {z[0, 0]:.3g}"
            z.sum().backward()
        except Exception as error:  # the table shows any error
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"{x.grad[0, 0]:.3f}"


class Model(nn.Module):
    """A linear injection u, the fixed point of tanh(W z + u), a linear head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.head = nn.Linear(8, 64), nn.Linear(64, 4)
        self.weight = nn.Parameter(torch.randn(64, 64) / 16)
        self.deq, self.evaluations = DEQ("anderson"), 0

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)

        def f(z: Tensor) -> Tensor:
            self.evaluations += 1
            return torch.tanh(z @ self.weight.T + u)

        return self.head(self.deq(f, u.new_zeros(len(x), 64)).z)


def step(forward, x: Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    return seconds(lambda: forward(x).square().mean().backward(), x.device)


def compiled(rounds: int) -> list[list]:
    """Count graphs; take median seconds per step, eager and compiled."""
    model, x = Model(), torch.randn(64, 8)
    counter = CompileCounter()
    step(torch.compile(model, backend=counter), x)
    torch._dynamo.reset()
    fast = torch.compile(model)
    first = step(fast, x)
    step(model, x)
    forms, times = {"eager": model, "quick": fast}, {"eager": [], "quick": []}
    for _, name in in_turns(forms, rounds):
        times[name].append(step(forms[name], x))
    eager, quick = map(statistics.median, times.values())
    return [[counter.frame_count, f"{first:.1f}", f"{eager:.4f}", f"{quick:.4f}",
             f"{quick / eager:.2f}"]]  # fmt: skip


def checkpointed() -> list[list]:
    """Count evaluations of f in a step, plain and with checkpointing around the model."""
    found = []
    for name, options in (("plain", None), ("use_reentrant=False", False), ("True", True)):
        model, x = Model(), torch.randn(64, 8, requires_grad=True)
        forward = model if options is None else (
            lambda x, model=model, options=options: checkpoint(model, x, use_reentrant=options)
        )  # fmt: skip
        step(forward, x)
        found.append([name, model.evaluations, model.deq.stats.forward.solves])
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    return exit_code("bench_modes.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> None:
    """Print all tables; the models are on the CPU."""
    description = __doc__.partition("\n")[0]
    parser = Parser(prog="bench_modes.py", description=description, least={"rounds": 1})
    parser.add_argument("--rounds", type=int, default=21, help="timed steps of each kind")
    args = parser.parse_args(argv)
    print(describe_machine(torch.device("cpu")) + "\n")
    columns = [(mode, training) for mode in MODES for training in (True, False)]
    head = [f"{mode}, {'train' if training else 'eval'}" for mode, training in columns]
    modes = [[grad, *(cell(grad, *column) for column in columns)] for grad in GRADS]
    print(table(["gradient", *head], modes) + "\n")
    head = ["graphs", "first step, s", "eager, s", "compiled, s", "ratio"]
    times = compiled(args.rounds)
    print(table(head, times) + "\n")
    evaluations = checkpointed()
    print(table(["checkpoint", "evaluations of f", "forward solves"], evaluations))
    write_json(args.json, {"modes": modes, "compiled": times, "checkpointed": evaluations})


if __name__ == "__main__":
    sys.exit(main())
