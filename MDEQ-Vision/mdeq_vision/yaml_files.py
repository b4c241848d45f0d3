"""Reading yaml files that people write: what YAML loses or repeats without a word is refused."""

from pathlib import Path
from typing import Any

import yaml

from lib.errors import InputError, naming

_DEEPEST = 20  # levels of a file


def read_yaml(path: Path, *, most: int) -> Any:
    """The content of a yaml file of at most ``most`` values.

    Raises:
        InputError: the file is no YAML; a key stands twice in a section; or aliases lead in a
            circle or to a bomb.
        OSError: the file cannot be read.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        with naming(str(path)):
            _check_tree(node, most)
        return None if node is None else loader.construct_document(node)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error


def _check_tree(root: yaml.Node | None, most: int) -> None:
    """Refuse a key that stands twice in a section, and aliases that lead in a circle or to a bomb.

    YAML keeps the last of equal keys without a word; an alias stands for a node of any size.
    """
    pending, count = [(root, 0)], 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if count > most or depth > _DEEPEST:
            raise InputError(
                f"more than {most} values or {_DEEPEST} levels: such a file has fewer, unless an "
                "alias leads in a circle"
            )
        if isinstance(node, yaml.MappingNode):
            first: dict = {}
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
                if first.setdefault(name, key) is not key:
                    lines = [k.start_mark.line + 1 for k in (first[name], key)]
                    raise InputError(
                        f"{name} stands twice, in lines {lines[0]} and {lines[1]}: the first would "
                        "be lost, so put both into one"
                    )
                pending += [(key, depth + 1), (value, depth + 1)]
        elif isinstance(node, yaml.SequenceNode):
            pending += [(value, depth + 1) for value in node.value]
