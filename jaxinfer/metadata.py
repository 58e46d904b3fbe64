"""A file's metadata, read key by key with the rule that each value must meet."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_REQUIRED: Any = object()


class Metadata:
    """The keys of one architecture: `m.whole("block_count")` reads `<architecture>.block_count`.

    A key without a default is required. Every error is a ValueError that names file, key and rule.
    """

    def __init__(self, path: str, values: Mapping[str, Any]):
        self.path = path
        self.values = values
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str):
            raise ValueError(f"{path}: general.architecture must be a string, not {architecture!r}")
        self.architecture = architecture
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        key = f"{self.architecture}.{key}"
        self._read.add(key)
        value = self.values.get(key, default)
        if value is _REQUIRED:
            raise ValueError(f"{self.path}: the metadata has no {key}, which {self.architecture} needs")
        return value

    def wrong(self, key: str, value: Any, rule: str) -> ValueError:
        return ValueError(f"{self.path}: {self.architecture}.{key} is {reprlib.repr(value)}, but must be {rule}")

    def whole(self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number. An array, one entry a layer, is taken where all its entries agree."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, value, f"a whole number from {least} to {most}, the same for all layers")
        return value

    def wholes(self, key: str, layers: int, default: Any = _REQUIRED, *, least: int = 1) -> tuple[int, ...]:
        """A whole number for each layer: an array of one entry a layer, or one number for all."""
        value = self.get(key, default)
        if not isinstance(value, np.ndarray):
            return (self.whole(key, default, least=least),) * layers
        if value.shape != (layers,) or value.dtype.kind not in "iu" or (value < least).any() or (value >= 2**31).any():
            raise self.wrong(key, value, f"{layers} whole numbers from {least} on, one for each layer")
        return tuple(value.tolist())

    def flags(self, key: str, layers: int, default: Any = _REQUIRED) -> tuple[bool, ...]:
        """True or false for each layer; a number n stands for n - 1 times true and once false, over and over."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray):
            if value.shape != (layers,) or not np.isin(value, (0, 1)).all():
                raise self.wrong(key, value, f"{layers} booleans, one for each layer, or a whole number")
            return tuple(value.astype(bool).tolist())
        every = self.whole(key, default)
        return tuple(i % every < every - 1 for i in range(layers))

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, value, "a finite number above zero")
        return float(value)

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def refuse(self, key: str, *harmless: Any) -> None:
        """Fails if a key switches on something that is not supported: it has another value than the harmless ones."""
        value = self.get(key, None)
        if value is not None and (isinstance(value, np.ndarray) or value not in harmless):
            raise ValueError(f"{self.path}: {self.architecture}.{key} = {reprlib.repr(value)} is not supported")

    def unread(self) -> list[str]:
        """The keys under the architecture's prefix that nothing has asked for."""
        return sorted(k for k in self.values if k.startswith(f"{self.architecture}.") and k not in self._read)
