"""Packaging: `lib` from the repository root, `deq_sequence` and `mdeq_vision` from their rooms."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

ROOMS = {".": "lib", "DEQ-Sequence": "deq_sequence", "MDEQ-Vision": "mdeq_vision"}


class PathEntryEditable(editable_wheel):
    """An editable install that puts the rooms on ``sys.path`` (a .pth file).

    With packages in several folders setuptools would install an import hook instead. Python asks
    it only after the path, where any folder named ``lib`` already passes for a namespace package:
    ``/lib``, for one, when the current folder is ``/``. A package with an ``__init__.py`` on a
    path entry beats such a folder, wherever the two stand on the path.
    """

    def _select_strategy(self, name, tag, build_lib):
        # Private, hence the exact setuptools in pyproject.toml. Imported here, so that a regular
        # install needs public names only.
        from setuptools.command.editable_wheel import _StaticPth

        return _StaticPth(self.distribution, name, [Path(room) for room in ROOMS])


setup(
    name="deep-equilibrium-models",
    version="0.1.0",
    description="Deep equilibrium models for language and vision, in PyTorch",
    license="MIT",
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy",
        "tqdm",
        "tensorboardX",
        "matplotlib",
        "pillow",
        "yacs",
        "torchinfo",
        "scikit-learn",  # the handwritten digits
        "safetensors",
    ],
    packages=[
        package
        for room, top in ROOMS.items()
        for package in find_packages(room, include=[top, f"{top}.*"])
    ],
    package_dir={top: f"{room}/{top}" for room, top in ROOMS.items()},
    cmdclass={"editable_wheel": PathEntryEditable},
)
