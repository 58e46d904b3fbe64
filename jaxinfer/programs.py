"""Jitted functions whose kernels are compiled side by side, and which later processes find lowered.

To trace and to lower a program of GPU kernels is Python's work, and takes longer than to load the weights. XLA's
compilation cache saves none of it, as it goes by the lowered program. So where there is such a cache, its folder also
has lowered programs, each under a hash of all that it is made from: this package's source, versions, settings of JAX,
static arguments, and the others' shapes. What is read there is trusted, as XLA's machine code beside it is.

XLA compiles the kernels of a program one after the other. Mosaic remembers those that a process has compiled: so each
is compiled before in a program of its own, all at once.
"""

import functools
import hashlib
import inspect
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.mlir import ir

from jaxinfer.tree import Device

KERNEL = "mosaic_gpu_v2"  # what a kernel is called by in a lowered program
VERSIONS = "jax", "jaxlib", "numpy"
LIBRARIES = "jaxinfer", "builtins", *VERSIONS  # what may be part of a program's name
THREADS_OWN = "jax_default_matmul_precision", "jax_enable_x64", "jax_debug_nans"  # settings that may be a thread's
ANY_CALL = jax.export.DisabledSafetyCheck.custom_call("ALL")  # no other version reads the file

type Prepare = Callable[[], Callable[[], None]]  # reads or lowers a program; what it returns compiles it, in any thread


class Kept(NamedTuple):
    """A lowered program, as its file has it: from leaves to leaves."""

    exported: jax.export.Exported
    tree: Any  # what the leaves are of

    def function(self, name: str) -> Callable[..., Any]:
        """One of that name, which profiles show."""

        def call(*leaves: Any) -> Any:
            return self.exported.call(*leaves)

        call.__name__ = name
        return call

    def encode(self) -> bytes:
        example = jax.tree.unflatten(self.tree, [0] * self.tree.num_leaves)
        return pickle.dumps((bytes(self.exported.serialize()), example))

    @classmethod
    def decode(cls, data: bytes) -> "Kept":
        exported, example = pickle.loads(data)
        return cls(jax.export.deserialize(bytearray(exported)), jax.tree.structure(example))


class Program:
    """A jitted function: takes what `jax.jit` takes, of which one argument may be donated, and has its attributes."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        static_argnames: Sequence[str],
        donate_argnames: str | None = None,
        compiler_options: dict[str, Any] | None = None,
    ):
        names = {"static_argnames": static_argnames, "donate_argnames": donate_argnames}
        self._jitted = jax.jit(function, **names, compiler_options=compiler_options)
        self._static, self._donated, self._options = static_argnames, donate_argnames, compiler_options
        self._signature = inspect.signature(function)
        self._prepared: dict[_Key, Callable[[Sequence[Any]], Any] | None] = {}  # None: what jit finds again
        functools.update_wrapper(self, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        static, dynamic = self._split(args, kwargs)
        leaves, tree = jax.tree.flatten(dynamic)
        if any(isinstance(leaf, Tracer) or not hasattr(leaf, "shape") for leaf in leaves):
            return self._jitted(*args, **kwargs)
        if (key := _Key.of(static, leaves, tree)) not in self._prepared:
            self.prepare(*args, **kwargs)()
        run = self._prepared[key]
        return self._jitted(*args, **kwargs) if run is None else run(leaves)

    def prepare(self, *args: Any, **kwargs: Any) -> Callable[[], None]:
        """Lowers the program for arguments, or their shapes, or reads it. What is returned compiles it."""
        static, dynamic = self._split(args, kwargs)
        leaves, tree = jax.tree.flatten(dynamic)
        key, kept = _Key.of(static, leaves, tree), None
        if (path := _path(self, key)) is None:
            lowered = self._jitted.lower(*args, **kwargs)
        else:
            if (kept := _read(path)) is None:
                kept = self._export(static, leaves, tree, *key.devices)
                _write(path, kept)
            donated = [name == self._donated for name, value in dynamic.items() for _ in jax.tree.leaves(value)]
            options = {"donate_argnums": np.flatnonzero(donated).tolist(), "compiler_options": self._options}
            lowered = jax.jit(kept.function(self.__name__), **options).lower(*leaves)

        def finish() -> None:
            if [device.platform for device in key.devices] == ["gpu"]:
                alone = kernels(lowered, *key.devices)
                with ThreadPoolExecutor(max(len(alone), 1)) as pool:
                    list(pool.map(lambda one: one.compile(), alone))
            compiled = lowered.compile()
            self._prepared[key] = kept and partial(_run, compiled, kept.tree)

        return finish

    def _export(self, static: dict[str, Any], leaves: Sequence[Any], tree: Any, device: Device) -> Kept:
        def flat(*leaves: Any) -> list[Any]:
            nonlocal made
            out, made = jax.tree.flatten(self.__wrapped__(**static, **tree.unflatten(leaves)))
            return out

        made, flat.__name__ = None, self.__name__
        platforms = ["cpu"] if device.platform == "cpu" else None  # the default one
        shapes = [jax.ShapeDtypeStruct(k.shape, k.dtype, weak_type=k.weak_type) for k in map(_Kind.of, leaves)]
        exported = jax.export.export(jax.jit(flat), platforms=platforms, disabled_checks=[ANY_CALL])(*shapes)
        return Kept(exported, made)

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Static arguments and others, by name."""
        given = self._signature.bind(*args, **kwargs).arguments
        static = {name: given.pop(name) for name in self._static if name in given}
        return static, dict(sorted(given.items()))  # as JAX sorts them


