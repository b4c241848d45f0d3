"""Do several processes compute what one does? Trains all models both ways, and prints a table.

    PYTHONPATH=tests python tests/scale/same_losses.py [--steps 50] [--models words digits scenes]

1, 2 and 4 processes (gloo, a CPU thread each) share the same batches of the embedded text, the
digits and the digit scenes; half of the steps are stacked, half at equilibrium. All is computed in
float64 with tight solves (see cases.py): beside rounding there must be no difference. Exit code 1
if there is one. The commands as shipped, in float32, are in shipped_losses.py.
"""

import argparse
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "vision"))  # under pytest it is there already

from cases import BATCH, Case, Found, difference, largest, make_trainer, train
from groups import run_group, work
from lib.deq import DEQWarning
from lib.runs.processes import Processes

ROOT = Path(__file__).parents[2]
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-6
WORLD_SIZES = (2, 4)
MODELS = ("words", "digits", "scenes")
ADAPTIVE = ("--adaptive", "--div_val", "2", "--cutoffs", "500", "2000")
UNEQUAL = "2 parts, as they come"  # the one variant in which batch norm sees other groups


def variants(model: str, steps: int) -> list[Case]:
    """The runs of a model that are compared."""
    cases = [
        Case(model),
        Case(model, "Jacobian loss", jacobian=True),
        Case(model, "batch of 6", batch=6),  # over 4 processes: 2, 2, 1, 1
    ]
    if model == "words":
        cases += [
            Case(model, "2 parts", chunk=2),
            Case(model, "clusters", more=ADAPTIVE),
            Case(model, "clipped", more=("--clip", "0.25")),
        ]
    else:
        cases += [
            Case(model, "2 parts, same groups", chunk=2),
            Case(model, "2 parts, frozen norm", chunk=2, frozen=True),
            Case(model, UNEQUAL, chunk=2),
        ]
    return [replace(case, steps=steps) for case in cases]


def reference(case: Case, world_size: int) -> Case:
    """What one process has to compute to be compared."""
    return replace(case, grouped=world_size) if case.name.endswith("same groups") else case


def comparison(found: Found, expected: Found, border: int) -> dict[str, float]:
    """The largest differences between two runs."""
    return {
        "stacked": largest(found.losses[:border], expected.losses[:border]),
        "equilibrium": largest(found.losses[border:], expected.losses[border:]),
        "gradient": difference(found.grads, expected.grads),
        "validation": largest(found.valid, expected.valid),
        "weights": difference(found.state, expected.state),
        "residual": max(found.residual, expected.residual),
    }


def run_cases(processes: Processes, data: str, cases: list[Case]) -> dict[Case, Found]:
    """Train all cases, one after another; all processes must end with the same bits."""
    warnings.simplefilter("ignore", DEQWarning)
    results = {}
    for case in cases:
        found = train(make_trainer(case, processes, data))
        states = processes.gather(found.state)
        for state in states[1:]:
            assert all(torch.equal(state[name], value) for name, value in states[0].items())
        results[case] = found
    return results


def child(processes: Processes, data: str, file: str) -> dict[Case, Found] | None:
    """What a process of a group does; one copy of the result is enough."""
    found = run_cases(processes, data, torch.load(file, weights_only=False))
    return found if processes.leads else None


def in_processes(folder: Path, world_size: int, data: str, cases: list[Case], server=None):
    """What ``world_size`` processes find."""
    file = folder / f"cases{world_size}.pt"
    torch.save(cases, file)
    place = folder / f"group{world_size}"
    return run_group(__file__, world_size, place, data, str(file), server=server)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="half of them stacked")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--data", default=str(ROOT / "DEQ-Sequence/data/demo"))
    args = parser.parse_args()
    print(f"float64, batch of {BATCH}, {args.steps} steps; differences are relative to 1 process")
    print("Batch norm sees a part of a batch at a time. 'same groups': one process gets the parts "
          "of several;\n'as they come': it has its own, which is another computation.")  # fmt: skip
    print("model | variant | processes | stacked | equilibrium | gradient | validation | weights "
          "| worst residual | seconds")  # fmt: skip
    good = True
    for model in args.models:
        cases = variants(model, args.steps)
        alone = dict.fromkeys(reference(c, n) for c in cases for n in WORLD_SIZES)
        with tempfile.TemporaryDirectory() as folder:
            expected = in_processes(Path(folder), 1, args.data, list(alone))
            for world_size in WORLD_SIZES:
                start = time.monotonic()
                found = in_processes(Path(folder), world_size, args.data, cases)
                seconds = (time.monotonic() - start) / len(cases)
                for case in cases:
                    row = comparison(
                        found[case], expected[reference(case, world_size)], args.steps // 2
                    )
                    figures = " | ".join(f"{value:.1e}" for value in row.values())
                    print(f"{model} | {case.name} | {world_size} | {figures} | {seconds:.0f}",
                          flush=True)  # fmt: skip
                    good &= case.name == UNEQUAL or equal(row)
    print("all equal" if good else "NOT EQUAL")
    return 0 if good else 1


def equal(row: dict[str, float]) -> bool:
    """Whether the requirement is met."""
    losses = max(row["stacked"], row["equilibrium"], row["validation"])
    return losses <= LOSS_TOLERANCE and row["gradient"] <= GRADIENT_TOLERANCE


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[1].isdigit():
        work(child, sys.argv[1:])
    else:
        sys.exit(main())
