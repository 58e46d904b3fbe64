"""Run files: TOML whose keys are the names of the command's arguments."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Any, get_args

MAX_BYTES = 2**20  # a model given in place of a run file is not read to its end


def read(path: str | Path, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a run file sets.

    Args:
        path: of the file.
        allowed: the type of each argument that may be set: `str`, `int`, `float` (a whole number will do), `bool`,
            `int | str` or `list[str]`.

    Raises:
        ValueError: the file cannot be read or is no TOML, a key is not allowed (the nearest one is named), or a value
            has another type.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ValueError(f"{path}: cannot read this run file: {error}") from error
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path}: a run file has at most {MAX_BYTES} bytes")
    try:
        values = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number of thousands of digits, deep nesting
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    return {key: _checked(path, key, value, allowed) for key, value in values.items()}


def _checked(path: str | Path, key: str, value: Any, allowed: Mapping[str, Any]) -> Any:
    if key not in allowed:
        nearest = difflib.get_close_matches(key, allowed, n=1, cutoff=0)
        raise ValueError(f"{path}: {key!r} is no argument; the nearest one is {nearest[0]!r}")
    wanted = allowed[key]
    if wanted is float and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if isinstance(wanted, UnionType):
        right, shown = type(value) in get_args(wanted), " or ".join(one.__name__ for one in get_args(wanted))
    elif isinstance(wanted, GenericAlias):
        right, shown = type(value) is list and all(type(v) is str for v in value), "list of str"
    else:
        right, shown = type(value) is wanted, wanted.__name__  # not isinstance: true and false are no numbers here
    if not right:
        raise ValueError(f"{path}: {key} must be of type {shown}, not {type(value).__name__}")
    return value
