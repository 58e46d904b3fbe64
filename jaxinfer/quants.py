"""Weights as GGUF files store them: a `Format` per GGML block type, `Packed` weights, and their way into arrays.

Layouts and formulas are ggml's (ggml-common.h, ggml-quants.c); `decode` equals `gguf.quants.dequantize` bit for bit.
Neither an order of operations nor the absence of fused multiply-adds has to be enforced for that: a scale of 11 bits
times a block's scale times a code has at most 23 bits in every format, so all products are exact in f32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jax import Array, lax
from jaxtyping import Float, Int, Num, UInt

from jaxinfer.gguf import Tensor
from jaxinfer.tree import Index, pytree, static

Planes = dict[str, Any]  # {field of a block: array [..., n_blocks, n]}


@dataclass(frozen=True)
class Format:
    """How one GGML type stores `block` consecutive elements of a row in `size` bytes."""

    name: str
    block: int
    fields: np.dtype  # of one block, in the file's order
    decode: Callable[[Planes], Float[Array, "*blocks block"]]  # jnp, f32: the definition of the type
    tile: None = None  # no kernel reads this type yet

    @property
    def size(self) -> int:
        return self.fields.itemsize

    def split(self, raw: UInt[np.ndarray, "*rows nb size"]) -> Planes:
        """The fields of blocks given as bytes: strided views [..., nb, n] of `raw`, nothing is copied."""
        blocks = raw.view(self.fields)[..., 0]
        return {name: blocks[name] for name in self.fields.names or ()}


@pytree
class Packed:
    """A weight [..., out, in] that stays as its file stores it, in one plane per field of its blocks."""

    planes: Planes  # jax arrays; numpy arrays while on the host
    format: Format = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape. Computed from the planes, so that indexed, stacked and vmapped weights have theirs."""
        *lead, n_blocks, _ = next(iter(self.planes.values())).shape
        return *lead, n_blocks * self.format.block

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size_bytes(self) -> int:
        return sum(plane.size * plane.dtype.itemsize for plane in self.planes.values())


Weight = jax.Array | np.ndarray | Packed  # numpy on the host only


def dense(w: Weight, dtype: Any = jnp.float32) -> Num[Array, "..."]:
    """The weight's logical array, decoded in f32 and rounded once to `dtype`."""
    if isinstance(w, Packed):
        return w.format.decode(w.planes).reshape(w.shape).astype(dtype)
    return jnp.asarray(w).astype(dtype)


def at[T](tree: T, *index: Index) -> T:
    """Entry `index` of the leading axes of every array in a tree, as one slice; weights stay packed."""

    def one(stack: Any) -> Array:
        size = stack.shape[len(index) :]
        return lax.dynamic_slice(stack, (*index, *(0 for _ in size)), (*(1 for _ in index), *size)).reshape(size)

    return jax.tree.map(one, tree)


def rows[W: Weight](w: W, ids: Int[Array, "*ids"]) -> W:
    """Rows `ids` of a weight [V, in] as a weight [*ids, in]: an embedding lookup, which need not decode the others."""
    return jax.tree.map(lambda plane: jnp.take(plane, ids, axis=0, mode="clip"), w)


def pack(tensors: Sequence[Tensor]) -> np.ndarray | Packed:
    """Stacks tensors of one type and shape along a new leading axis, on the host.

    Each byte is copied once, from the mapped file to its plane, without the interpreter's lock: call it from a thread
    pool. Raises ValueError for an unsupported type and for tensors that differ, naming them.
    """
    first = tensors[0]
    for t in tensors:
        if (t.type, t.shape) != (first.type, first.shape):
            differs = f"is {t.type.name} {t.shape}, but {first.name!r} is {first.type.name} {first.shape}"
            raise ValueError(f"tensor {t.name!r} {differs}; stacked tensors must be alike")
    if first.type in PLAIN:
        out = np.empty((len(tensors), *first.shape), PLAIN[first.type])
        for row, t in zip(out, tensors, strict=True):
            row[...] = t.data.view(out.dtype)
        return out
    if first.type not in FORMATS:
        known = ", ".join(t.name for t in (*PLAIN, *FORMATS))
        raise ValueError(f"tensor {first.name!r} has type {first.type.name}; supported types: {known}")
    form = FORMATS[first.type]
    blocks = *first.shape[:-1], first.shape[-1] // form.block
    parts = [form.split(t.data.reshape(*blocks, form.size)) for t in tensors]
    planes = {k: np.empty((len(tensors), *v.shape), v.dtype) for k, v in parts[0].items()}
    for r, part in enumerate(parts):
        for name, view in part.items():
            _copy(planes[name][r], view)
    return Packed(planes, form)


def _copy(to: np.ndarray, view: np.ndarray) -> None:
    """Copies [..., n] arrays as [...] of opaque n-element items: up to five times as fast as element by element."""
    item = np.dtype((np.void, view.shape[-1] * view.dtype.itemsize))
    np.copyto(to.view(item), view.view(item))


