"""Write the weights of a run, or of a file of weights, as a .safetensors or plain .pt file.

    python scripts/export_weights.py SOURCE TARGET

SOURCE is model.pt or checkpoint.pt of either trainer, a published file, or a .safetensors file.
TARGET ends in .safetensors or .pt. Every command that loads weights reads both formats.
"""

import sys

from lib.runs.command_line import Parser, exit_code
from lib.runs.export import export_file


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return exit_code("export_weights.py", lambda: run(argv), "calling it again")


def run(argv: list[str] | None = None) -> None:
    """Export the weights that the command line names."""
    parser = Parser(prog="export_weights.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="model.pt, checkpoint.pt or .safetensors")
    parser.add_argument("target", help="file to write: .safetensors, or .pt")
    args = parser.parse_args(argv)
    names = export_file(args.source, args.target)
    print(f"{args.target}: {len(names)} tensors of {args.source}")


if __name__ == "__main__":
    sys.exit(main())
