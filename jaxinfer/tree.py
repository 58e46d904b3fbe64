"""The one way this package declares a pytree."""

from dataclasses import dataclass, field, fields
from typing import Any, dataclass_transform

import jax
from jaxtyping import Array, Int


def static(**kwargs: Any) -> Any:
    """A field that is part of the tree's structure: hashable, fixed under jit."""
    return field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(field, static))
def pytree[T](cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass whose fields are leaves or subtrees, except those declared `static()`."""
    cls = dataclass(frozen=True)(cls)
    cls.__no_type_check__ = True  # pyright: ignore[reportAttributeAccessIssue] # trees are also made of shapes and Sources
    meta = [f.name for f in fields(cls) if f.metadata.get("static")]  # pyright: ignore[reportArgumentType]
    data = [f.name for f in fields(cls) if not f.metadata.get("static")]  # pyright: ignore[reportArgumentType]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


Device = Any  # a jax.Device, which is a variable to type checkers
Index = int | Int[Array, ""]  # of a layer in its stack: a Python number, or traced inside a loop over layers
