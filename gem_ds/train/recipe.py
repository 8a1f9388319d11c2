"""A recipe, ``--config recipe.yaml``: flags and their values, as the command line reads them."""

import argparse
import datetime
from collections import Counter
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml

_SCALARS = (str, int, float, datetime.date)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Refuses a flag that stands there twice."""

    def construct_document(self, node: yaml.Node) -> Any:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        names = Counter(str(key.value) for key, _ in pairs)
        if twice := [name for name, count in names.items() if count > 1]:
            raise yaml.YAMLError(f"{twice[0]} stands in it twice")
        return super().construct_document(node)


def read_recipe(path: str) -> dict[str, Any]:
    """What a recipe holds; a ValueError says why there is none.

    UTF-8, or UTF-16 with a byte order mark.
    """
    where = f"--config {path}"
    try:
        recipe = yaml.load(Path(path).read_bytes(), _Loader)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be flags and their values.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{where} must map flag names to values.")
    return {str(name): value for name, value in recipe.items()}


def converted(action: argparse.Action, value: object, where: str) -> object:
    """A recipe's value as its flag would give it; YAML reads 1e-3 as text, for instance.

    Raises:
        ValueError: the value is none of the flag; the sentence begins with ``where``.
    """
    is_list = action.nargs == "+"
    words = value if isinstance(value, list) and is_list else [value]
    convert = action.type if callable(action.type) else str
    try:
        if not all(isinstance(word, _SCALARS) for word in words):
            raise ValueError
        if is_list:
            return [str(word) for word in words]
        found = convert(str(value))
        if action.choices is not None and found not in action.choices:
            raise ValueError
        return found
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        choices = f": pass one of {', '.join(action.choices)}" if action.choices else ""
        shown = _shown.repr(value)
        raise ValueError(f"{where}{action.dest} cannot be {shown}{choices}.") from None


#: Of a value that holds others, no more than the outermost: aliases make them endless.
_shown = Repr()
_shown.maxlevel, _shown.maxstring = 1, 60