def _run(compiled: jax.stages.Compiled, tree: Any, leaves: Sequence[Any]) -> Any:
    return jax.tree.unflatten(tree, compiled(*leaves))


def program(**options: Any) -> Callable[[Callable[..., Any]], Program]:
    """Makes a function a Program."""
    return lambda function: Program(function, **options)


class _Kind(NamedTuple):
    """All that a program knows of an argument."""

    shape: tuple[int, ...]
    dtype: Any
    weak_type: bool

    @classmethod
    def of(cls, leaf: Any) -> "_Kind":
        return cls(tuple(leaf.shape), leaf.dtype, getattr(leaf, "weak_type", False))


class _Key(NamedTuple):
    """All that calls of one program have in common."""

    static: tuple[tuple[str, Any], ...]
    tree: Any
    kinds: tuple[_Kind, ...]
    devices: frozenset[Device]
    settings: tuple[Any, ...]

    @classmethod
    def of(cls, static: dict[str, Any], leaves: Sequence[Any], tree: Any) -> "_Key":
        placed = {sharding for leaf in leaves if (sharding := getattr(leaf, "sharding", None)) is not None}
        # Where there are shapes alone, the device that arrays would go to.
        devices = frozenset(device for one in placed for device in one.device_set) or frozenset(jax.local_devices()[:1])
        settings = tuple(getattr(jax.config, name) for name in THREADS_OWN)
        return cls(tuple(static.items()), tree, tuple(map(_Kind.of, leaves)), devices, settings)


def kernels(lowered: jax.stages.Lowered, device: Device) -> list[jax.stages.Lowered]:
    """The different kernels that a program calls, each lowered in one of its own."""
    found = {}
    for op in _operations(lowered.compiler_ir().operation):  # pyright: ignore[reportOptionalMemberAccess]
        if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == KERNEL:
            options = {one.name: one.attr for one in op.attributes["mhlo.backend_config"]}
            found[options["kernel_hash"]] = op, options
    where = jax.sharding.SingleDeviceSharding(device)

    def shapes(values: Any) -> list[jax.ShapeDtypeStruct]:
        kinds = [ir.RankedTensorType(value.type) for value in values]
        return [jax.ShapeDtypeStruct(tuple(k.shape), _dtype(str(k.element_type)), sharding=where) for k in kinds]

    def alone(op: Any, options: dict[str, Any]) -> jax.stages.Lowered:
        values = {n: a.value_bytes if isinstance(a, ir.StringAttr) else a.value for n, a in options.items()}
        kernel = jax.ffi.ffi_call(KERNEL, shapes(op.results))
        program = jax.jit(lambda *args: kernel(*args, **values))
        return program.trace(*shapes(op.operands)).lower(lowering_platforms=("cuda",))

    return [alone(*one) for one in found.values()]


