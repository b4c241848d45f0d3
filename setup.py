"""Packages: see pyproject.toml for all else. The wheel holds `lib`.

The trainers `deq_sequence` and `mdeq_vision` are run in a clone: their commands, experiments and
data scripts lie there. An editable install (``pip install -e .``) puts all three on the path.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

ROOMS = (".", "DEQ-Sequence", "MDEQ-Vision")


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
    packages=find_packages(include=["lib", "lib.*"]),
    package_data={"lib": ["py.typed"]},
    cmdclass={"editable_wheel": PathEntryEditable},
)
