"""What do the evaluations of f in training pay for? Loss and gradient with fewer and with more.

    python scripts/evaluations.py RUN_FOLDER

The run may be of words, state tracking or images, finished or not. For some batches of its training
data, its loss and its own gradient are compared with those at the exact fixed point. The report is
printed, and written to evaluations.json in the run's folder (--out: elsewhere).
"""

import sys
from pathlib import Path

try:
    import torch

    from gradient_errors import measure
    from lib.errors import check_count
    from lib.runs.command_line import Parser, exit_code
    from lib.runs.run_folder import WEIGHTS
    from run_folder_reports import keep, module_for, refuse_existing
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return exit_code("evaluations.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> None:
    """Report the run that the command line names."""
    parser = Parser(prog="evaluations.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN_FOLDER", help="where a run's files lie")
    add("--batches", type=int, default=4, help="of training data, at least 2 (4)")
    add("--weights", metavar="NAME", default=WEIGHTS, help=f"such as checkpoint.pt ({WEIGHTS})")
    add("--out", type=Path, metavar="FILE", help="in place of evaluations.json there")
    args = parser.parse_args(argv)
    check_count("--batches", args.batches, least=2)
    refuse_existing(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    finished = module_for(args.folder, "finished_run")
    weights = args.folder / args.weights
    report = measure(*finished.training_of(args.folder, weights, args.batches, device))
    keep(report, args.out or args.folder / "evaluations.json")


if __name__ == "__main__":
    sys.exit(main())