def _operations(op: Any) -> Iterator[Any]:
    """All operations within one."""
    for region in op.regions:
        for block in region.blocks:
            for one in block.operations:
                yield one.operation
                yield from _operations(one.operation)


def _dtype(name: str) -> np.dtype:
    """What MLIR calls so: i8, ui16, bf16, f32; i1 is a truth."""
    kind, bits = re.fullmatch(r"([a-z]+)(\d+)", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return jnp.dtype("bool" if bits == "1" else {"i": "int", "ui": "uint", "f": "float", "bf": "bfloat"}[kind] + bits)


def _path(program: Program, key: _Key) -> Path | None:
    """The file of a program; None where there is no folder for it, or no name that lasts for what it is made from."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder or not jax.config.jax_enable_compilation_cache or "://" in folder or len(key.devices) != 1:
        return None
    settings = {name: str(value) for name, value in jax.config.values.items() if "cache" not in name}
    (device,) = key.devices
    # What a kernel is lowered to depends on the CUDA that is there.
    place = device.device_kind, device.client.platform_version
    surroundings = _source(), sys.version, [*map(version, VERSIONS)], place, settings, key.settings
    try:
        made_from = _described((surroundings, program, key.static, jax.tree.unflatten(key.tree, key.kinds)))
    except _Nameless:
        return None
    return Path(folder) / f"{program.__name__}-{hashlib.sha256(made_from.encode()).hexdigest()}.lowered"


@functools.cache
def _source() -> str:
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


class _Nameless(Exception):
    """Of what may be another thing in another process."""


def _described(x: Any) -> str:
    """What it is, in words that are the same in each process."""
    if x is None or isinstance(x, bool | int | float | str | bytes | np.generic | np.dtype | Enum | _Kind):
        return repr(x)
    if isinstance(x, tuple | list):
        return f"{_named(type(x))}({', '.join(map(_described, x))})"
    if isinstance(x, Mapping):
        return _described([*x.items()])
    if isinstance(x, partial):
        return f"partial{_described((x.func, x.args, x.keywords))}"
    if is_dataclass(x) and not isinstance(x, type):
        return _named(type(x)) + _described({f.name: getattr(x, f.name) for f in fields(x) if f.compare})
    return _named(x)


def _named(x: Any) -> str:
    """A module, class or function by its name, if that is of a library and leads to it."""
    x = inspect.unwrap(x) if callable(x) else x
    names = (
        (x.__name__, "") if isinstance(x, ModuleType) else (getattr(x, n, "") for n in ("__module__", "__qualname__"))
    )
    module, name = names
    found = sys.modules.get(module)
    for part in name.split(".") if name else []:
        found = getattr(found, part, None)
    if module.partition(".")[0] not in LIBRARIES or (inspect.unwrap(found) if callable(found) else found) is not x:
        raise _Nameless
    return f"{module}:{name}"


def _read(path: Path) -> Kept | None:
    """The program of a file; None where there is none, or not all of it."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return Kept.decode(data[32:]) if hashlib.sha256(data[32:]).digest() == data[:32] else None


def _write(path: Path, kept: Kept) -> None:
    data = kept.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            whole = Path(place) / path.name
            whole.write_bytes(hashlib.sha256(data).digest() + data)
            whole.replace(path)
    except OSError as error:
        warnings.warn(f"{path}: the program is not kept: {error}", stacklevel=2)