def _format(name: str, decode: Callable[[Planes], Array], **fields: tuple[str, int]) -> Format:
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return Format(name, block, np.dtype([(field, kind, (n,)) for field, (kind, n) in fields.items()]), decode)


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _bits(x: Array, width: int, runs: int = 1) -> Array:
    """Unpacks codes of `width` bits, u8 [..., n * 8 // width], from bytes [..., n].

    The bytes fall into equal runs. In each, the lowest bits of all bytes come first, then the next lowest, and so on.
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    codes = x.reshape(*x.shape[:-1], runs, 1, -1) >> shifts & np.uint8(2**width - 1)
    return codes.reshape(*x.shape[:-1], -1)


def _affine(codes: Array, scales: Array, mins: Array | None = None) -> Array:
    """scale · code - min in f32; a scale [..., n] and a min belong to n equal runs of the codes [..., n * m]."""
    y = scales[..., None] * _f32(codes.reshape(*scales.shape, -1))
    y = y if mins is None else y - mins[..., None]
    return y.reshape(codes.shape)


def _q4_0(p: Planes) -> Array:
    return _affine(_f32(_bits(p["qs"], 4)) - 8, _f32(p["d"]))


def _q4_1(p: Planes) -> Array:
    return _affine(_bits(p["qs"], 4), _f32(p["d"]), -_f32(p["m"]))


def _q5_codes(p: Planes) -> Array:
    return _bits(p["qs"], 4) | _bits(p["qh"], 1, runs=4) << 4


def _q5_0(p: Planes) -> Array:
    return _affine(_f32(_q5_codes(p)) - 16, _f32(p["d"]))


def _q5_1(p: Planes) -> Array:
    return _affine(_q5_codes(p), _f32(p["d"]), -_f32(p["m"]))


def _q8_0(p: Planes) -> Array:
    return _affine(p["qs"], _f32(p["d"]))


def _q2_k(p: Planes) -> Array:
    scales, mins = p["scales"] & 15, p["scales"] >> 4
    return _affine(_bits(p["qs"], 2, runs=2), _f32(p["d"]) * _f32(scales), _f32(p["dmin"]) * _f32(mins))


def _q3_k(p: Planes) -> Array:
    codes = _bits(p["qs"], 2, runs=2) | _bits(p["hmask"], 1) << 2
    scales = _bits(p["scales"][..., :8], 4) | _bits(p["scales"][..., 8:], 2) << 4
    return _affine(_f32(codes) - 4, _f32(p["d"]) * (_f32(scales) - 32))


def _k_scales(p: Planes) -> tuple[Array, Array]:
    """The 8 scales and 8 mins of a Q4_K or Q5_K block: pairs of 6 bits, of which the last four lie in two places."""
    low, rest = p["scales"][..., :8], p["scales"][..., 8:]
    low = low.reshape(*low.shape[:-1], 2, 4)  # [scale or min, run]
    last = jnp.stack([rest & 15, rest >> 4], axis=-2) | (low >> 6) << 4
    pairs = _f32(jnp.concatenate([low & 63, last], axis=-1))
    return _f32(p["d"]) * pairs[..., 0, :], _f32(p["dmin"]) * pairs[..., 1, :]


def _q4_k(p: Planes) -> Array:
    return _affine(_bits(p["qs"], 4, runs=4), *_k_scales(p))


def _q5_k(p: Planes) -> Array:
    return _affine(_bits(p["qs"], 4, runs=4) | _bits(p["qh"], 1) << 4, *_k_scales(p))


def _q6_k(p: Planes) -> Array:
    codes = _bits(p["ql"], 4, runs=2) | _bits(p["qh"], 2, runs=2) << 4
    return _affine(_f32(codes) - 32, _f32(p["d"]) * _f32(p["scales"]))


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_nl(p: Planes) -> Array:
    return _affine(jnp.asarray(IQ4, jnp.float32)[_bits(p["qs"], 4)], _f32(p["d"]))


def _iq4_xs(p: Planes) -> Array:
    scales = _bits(p["scales_l"], 4, runs=4) | _bits(p["scales_h"], 2, runs=2) << 4
    return _affine(jnp.asarray(IQ4, jnp.float32)[_bits(p["qs"], 4, runs=8)], _f32(p["d"]) * (_f32(scales) - 32))


# A table of all values, f32 [exponent byte, code]: XLA's CPU backend takes subnormals (bytes 0, 1) for zeros.
E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
with np.errstate(over="ignore"):  # the largest become infinite, as in ggml
    _MXFP4 = np.ldexp(E2M1_TWICE, np.arange(256)[:, None] - 128).astype(np.float32)


def _mxfp4(p: Planes) -> Array:
    return jnp.asarray(_MXFP4)[p["e"], _bits(p["qs"], 4)]


PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(jnp.bfloat16),
}
_HALF = ("<f2", 1)
FORMATS = {
    GGMLQuantizationType[f.name]: f
    for f in (
        _format("Q4_0", _q4_0, d=_HALF, qs=("u1", 16)),
        _format("Q4_1", _q4_1, d=_HALF, m=_HALF, qs=("u1", 16)),
        _format("Q5_0", _q5_0, d=_HALF, qh=("u1", 4), qs=("u1", 16)),
        _format("Q5_1", _q5_1, d=_HALF, m=_HALF, qh=("u1", 4), qs=("u1", 16)),
        _format("Q8_0", _q8_0, d=_HALF, qs=("i1", 32)),
        _format("Q2_K", _q2_k, scales=("u1", 16), qs=("u1", 64), d=_HALF, dmin=_HALF),
        _format("Q3_K", _q3_k, hmask=("u1", 32), qs=("u1", 64), scales=("u1", 12), d=_HALF),
        _format("Q4_K", _q4_k, d=_HALF, dmin=_HALF, scales=("u1", 12), qs=("u1", 128)),
        _format("Q5_K", _q5_k, d=_HALF, dmin=_HALF, scales=("u1", 12), qh=("u1", 32), qs=("u1", 128)),
        _format("Q6_K", _q6_k, ql=("u1", 128), qh=("u1", 64), scales=("i1", 16), d=_HALF),
        _format("IQ4_NL", _iq4_nl, d=_HALF, qs=("u1", 16)),
        _format("IQ4_XS", _iq4_xs, d=_HALF, scales_h=("u1", 2), scales_l=("u1", 4), qs=("u1", 128)),
        _format("MXFP4", _mxfp4, e=("u1", 1), qs=("u1", 16)),
    )
}
