"""Execute notebooks in place, and keep in their files only what a reader needs.

    python scripts/execute_notebooks.py [NOTEBOOK ...]

Without names, all notebooks of docs/notebooks are executed. A cell that fails is one line, and the
file stays as it was. Times, the machine and the program that wrote the file are dropped, so that
a second run changes only the outputs that depend on the clock or on rounding.
"""

import sys
from pathlib import Path

try:
    import matplotlib.font_manager
    import nbformat
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbformat import NotebookNode
    from nbformat.reader import NotJSONError

    from lib.errors import InputError
    from lib.runs.atomic_files import atomic_write
    from lib.runs.command_line import Parser, exit_code
except KeyboardInterrupt:  # the imports take seconds
    sys.exit(130)

FOLDER = Path(__file__).resolve().parents[1] / "docs/notebooks"
KEPT = ("mystnb", "tags")  # of a cell's metadata: alternative text, and what the tests need
MALFORMED = (UnicodeDecodeError, AttributeError, KeyError, TypeError)  # nbformat passes these on
SECONDS = 600  # for one cell; a notebook as committed takes less than two minutes in all


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return exit_code("execute_notebooks.py", lambda: run(argv))


def run(argv: list[str] | None = None) -> None:
    """Execute and write the notebooks that the command line names."""
    parser = Parser(
        prog="execute_notebooks.py",
        description="Execute notebooks in place, and drop what differs from run to run.",
    )
    parser.add_argument("notebook", nargs="*", help="files (default: all of docs/notebooks)")
    args = parser.parse_args(argv)
    for path in chosen(args.notebook):
        text = nbformat.writes(executed(path))
        with atomic_write(path) as file:
            file.write(text.encode() + b"\n")
        print(f"{path.name}: {len(text) / 1000:.0f} kB", flush=True)


def chosen(names: list[str]) -> list[Path]:
    """The files that a command line names; without names, all notebooks of the documentation."""
    return [Path(name) for name in names] or sorted(FOLDER.glob("*.ipynb"))


def executed(path: Path) -> NotebookNode:
    """The notebook with the outputs of a new kernel, which runs in the notebook's folder.

    Raises:
        InputError: the file is no notebook, a cell failed, or the kernel did not start or died.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (NotJSONError, nbformat.ValidationError, *MALFORMED) as error:
        raise InputError(f"{path} is no notebook: give a file that Jupyter wrote") from error
    _ = matplotlib.font_manager.fontManager  # here: a kernel would report that it builds the list
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.resolve().parent)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # without advice on how to encrypt loopback
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise InputError(f"{path}: a cell failed: {error.ename}: {error.evalue}") from error
    except CellTimeoutError as error:
        raise InputError(f"{path}: a cell ran for more than {SECONDS} s") from error
    except (NoSuchKernel, DeadKernelError) as error:
        raise InputError(
            f"{path}: the kernel does not run ({error}): reinstall ipykernel"
        ) from error
    return clean(notebook)


def clean(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what depends on the run or on the machine."""
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in KEPT})
        if cell.cell_type == "code":
            cell.outputs = [_cleaned(output, cell) for output in _joined(cell.outputs)]
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Text of the same stream in one piece: how it was cut depends on the clock."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _cleaned(output: NotebookNode, cell: NotebookNode) -> NotebookNode:
    """A picture without its Python name, and with the alternative text of its cell."""
    if "image/png" in output.get("data", {}):
        output.data = NotebookNode({"image/png": output.data["image/png"]})
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        output.metadata = NotebookNode({"image/png": {"alt": alt}})
    return output


if __name__ == "__main__":
    raise SystemExit(main())
