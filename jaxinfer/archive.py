"""A session in one safetensors file: written whole or not at all, and read only where it is sound and of the model.

Each layer's caches are arrays of their own, `layers.3.k` [B, K, S, H] and so on, however a program stacks them: packed
and expanded weights read the same file. Beside them are `logits`, `tokens.<row>`, and for each row how many tokens it
has `room` for and how many are `observed`. The header's metadata have what is one number, and a sha256 of it all.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxinfer import engine
from jaxinfer.cache import KVCache, is_full
from jaxinfer.loader import Model

FORMAT = "jaxinfer session 1"
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32"}  # a dtype's name in the file
_MOST = 2**31 - 1  # positions are int32

type Kind = tuple[str, tuple[int, ...]]  # an array's type, as the file names it, and its shape


class Saved(NamedTuple):
    """What a session is beside its model; see `Session`."""

    ctx: int
    chunk: int
    dtype: np.dtype  # of keys and values
    evicted: int
    tokens: list[Any]  # each row's
    room: Any
    observed: Any
    logits: Any
    cache: Any
    kept: Any
    places: list[tuple[int, int]]  # of each layer: its stack, and its index in it


def save(path: str | os.PathLike[str], model: Model, saved: Saved) -> None:
    """Writes a session's file; one that is there before stays until the new one is whole.

    Raises ValueError where it cannot be written.
    """
    path, arrays = Path(path), {}
    for name, a in _arrays(saved._replace(cache=jax.tree.map(np.asarray, saved.cache))).items():
        arrays[name] = np.ascontiguousarray(a)
    header = {"format": FORMAT, "model": model.fingerprint, "activations": str(model.config.dtype)}
    header |= {name: str(getattr(saved, name)) for name in ("ctx", "chunk", "dtype", "evicted")}
    header["sha256"] = _digest(header, arrays)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            new = Path(folder) / "session"
            save_file(arrays, new, header)
            with new.open("rb") as file:
                os.fsync(file.fileno())  # else a crash could leave the new name with nothing behind it
            new.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: the session cannot be written: {error}") from error


def load(path: str | os.PathLike[str], model: Model, params: Any) -> Saved:
    """Reads a session's file and checks all of it; the arrays are numpy's.

    Raises ValueError, naming the file and the rule, for what is not a whole session of this model.
    """
    try:
        if not Path(path).is_file():  # asked first, as opening a pipe would block
            raise ValueError("not a regular file" if Path(path).exists() else "no such file")
        with safe_open(path, "np") as file:
            return _read(file, model, params)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a session to go on from: {error}") from error


def _read(file: Any, model: Model, params: Any) -> Saved:
    """The header is checked before any array is read; that it describes the whole file, safetensors has seen to."""
    header = file.metadata() or {}
    _same("format", header.get("format"), FORMAT)
    _same("model", header.get("model"), model.fingerprint)
    _same("type of activations", header.get("activations"), str(model.config.dtype))
    kinds: dict[str, Kind] = {}
    for name in list(file.keys()):
        one = file.get_slice(name)
        kinds[name] = one.get_dtype(), tuple(one.get_shape())
    template = _template(model, params, header, kinds)
    wanted = {name: (_CODES[str(a.dtype)], a.shape) for name, a in _arrays(template).items()}
    for name in sorted(kinds.keys() | wanted.keys()):
        _same(f"array {name!r:.80}", _text(kinds.get(name)), _text(wanted.get(name)))
    arrays = {name: file.get_tensor(name) for name in kinds}
    told = header.pop("sha256", None)
    _same("sha256", told, _digest(header, arrays))
    saved = _filled(template, arrays)
    _check(saved, model.config.vocab)
    return saved


def _same(what: str, found: str | None, needed: str) -> None:
    if found != needed:
        raise ValueError(f"its {what} is {found!r:.80}, not {needed!r:.80}")


def _text(kind: Kind | None) -> str:
    return f"{kind[0]} {list(kind[1])}" if kind else "missing"


def _arrays(saved: Saved) -> dict[str, np.ndarray]:
    """What the file holds, by name; of arrays on the host no copies."""
    out = {f"tokens.{i}": np.asarray(row, np.int32) for i, row in enumerate(saved.tokens)}
    out |= {"room": np.asarray(saved.room, np.int32), "observed": np.asarray(saved.observed, np.int32)}
    if saved.logits is not None:
        out["logits"] = np.asarray(saved.logits)
    last = dict(saved.places)  # of each stack
    for number, (k, r) in enumerate(saved.places):
        for name in _names(stack := saved.cache[k]):
            a = getattr(stack, name)
            if name == "recent_q":  # behind the stack's own are those of later layers that read its last one's keys
                a = a[r:] if r == last[k] else a[r : r + 1]
            elif name != "shift":  # one for the stack
                a = a[r]
            out[f"layers.{number}.{name}"] = a
        if saved.kept is not None and saved.kept[k] is not None:
            out[f"layers.{number}.kept"] = np.asarray(saved.kept[k])[r]
    return out


def _filled(template: Saved, arrays: Mapping[str, np.ndarray]) -> Saved:
    """The template with the file's arrays: `_arrays` the other way."""
    numbers: dict[int, list[int]] = {}
    for number, (k, _) in enumerate(template.places):
        numbers.setdefault(k, []).append(number)

    def joined(k: int, name: str) -> np.ndarray:
        parts = [arrays[f"layers.{number}.{name}"] for number in numbers[k]]
        if name == "shift":
            if any((part != parts[0]).any() for part in parts):
                raise ValueError(f"the shifts of the layers {numbers[k]} differ, but this model has them in one stack")
            return parts[0]
        return np.concatenate(parts) if name == "recent_q" else np.stack(parts)

    cache = tuple(
        replace(one, **{name: joined(k, name) for name in _names(one)}) for k, one in enumerate(template.cache)
    )
    kept = template.kept and tuple(None if one is None else joined(k, "kept") for k, one in enumerate(template.kept))
    return template._replace(
        tokens=[arrays[f"tokens.{i}"].tolist() for i in range(len(template.tokens))],
        room=arrays["room"].tolist(),
        observed=arrays["observed"].tolist(),
        logits=arrays.get("logits"),
        cache=cache,
        kept=kept,
    )


