"""Layouts of arrays, and what a thread does with the 32 bits of a register, where arrays of bytes would hide them.

Arrays are of a warpgroup; a layout says which thread holds what. Each function has a plain jnp form of the same
meaning, for the interpreter, which has no registers.
"""

from collections.abc import Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Int, Shaped

inline: Any = plgpu.inline_mgpu  # the decorated function's first argument, a context, is not its caller's

type Words = Shaped[Array, "16 4 4"]  # [row, warp, t]
type Sums = Shaped[Array, "16 4 8"]  # [row, warp, column]
type Heads = Shaped[Array, "16 4"]  # [row, warp]


def layout(tiles: Sequence[tuple[int, ...]], warps: Sequence[Any], lanes: Sequence[Any]) -> Any:
    """A layout by its tilings, and by the dimensions that they make which warps and lanes share; a register's is last.

    See jax.experimental.mosaic.gpu.fragmented_array.TiledLayout.
    """
    t = fa.TiledLayout(fa.Tiling(tuple(tiles)), tuple(warps), tuple(lanes), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(t.tiling, t.warp_dims, t.lane_dims, t.vector_dim)


def tiled(width: int, bits: int = 16) -> tuple[Any, Any]:
    """How rows of so many numbers lie in shared memory, for products, and for loads and stores without conflicts."""
    swizzle = plgpu.find_swizzle(bits * width)
    tiling, swizzling = plgpu.TilingTransform, plgpu.SwizzleTransform
    return tiling((8, swizzle * 8 // bits)), swizzling(swizzle)  # pyright: ignore[reportAbstractUsage]


# Lane 4 g + t of a warp: of 16 rows it has g and g + 8, of 4 columns t, of 8 columns 2 t and 2 t + 1.
WORDS = layout([(16, 4, 4), (8, 1, 4), (1,)], (-6,), (-4, -2))
SUMS = layout([(16, 4, 8), (8, 1, 8), (2,)], (-6,), (-4, -2))
HEADS = SUMS.reduce((2,))  # [row, warp]
HEAD_BYTES = layout([(16, 4, 4), (8, 1, 4)], (-5,), (-3, fa.Replicated(4)))  # [row, warp, byte]: all 4
LIMBS = layout([(4, 4, 2, 4), (1, 4, 2, 4), (1,)], (-9,), (-4, -3, -2))  # [warp, g // 2, g % 2, t]
COLUMNS = layout([(4, 4), (1, 4), (1,)], (-5,), (fa.Replicated(8), -2))  # [warp, t]
COUPLES = layout([(4, 2), (1, 2), (1,)], (-5,), (fa.Replicated(8), -2, fa.Replicated(2)))  # [warp, t // 2]


def bytes_layout(size: int) -> Any:
    """Of [row, byte], where each warp has `size` bytes of a row: bytes 4 t to 4 t + 3 of every 16."""
    return layout([(16, 4 * size), (8, size), (8, 16), (4,)], (-6,), (-3, -2))


def words(x: Shaped[Array, "16 n"], *, interpret: bool) -> tuple[Words, ...]:
    """The little-endian words of each 16 bytes of a warp, in `bytes_layout`."""
    count = x.shape[1] // 64
    if interpret:
        w = lax.bitcast_convert_type(x.reshape(16, 4, count, 4, 4), jnp.int32)
        return tuple(w[:, :, i] for i in range(count))
    one = plgpu.ShapeDtypeStruct((16, 4, 4), jnp.int32, WORDS)

    @inline(arg_types=(bytes_layout(16 * count),), return_type=(one,) * count)
    def relabel(ctx: Any, x: fa.FragmentedArray) -> tuple[fa.FragmentedArray, ...]:
        found = np.array([_cast(r, (1,)) for r in x.registers.flatten()], dtype=object).reshape(2, count)
        return tuple(_array(found[:, i], WORDS, (16, 4, 4)) for i in range(count))

    return relabel(x)


def head_word(x: Shaped[Array, "16 4 4"], *, interpret: bool) -> Heads:
    """The little-endian word of 4 bytes in HEAD_BYTES."""
    if interpret:
        return lax.bitcast_convert_type(x, jnp.int32)

    @inline(arg_types=(HEAD_BYTES,), return_type=plgpu.ShapeDtypeStruct((16, 4), jnp.int32, HEADS))
    def relabel(ctx: Any, x: fa.FragmentedArray) -> fa.FragmentedArray:
        return _array([_cast(r, (1,)) for r in x.registers.flatten()], HEADS, (16, 4))

    return relabel(x)


def spread(first: Array, second: Array, of: Any, *, interpret: bool) -> Sums:
    """[row, warp, column]: columns 2 t from the first, 2 t + 1 from the second of two arrays in the layout `of`.

    They are [row, warp], [row, warp, t], [warp, t] or, a value for two of t, [warp, t // 2].
    """
    if interpret:
        axes = {HEADS: (slice(None), slice(None), None), COLUMNS: (None,), COUPLES: (None,), WORDS: ()}[of]
        two = (jnp.repeat(a, 2, axis=1) if of == COUPLES else a for a in (first, second))
        return jnp.stack([jnp.broadcast_to(a[axes], (16, 4, 4)) for a in two], axis=-1).reshape(16, 4, 8)

    @inline(arg_types=(of, of), return_type=plgpu.ShapeDtypeStruct((16, 4, 8), first.dtype, SUMS))
    def relabel(ctx: Any, first: fa.FragmentedArray, second: fa.FragmentedArray) -> fa.FragmentedArray:
        a, b = ([_element(r) for r in one.registers.flatten()] for one in (first, second))
        kind = ir.VectorType.get((2,), first.mlir_dtype)
        rows = [vector.from_elements(kind, [a[i % len(a)], b[i % len(b)]]) for i in (0, 1)]
        return _array(rows, SUMS, (16, 4, 8), first.is_signed)

    return relabel(first, second)


def mma(acc: Sums, a: tuple[Words, ...], b: tuple[Int[Array, "4 4 2 4"], ...], *, interpret: bool) -> Sums:
    """acc + a b for each warp: of signed bytes, 16 of a row and a column for each of a and b, 1 or 2 (mma.sync)."""
    if interpret:
        rows, columns = ([lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int32) for x in xs] for xs in (a, b))
        return acc + sum(
            jnp.einsum("rwti,wgti->rwg", x, y.reshape(4, 8, 4, 4)) for x, y in zip(rows, columns, strict=True)
        )
    out, n = plgpu.ShapeDtypeStruct((16, 4, 8), jnp.int32, SUMS), len(a)

    @inline(arg_types=(SUMS, (WORDS,) * n, (LIMBS,) * n), return_type=out)
    def multiply(ctx: Any, acc: Any, a: Any, b: Any) -> fa.FragmentedArray:
        sums = [_element(r, i) for r in acc.registers.flatten() for i in (0, 1)]
        given = [_element(r) for x in (*a, *b) for r in x.registers.flatten()]
        names = [f"${i}" for i in range(8 + 3 * n)]
        groups = (names[:4], names[4 : 4 + 2 * n], names[4 + 2 * n : 4 + 3 * n], names[4 + 3 * n :])
        operands = ", ".join(f"{{{','.join(group)}}}" for group in groups)
        made = llvm.inline_asm(
            llvm.StructType.get_literal([_i32()] * 4),
            [*given, *sums],
            f"mma.sync.aligned.m16n8k{16 * n}.row.col.s32.s8.s8.s32 {operands};",
            ",".join(["=r"] * 4 + ["r"] * (4 + 3 * n)),
            has_side_effects=False,
        )
        got = [llvm.extractvalue(_i32(), made, [i]) for i in range(4)]
        pairs = [vector.from_elements(ir.VectorType.get((2,), _i32()), got[i : i + 2]) for i in (0, 2)]
        return _array(pairs, SUMS, (16, 4, 8))

    return multiply(acc, a, b)


def put(acc: Sums, limbs: Sums, group: int, *, interpret: bool) -> Sums:
    """acc where column 2 t + s is now 256 times column 2 t of `limbs` plus its column 2 t + 1, for group 4 s + t."""
    s, t = divmod(group, 4)
    if interpret:
        return acc.at[:, :, 2 * t + s].set(256 * limbs[:, :, 2 * t] + limbs[:, :, 2 * t + 1])

    @inline(arg_types=(SUMS, SUMS), return_type=plgpu.ShapeDtypeStruct((16, 4, 8), jnp.int32, SUMS))
    def select(ctx: Any, acc: fa.FragmentedArray, limbs: fa.FragmentedArray) -> fa.FragmentedArray:
        lane = arith.remui(mgpu.utils.thread_idx(), mgpu.c(4, _i32()))
        mine = arith.cmpi(arith.CmpIPredicate.eq, lane, mgpu.c(t, _i32()))
        out = []
        for old, new in zip(acc.registers.flatten(), limbs.registers.flatten(), strict=True):
            value = arith.addi(arith.muli(_element(new, 0), mgpu.c(256, _i32())), _element(new, 1))
            pair = [_element(old, 0), _element(old, 1)]
            pair[s] = arith.select(mine, value, pair[s])
            out.append(vector.from_elements(ir.VectorType.get((2,), _i32()), pair))
        return _array(out, SUMS, (16, 4, 8))

    return select(acc, limbs)


def lookup(x: Words, table: Sequence[int], *, interpret: bool) -> Words:
    """Of each byte i of words, below 16, the signed byte table[i]: permutations of bytes by 3 bits, and a choice."""
    if interpret:
        index = lax.bitcast_convert_type(x, jnp.uint8)
        picked = sum(jnp.where(index == i, value, 0) for i, value in enumerate(table))
        return lax.bitcast_convert_type(jnp.asarray(picked).astype(jnp.int8), jnp.int32)
    quarters = [int(w) for w in np.array(table, np.int8).view(np.int32)]

    @inline(arg_types=(WORDS,), return_type=plgpu.ShapeDtypeStruct((16, 4, 4), jnp.int32, WORDS))
    def permute(ctx: Any, x: fa.FragmentedArray) -> fa.FragmentedArray:
        ptx = (
            "{ .reg .b32 n, s, l, h, m; shr.b32 n, $1, 4; or.b32 n, n, $1; prmt.b32 s, n, 0, 0x4420;"
            " and.b32 s, s, 0x7777; prmt.b32 l, $2, $3, s; prmt.b32 h, $4, $5, s; shr.b32 m, $1, 3;"
            " and.b32 m, m, 0x01010101; mul.lo.u32 m, m, 255; lop3.b32 $0, m, h, l, 0xCA; }"
        )
        out = []
        for r in x.registers.flatten():
            given = [_element(r), *(mgpu.c(q, _i32()) for q in quarters)]
            out.append(_cast(llvm.inline_asm(_i32(), given, ptx, "=r,r,r,r,r,r", has_side_effects=False), (1,)))
        return _array(out, WORDS, (16, 4, 4))

    return permute(x)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _cast(register: Any, shape: tuple[int, ...]) -> Any:
    """A register as a vector of words."""
    return mgpu.utils.bitcast(register, ir.VectorType.get(shape, _i32()))


def _element(register: Any, i: int = 0) -> Any:
    return vector.extract(register, [], ir.DenseI64ArrayAttr.get([i]))


def _array(registers: Any, like: Any, shape: tuple[int, ...], signed: bool | None = True) -> fa.FragmentedArray:
    made = like.to_mgpu()
    return fa.FragmentedArray(
        _registers=np.asarray(registers, dtype=object).reshape(made.registers_shape(shape)),
        _layout=made,
        _is_signed=signed,
    )
