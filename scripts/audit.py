"""Is the model of a run an equilibrium? Five findings and a verdict.

    python scripts/audit.py RUN_FOLDER

The run may be of words, state tracking or images. Its own settings and best weights are read, and
its test data. The report is printed, and written to audit.json in the run's folder (--out:
elsewhere).
"""

import sys
from pathlib import Path

try:
    import torch

    from lib.errors import check_count
    from lib.runs.command_line import Parser, exit_code
    from run_folder_reports import keep, module_for, refuse_existing
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return exit_code("audit.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> None:
    """Audit the run that the command line names."""
    parser = Parser(prog="audit.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="where a run's files lie")
    parser.add_argument("--samples", type=int, default=100, help="of test data (100)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="in place of audit.json there")
    args = parser.parse_args(argv)
    check_count("--samples", args.samples)
    refuse_existing(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    audits = module_for(args.folder, "audits")
    report = audits.audit_run(args.folder, args.samples, device)
    keep(report, args.out or args.folder / "audit.json")


if __name__ == "__main__":
    sys.exit(main())