def _names(stack: Any) -> list[str]:
    return [f.name for f in fields(stack) if not f.metadata.get("static") and getattr(stack, f.name) is not None]


def _digest(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    """Of the header's metadata and all arrays, in whatever order the file has them."""
    digest = hashlib.sha256(repr(sorted(header.items())).encode())
    for name, a in sorted(arrays.items()):
        digest.update(repr((name, str(a.dtype), a.shape)).encode())
        digest.update(a.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _template(model: Model, params: Any, header: Mapping[str, str], kinds: Mapping[str, Kind]) -> Saved:
    """A session of these numbers as this model has it, of arrays that take no memory.

    The file says what no rule does: its rows' lengths, how many queries are kept, the slots of compacted caches.
    """
    ctx, chunk, evicted = (_number(header, name, least) for name, least in (("ctx", 1), ("chunk", 1), ("evicted", 0)))
    if (dtype := header.get("dtype")) not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"its dtype is {dtype!r:.80}, not float32, bfloat16 or float16")
    if not (batch := sum(name.startswith("tokens.") for name in kinds)):
        raise ValueError("it has no tokens.0")
    observe = max((_length(kinds, name, 2) for name in kinds if name.endswith(".recent_q")), default=0)

    def make() -> Any:
        slots = engine.slots_for(ctx)
        return model.init_cache(params, batch, slots, chunk=chunk, dtype=jnp.dtype(dtype), observe=observe)

    cache = jax.tree.map(lambda a: _blank(a.shape, a.dtype), jax.eval_shape(make))
    places = list(params.layers.places())
    cache, kept = _compacted(cache, places, kinds)
    return Saved(
        ctx=ctx,
        chunk=chunk,
        dtype=jnp.dtype(dtype),
        evicted=evicted,
        tokens=[_blank((_length(kinds, f"tokens.{row}", 0),), np.int32) for row in range(batch)],
        room=_blank((batch,), np.int32),
        observed=_blank((batch,), np.int32),
        logits=_blank((batch, model.config.vocab), np.float32) if "logits" in kinds else None,
        cache=cache,
        kept=kept,
        places=places,
    )


def _compacted(cache: Any, places: list[tuple[int, int]], kinds: Mapping[str, Kind]) -> tuple[Any, Any]:
    """The template's cache with the slots that the file has where it was compacted, and the lists' template."""
    held = list(cache)
    kept: list[Any] = [None] * len(cache)
    for number, (k, r) in enumerate(places):
        stack, prefix = cache[k], f"layers.{number}."
        if r > 0 or not (is_full(stack) and prefix + "shift" in kinds):
            continue
        repeats, batch, heads, _, width = stack.k.shape

        def lists(name: str, repeats: int = repeats, batch: int = batch, heads: int = heads) -> np.ndarray:
            own = _length(kinds, name, 1) == heads  # else one for all heads
            return _blank((repeats, batch, heads if own else 1, max(_length(kinds, name, 2), 1)), np.int32)

        pos = lists(prefix + "pos")
        keys = _blank((repeats, batch, heads, pos.shape[3], width), stack.k.dtype)
        held[k] = replace(stack, k=keys, v=keys, pos=pos, shift=_blank((batch,), np.int32))
        if prefix + "kept" in kinds:
            kept[k] = lists(prefix + "kept")
    return tuple(held), None if all(one is None for one in kept) else tuple(kept)


def _length(kinds: Mapping[str, Kind], name: str, axis: int) -> int:
    shape = kinds[name][1] if name in kinds else ()
    return min(shape[axis], _MOST) if axis < len(shape) else 0


def _number(header: Mapping[str, str], name: str, least: int) -> int:
    text = header.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and least <= int(text) <= _MOST):
        raise ValueError(f"its {name} is {text!r:.80}, not a number from {least} to {_MOST}")
    return int(text)


