"""Reads GGUF files (v2 and v3, little-endian) as they lie on disk: a dict of metadata and views of the mapped tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every size that a file states is checked against
the file before anything of that size is made, and every fault is a `ValueError` that names the file and the rule.
"""

import hashlib
import mmap
import os
import re
import struct
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

_VERSIONS = (2, 3)
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH, _MAX_NESTED = 4, 2**16  # of arrays in arrays; no known file nests any
_MAX_NAME = 2**16 - 1  # bytes of a key or a tensor's name
_MAX_HEADER = 2**26  # bytes before the data: 4 times Gemma 4's, and few enough to parse in seconds whatever they hold
_LENGTH = struct.Struct("<Q").unpack_from


class Tensor(NamedTuple):
    """One tensor as stored: `shape` counts elements in numpy order, `data` is a view of the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray  # uint8 [*shape[:-1], bytes of a row], read-only


class File(NamedTuple):
    """A GGUF file, or all parts of a split one (`path` and `metadata` are then the first part's).

    Metadata values: str, bool, int and float for scalars; numpy arrays for arrays of numbers and of bools; lists of str
    for arrays of strings, and lists of those values for arrays of arrays.
    """

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: str | os.PathLike[str]) -> File:
    """Maps the GGUF file at `path`; of a split model, give the first part (`-00001-of-000NN.gguf`) and all are read.

    Raises ValueError, naming the file, for whatever cannot be read or breaks the format: no such file, wrong magic,
    version or byte order, text that is not UTF-8, sizes beyond the end, duplicate names, missing parts.
    """
    path = Path(path)
    first = _read_part(path)
    count = _number(first, "split.count", 1)
    parts = [first] + [_read_part(p) for p in _other_parts(path, _number(first, "split.no", 0), count)]
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        stated = _number(part, "split.no", 0), _number(part, "split.count", 1)
        if stated != (i, count):
            raise ValueError(f"{part.path}: split.no, split.count are {stated}, not {(i, count)}")
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"{part.path}: tensors that an earlier part has too: {sorted(twice)}")
        tensors |= part.tensors
    if (total := _number(first, "split.tensors.count", len(tensors))) != len(tensors):
        rule = f"{len(parts)} part(s) hold {len(tensors)} tensors, but split.tensors.count is {total}"
        raise ValueError(f"{path}: {rule}")
    return File(first.path, first.metadata, tensors)


def fingerprint(file: File) -> str:
    """A name for what a file computes: the model's name and a hash of its numbers, its vocabulary and its weights.

    Of each tensor three places are read, so that it takes milliseconds for any size. What a file says of itself beside
    (its template, who made it, how it is split) does not count.
    """
    arch = file.metadata.get("general.architecture")
    digest = hashlib.sha256()
    for key, value in sorted(file.metadata.items()):
        if key.startswith(f"{arch}.") or key == "tokenizer.ggml.tokens":
            digest.update(key.encode() + (value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()))
    for name, tensor in sorted(file.tensors.items()):
        data = tensor.data.reshape(-1)
        places = [data[start : start + 64].tobytes() for start in (0, len(data) // 2, max(0, len(data) - 64))]
        digest.update(repr((name, tensor.type.name, tensor.shape, places)).encode())
    return f"{str(file.metadata.get('general.name', arch))[:64]} {digest.hexdigest()[:16]}"


def _number(part: File, key: str, default: int) -> int:
    if type(value := part.metadata.get(key, default)) is not int:
        raise ValueError(f"{part.path}: {key} is {value!r}, not an integer")
    return value


def _other_parts(path: Path, number: int, count: int) -> list[Path]:
    """Paths of parts 2 to `count`, given the first; raises unless `path` is the first and all the others exist."""
    if count == 1:
        return []
    if not 1 < count < 100_000:
        raise ValueError(f"{path}: split.count is {count}, not a number of parts from 1 to 99999")
    stem = re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", path.name)
    names = [f"{stem}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    if path.name not in names:
        raise ValueError(f"{path}: one of {count} parts, whose names must end in -00001-of-{count:05}.gguf and so on")
    if path.name != names[0] or number != 0:
        raise ValueError(f"{path}: a later part of a split model (split.no is {number}); give the first, {names[0]}")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise ValueError(f"{path}: missing parts of the model: {', '.join(missing)}")
    return [path.parent / name for name in names[1:]]


def _read_part(path: Path) -> File:
    """Reads one file, split or not."""
    try:
        if not path.is_file():  # asked first, as opening a pipe would block
            raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    header = _Header(path, mapped)
    n_tensors, n_keys = header.number("<u8", "the number of tensors"), header.number("<u8", "the number of keys")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):  # needs no bound of its own: every turn reads on, and stops where the header does
        key = header.string("a key", _MAX_NAME)
        if key in metadata:
            header.fail(f"key {key!r} occurs twice")
        metadata[key] = header.value(header.number("<u4", f"the type of {key!r}"), repr(key))
    tensors: dict[str, Tensor] = {}
    for tensor in _tensors(header, n_tensors, metadata.get("general.alignment", 32), np.frombuffer(mapped, np.uint8)):
        if tensor.name in tensors:
            header.fail(f"tensor {tensor.name!r} occurs twice")
        tensors[tensor.name] = tensor
    return File(str(path), metadata, tensors)


def _tensors(header: "_Header", count: int, alignment: Any, file: np.ndarray) -> Iterator[Tensor]:
    """Reads the tensor table and yields each tensor with its view of `file` (uint8, the whole of it)."""
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        header.fail(f"general.alignment is {alignment}, not a power of two")
    table = []
    for _ in range(count):
        name = header.string("a tensor's name", _MAX_NAME)
        if not 1 <= (n_dims := header.number("<u4", f"tensor {name!r}")) <= 4:
            header.fail(f"tensor {name!r} has {n_dims} dimensions, not 1 to 4")
        shape = tuple(header.number("<u8", f"tensor {name!r}") for _ in range(n_dims))[::-1]
        kind, offset = header.number("<u4", f"tensor {name!r}"), header.number("<u8", f"tensor {name!r}")
        table.append((name, shape, kind, offset))
    start = -(-header.pos // alignment) * alignment
    for name, shape, kind, offset in table:
        if kind not in GGML_QUANT_SIZES:
            known = ", ".join(f"{t.name} ({t.value})" for t in GGML_QUANT_SIZES)
            header.fail(f"tensor {name!r} has the unknown type {kind}; known types: {known}")
        kind = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            header.fail(f"tensor {name!r} of type {kind.name} has shape {shape}; rows must be whole blocks of {block}")
        stored = *shape[:-1], shape[-1] // block * block_bytes
        if offset % alignment:
            header.fail(f"tensor {name!r} starts at {offset}, not a multiple of the alignment {alignment}")
        begin, end = start + offset, start + offset + prod(stored)
        if end > len(file):
            header.fail(f"tensor {name!r} of shape {shape} ends at byte {end}, but the file has {len(file)}")
        yield Tensor(name, kind, shape, file[begin:end].reshape(stored))


class _Header:
    """Reads a file's values one after the other from its start on, checking each against what is left."""

    def __init__(self, path: Path, file: bytes | mmap.mmap):
        self.path, self.pos, self.nested, self.buffer = path, 0, 0, memoryview(file)[:_MAX_HEADER]
        self.limit = f"the limit of {_MAX_HEADER} bytes for a header" if len(file) > _MAX_HEADER else "the file"
        if (magic := bytes(self.buffer[:4])) != b"GGUF":
            self.fail(f"not a GGUF file: it starts with {magic}" if magic else "the file is empty")
        self.pos = 4
        if (version := self.number("<u4", "the version")) not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") <= max(_VERSIONS)
            stated = "the file is big-endian" if big else f"GGUF version {version}"
            self.fail(f"{stated}; little-endian versions {_VERSIONS} are supported")

    def fail(self, rule: str) -> NoReturn:
        raise ValueError(f"{self.path}: {rule}")

    def take(self, size: int, what: str) -> int:
        """Moves over `size` bytes and returns where they start."""
        if size > (left := len(self.buffer) - self.pos):
            self.fail(f"{what} needs {size} bytes at byte {self.pos}, but {self.limit} ends {left} bytes later")
        self.pos += size
        return self.pos - size

    def numbers(self, dtype: str, count: int, what: str) -> np.ndarray:
        """A copy, and so aligned and free of the mapping. Any byte but 0 is true, as in C."""
        start = self.take(count * np.dtype(dtype).itemsize, what)
        values = np.frombuffer(self.buffer, "u1" if dtype == "?" else dtype, count, start)
        return values != 0 if dtype == "?" else values.copy()

    def number(self, dtype: str, what: str) -> Any:
        return self.numbers(dtype, 1, what).item()

    def text(self, data: bytes | memoryview, what: str) -> str:
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}")

    def string(self, what: str, max_size: int = _MAX_HEADER) -> str:
        size = self.number("<u8", f"the length of {what}")
        if size > max_size:
            self.fail(f"{what} has {size} bytes; the limit is {max_size}")
        start = self.take(size, what)
        return self.text(self.buffer[start : self.pos], what)

    def strings(self, count: int, what: str) -> list[str]:
        """An array of strings: one pass over their lengths, then one decoding of all, as vocabularies are large."""
        buffer, pos, last = self.buffer, self.pos, len(self.buffer) - 8
        if count > len(buffer) // 8:
            self.fail(f"{what} claims {count} strings, but {self.limit} ends before that")
        starts = []
        for _ in range(count):
            if pos > last:
                self.fail(f"{what} claims {count} strings, but {self.limit} ends in number {len(starts)}")
            starts.append(pos)
            pos += 8 + _LENGTH(buffer, pos)[0]
        begin = self.take(pos - self.pos, what)
        at = np.asarray(starts, np.int64) - begin
        keep = np.ones(pos - begin, bool)
        for i in range(1, 8):
            keep[at + i] = False
        body = np.frombuffer(buffer, np.uint8, pos - begin, begin)[keep]
        body[at - 7 * np.arange(count)] = 0  # what is left of each length becomes a separator
        if np.count_nonzero(body) < len(body) - count:  # text with NULs in it cannot be split at NULs
            return [self.text(buffer[a + 8 : b], what) for a, b in pairwise([*starts, pos])]
        return self.text(body.data, what).split("\0")[1:]

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A metadata value of the given type."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            self.fail(f"{what} has the unknown value type {kind}")
        kind, count = self.number("<u4", what), self.number("<u8", what)
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind], count, what)
        if kind == _STRING:
            return self.strings(count, what)
        self.nested += count
        if depth == _MAX_DEPTH or self.nested > _MAX_NESTED:
            self.fail(f"{what} nests arrays more than {_MAX_DEPTH} deep or more than {_MAX_NESTED} of them")
        return [self.value(kind, what, depth + 1) for _ in range(count)]