def _blank(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)


def _check(saved: Saved, vocab: int) -> None:
    """Whether the values can be a session's; the shapes are."""
    read = np.array([len(row) for row in saved.tokens])
    for row, tokens in enumerate(saved.tokens):
        if wrong := [i for i in tokens if not 0 <= i < vocab]:
            raise ValueError(f"row {row} has the token ids {wrong[:5]}, but the model's are from 0 to {vocab - 1}")
    _within("room", saved.room, _MOST - read if saved.evicted else saved.ctx - read)
    _within("observed", saved.observed, read)
    _within("evicted", saved.evicted, read.max())
    if saved.logits is not None and not np.isfinite(saved.logits[read > 0]).all():
        raise ValueError("its logits are not all finite")
    for number, (k, r) in enumerate(saved.places):
        if not isinstance(stack := saved.cache[k], KVCache):
            continue
        _within(f"layers.{number}.pos", stack.pos[r], read[:, None, None] - 1, least=-1)
        if stack.shift is not None:
            _within(f"layers.{number}.shift", stack.shift, read)
            _within("room", saved.room, stack.k.shape[3] - (read - stack.shift))
        if (
            saved.kept is not None
            and (lists := saved.kept[k]) is not None
            and not (np.diff(lists, prepend=-1) > 0).all()
        ):
            raise ValueError(f"layers.{number}.kept is not strictly increasing from 0 on")


def _within(name: str, values: Any, most: Any, least: int = 0) -> None:
    values, most = np.broadcast_arrays(values, most)
    if (wrong := (values < least) | (values > most)).any():
        raise ValueError(f"its {name} has {values[wrong][0]}, which is not from {least} to {most[wrong][0]}")
