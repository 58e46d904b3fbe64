"""Layouts of arrays, and what a thread does with the 32 bits of a register, where arrays of bytes would hide them.

Arrays are of a warpgroup; a layout says which thread holds what. Each function has a plain jnp form of the same
meaning, for the interpreter, which has no registers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Int, Shaped

PARTIAL_STORE: Any = getattr(plgpu, "store", None)  # jax 0.12 has it
SomeLayout: Any = plgpu.Layout.__mro__[1]  # has no public name
inline: Any = plgpu.inline_mgpu  # the decorated function's first argument, a context, is not its caller's

type Words = Shaped[Array, "16 4 4"]  # [row, warp, t]
type Sums = Shaped[Array, "16 4 8"]  # [row, warp, column]
type Heads = Shaped[Array, "16 4"]  # [row, warp]

PERMUTED = (0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)  # of 16 columns, as `operand` has them


@dataclass(frozen=True)
class _Layout(SomeLayout):
    """A layout that is made once. Pallas makes its own, and those reduced from them, anew for each use."""

    made: fa.TiledLayout

    def to_mgpu(self) -> fa.TiledLayout:
        return self.made

    def reduce(self, axes: int | Sequence[int]) -> "_Layout":
        return _Layout(self.made.reduce((axes,) if isinstance(axes, int) else axes))


def layout(tiles: Sequence[tuple[int, ...]], warps: Sequence[Any], lanes: Sequence[Any], vector: int = -1) -> Any:
    """A layout by its tilings, and by the dimensions that they make: of warps, of lanes, and in a register.

    See jax.experimental.mosaic.gpu.fragmented_array.TiledLayout.
    """
    t = fa.TiledLayout(fa.Tiling(tuple(tiles)), tuple(warps), tuple(lanes), vector, _check_canonical=False)
    return _Layout(t.canonicalize())


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

# Rows of a product in pairs, to be stored as columns; and in the order of PERMUTED, see permute_rows.
TURNED = plgpu.Layout.WGMMA_TRANSPOSED
TURNED_PERMUTED = layout([(64, 8), (16, 8), (8, 8), (4, 8), (2, 2), (2, 1)], (-12,), (-6, -8, -3, -5), -2)


def bytes_layout(size: int, rows: int = 16) -> Any:
    """Of [row, byte], where each warp has `size` bytes of a row: bytes 4 t to 4 t + 3 of every 16.

    Warps share the bytes of 16 rows, or 64 rows.
    """
    if rows == 64:
        return layout([(64, size), (16, size), (8, 16), (4,)], (-7,), (-3, -2))
    return layout([(16, 4 * size), (8, size), (8, 16), (4,)], (-6,), (-3, -2))


def when(condition: Any, do: Callable[[], None]) -> None:
    """do() where a condition holds. pl.when casts it to a number; for each cast jax 0.11 asks ptxas for its version."""
    if condition is True:
        do()
    else:
        lax.switch(lax.select(condition, jnp.int32(1), jnp.int32(0)), [lambda: None, do])


def gather(ref: Any, index: Int[Array, "*n"], layout: Any, *, interpret: bool) -> Array:
    """ref[index] of a vector in device memory, for an index in the layout; a register's elements are neighbours.

    So tiles have rows from wherever they lie, without a copy of them.
    """
    if interpret:
        return ref[...][index]
    out = plgpu.ShapeDtypeStruct(index.shape, ref.dtype, layout)

    @inline(arg_types=(plgpu.RefType(), layout), return_type=out)
    def load(ctx: Any, ref: Any, index: fa.FragmentedArray) -> fa.FragmentedArray:
        element, made = ir.MemRefType(ref.type).element_type, layout.to_mgpu()
        kind = ir.VectorType.get((made.vector_length,), element)
        registers = np.empty_like(index.registers)
        for i, register in np.ndenumerate(index.registers):
            place = _element(register)
            registers[i] = llvm.load(kind, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [place], element))
        signed = True if isinstance(element, ir.IntegerType) else None
        return fa.FragmentedArray(_registers=registers, _layout=made, _is_signed=signed)

    return load(ref, index)


def store(ref: Any, value: Array) -> None:
    """ref[...] = value, whether or not it fills whole sectors and lines of device memory, or is without conflicts.

    jax 0.12 refuses a store that is not, unless it is told so; jax 0.11 takes any, and cannot be told.
    """
    if PARTIAL_STORE is None:
        ref[...] = value
    else:
        PARTIAL_STORE(ref, value, optimized=False)


def write(ref: Any, value: Array, layout: Any, *, interpret: bool) -> None:
    """ref[...] = value in shared memory; who reads it has to `meet` before. A plain store waits for all, twice."""
    if interpret:
        ref[...] = value
        return

    @inline(arg_types=(plgpu.RefType(), layout), return_type=None)
    def put(ctx: Any, ref: Any, value: fa.FragmentedArray) -> None:
        value.store_untiled(ref, optimized=False)

    put(ref, value)


def meet(*, interpret: bool) -> None:
    """The threads of a warpgroup wait for each other, and see what was stored in shared memory.

    A copy by TMA may still overtake loads from there that came before: plgpu.commit_smem waits for those.
    """
    if interpret:
        plgpu.commit_smem()
        return

    @inline(return_type=None)
    def wait(ctx: Any) -> None:
        mgpu.utils.warpgroup_barrier()

    wait()


def landed(words: Sequence[Words], spare: Any, *, interpret: bool) -> None:
    """The threads of a warpgroup wait for each other, each until it has the words that it loads from shared memory.

    A copy by TMA may then overwrite them. A barrier alone would not wait for loads, and a fence waits for those from
    device memory as well, up to a microsecond. So a store to 4 bytes that nobody reads, which words that are all ones
    would make, comes before the barrier: it needs the words.
    """
    if interpret:
        plgpu.commit_smem()
        return

    @inline(arg_types=((WORDS,) * len(words), plgpu.RefType()), return_type=None)
    def wait(ctx: Any, words: Any, spare: Any) -> None:
        given = [_element(r) for one in words for r in one.registers.flatten()]
        every = given[0]
        for word in given[1:]:
            every = arith.andi(every, word)
        ptx = "{ .reg .pred p; setp.eq.b32 p, $0, -1; @p st.shared.b32 [$1], $0; }"
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [every, llvm.ptrtoint(_i32(), mgpu.utils.memref_ptr(spare))],
            ptx,
            "r,r,~{memory}",
            has_side_effects=True,
        )
        mgpu.utils.warpgroup_barrier()

    wait(tuple(words), spare)


def readable(ref: Any, *, interpret: bool) -> Any:
    """A ref in shared memory that may be reshaped and loaded from; for the interpreter, which cannot, its value."""
    return ref[...] if interpret else ref


def load(ref: Any, index: Sequence[Any], layout: Any) -> Array:
    """ref[index], of a ref or of what `readable` gives."""
    if not isinstance(ref, Array):
        return plgpu.load(ref.at[tuple(index)], layout=layout, optimized=False)
    axis = 0
    for i in index:
        if isinstance(i, pl.Slice):
            ref, axis = lax.dynamic_slice_in_dim(ref, i.start, int(i.size), axis), axis + 1
        else:
            ref = lax.dynamic_index_in_dim(ref, i, axis, keepdims=False)
    return ref


def words(x: Shaped[Array, "rows n"], *, interpret: bool) -> tuple[Words, ...]:
    """The little-endian words of each 16 bytes of a warp, in `bytes_layout`."""
    rows, width = x.shape
    count = width * rows // 1024
    if interpret:
        w = lax.bitcast_convert_type(x.reshape(-1, 16, width // (16 * count), count, 4, 4), jnp.int32)
        w = w.swapaxes(0, 1).reshape(16, 4, count, 4)
        return tuple(w[:, :, i] for i in range(count))
    one = plgpu.ShapeDtypeStruct((16, 4, 4), jnp.int32, WORDS)

    @inline(arg_types=(bytes_layout(16 * count, rows),), return_type=(one,) * count)
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
        two = [a[..., None] if of == HEADS else jnp.repeat(a, 4 // a.shape[-1], axis=-1) for a in (first, second)]
        return jnp.stack([jnp.broadcast_to(a, (16, 4, 4)) for a in two], axis=-1).reshape(16, 4, 8)

    @inline(arg_types=(of, of), return_type=plgpu.ShapeDtypeStruct((16, 4, 8), first.dtype, SUMS))
    def relabel(ctx: Any, first: fa.FragmentedArray, second: fa.FragmentedArray) -> fa.FragmentedArray:
        a, b = ([_element(r) for r in one.registers.flatten()] for one in (first, second))
        kind = ir.VectorType.get((2,), first.mlir_dtype)
        rows = [vector.from_elements(kind, [a[i % len(a)], b[i % len(b)]]) for i in (0, 1)]
        return _array(rows, SUMS, (16, 4, 8), first.is_signed)

    return relabel(first, second)


def products(
    accs: tuple[Sums, ...],
    a: Sequence[tuple[Words, ...]],
    b: tuple[Int[Array, "*warp 4 2 4"], ...],
    s: int,
    *,
    interpret: bool,
) -> tuple[Sums, ...]:
    """Products of signed bytes for each warp, of four `a`, of groups 4 s + t, with b: 16 or 32 of a row (mma.sync).

    Of the t-th, columns 2 t and 2 t + 1 become column 2 t + s of accs: each of an array of its own, or of a single one,
    256 times the first plus the second. b is of LIMBS, of all warps or of each.
    """
    if interpret:
        for t, words in enumerate(a):
            rows, columns = ([lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int32) for x in xs] for xs in (words, b))
            columns = [jnp.broadcast_to(y.reshape(-1, 8, 4, 4), (4, 8, 4, 4)) for y in columns]
            limbs: Any = sum(jnp.einsum("rwti,wgti->rwg", x, y) for x, y in zip(rows, columns, strict=True))
            first, second = limbs[:, :, 2 * t], limbs[:, :, 2 * t + 1]
            values = (256 * first + second,) if len(accs) == 1 else (first, second)
            accs = tuple(acc.at[:, :, 2 * t + s].set(value) for acc, value in zip(accs, values, strict=True))
        return accs
    n, out = len(b), plgpu.ShapeDtypeStruct((16, 4, 8), jnp.int32, SUMS)
    of = LIMBS if b[0].ndim == 4 else LIMBS.reduce((0,))
    names = [f"${i}" for i in range(8 + 3 * n)]
    groups = (names[:4], names[4 : 4 + 2 * n], names[4 + 2 * n : 4 + 3 * n], names[4 + 3 * n :])
    operands = ", ".join(f"{{{','.join(group)}}}" for group in groups)
    ptx = f"mma.sync.aligned.m16n8k{16 * n}.row.col.s32.s8.s8.s32 {operands};"
    constraints = ",".join(["=r"] * 4 + ["r"] * (4 + 3 * n))

    @inline(arg_types=((SUMS,) * len(accs), ((WORDS,) * n,) * len(a), (of,) * n), return_type=(out,) * len(accs))
    def multiply(ctx: Any, accs: Any, a: Any, b: Any) -> tuple[fa.FragmentedArray, ...]:
        rows = [[[_element(r, i) for i in (0, 1)] for r in acc.registers.flatten()] for acc in accs]
        lane, zero = arith.remui(mgpu.utils.thread_idx(), mgpu.c(4, _i32())), mgpu.c(0, _i32())
        for t, words in enumerate(a):
            given = [_element(r) for x in (*words, *b) for r in x.registers.flatten()]
            four = llvm.StructType.get_literal([_i32()] * 4)
            made = llvm.inline_asm(four, [*given, *[zero] * 4], ptx, constraints, has_side_effects=False)
            mine = arith.cmpi(arith.CmpIPredicate.eq, lane, mgpu.c(t, _i32()))
            for half in (0, 1):
                values = [llvm.extractvalue(_i32(), made, [2 * half + i]) for i in (0, 1)]
                if len(accs) == 1:
                    values = [arith.addi(arith.muli(values[0], mgpu.c(256, _i32())), values[1])]
                for row, value in zip(rows, values, strict=True):
                    row[half][s] = arith.select(mine, value, row[half][s])
        pair = ir.VectorType.get((2,), _i32())
        return tuple(_array([vector.from_elements(pair, one) for one in row], SUMS, (16, 4, 8)) for row in rows)

    return multiply(accs, tuple(a), b)


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


def operand(
    codes: tuple[Words, ...],
    scale: Sums,
    offset: Sums | None,
    groups: tuple[int, ...],
    *,
    signed: int,
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "64 n"]:
    """scale * code + offset, the left operand of a product: 16 columns for each word of codes, which is of one group.

    Its rows are 16 of each warp, its columns lie in the order of PERMUTED. `signed` says which codes there are: 0 for
    0 to 127, 7 for -64 to 63, 8 for any byte, which has no offset. Sums are rounded as f32, and then once more.
    """
    n = 16 * len(codes)
    if interpret:
        columns = [2 * (q % 4) + q // 4 for q in groups]
        out = []
        for word, column in zip(codes, columns, strict=True):
            y = lax.bitcast_convert_type(word, jnp.int8).astype(jnp.float32) * scale[:, :, column, None, None]
            y = y if offset is None else y + offset[:, :, column, None, None]
            out.append(y.reshape(16, 4, 4, 2, 2).transpose(1, 0, 3, 2, 4).reshape(64, 16))
        return jnp.concatenate(out, axis=1).astype(dtype)
    # A byte u that is below 128 becomes the number 128 + u, which the offset takes back; any other 2^23 + u.
    if signed < 8:
        offset = (0 if offset is None else offset) - (192 if signed else 128) * scale
        number = "prmt.b32 f{0}, u, 0x43000000, 0x7{0}44; fma.rn.f32 f{0}, f{0}, $3, $4;"
        unsigned = "and.b32 u, $2, 0x7F7F7F7F; xor.b32 u, u, 0x40404040;" if signed else "mov.b32 u, $2;"
    else:
        number = "prmt.b32 f{0}, u, 0x4B000000, 0x744{0}; sub.f32 f{0}, f{0}, 0f4B000080; mul.f32 f{0}, f{0}, $3;"
        unsigned = "xor.b32 u, $2, 0x80808080;"
        offset = scale
    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    ptx = f"{{ .reg .b32 u; .reg .f32 f<4>; {unsigned} {''.join(map(number.format, range(4)))}"
    ptx += f" cvt.rn.{kind}x2.f32 $0, f1, f0; cvt.rn.{kind}x2.f32 $1, f3, f2; }}"
    out = plgpu.ShapeDtypeStruct((64, n), jnp.dtype(dtype), plgpu.Layout.WGMMA)

    @inline(arg_types=((WORDS,) * len(codes), SUMS, SUMS), return_type=out)
    def decode(ctx: Any, codes: Any, scale: Any, offset: Any) -> fa.FragmentedArray:
        def of_group(x: Any, row: int, q: int) -> Any:
            return _of_quad(_element(x.registers.flatten()[row], q // 4), q % 4)

        numbers = {
            (row, q): [of_group(x, row, q) for x in (scale, offset)] for q in sorted(set(groups)) for row in (0, 1)
        }
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        made = np.empty((len(codes), 2, 2), dtype=object)  # [word, column half, row]
        for i, (word, q) in enumerate(zip(codes, groups, strict=True)):
            for row, register in enumerate(word.registers.flatten()):
                given = [_element(register), *numbers[row, q]]
                two = llvm.StructType.get_literal([_i32()] * 2)
                both = llvm.inline_asm(two, given, ptx, "=r,=r,r,f,f", has_side_effects=False)
                for half in (0, 1):
                    made[i, half, row] = mgpu.utils.bitcast(llvm.extractvalue(_i32(), both, [half]), pair)
        return _array(made, plgpu.Layout.WGMMA, (64, n), None)

    return decode(codes, scale, offset)


def permute_rows(x: Shaped[Array, "64 n"], *, interpret: bool) -> Shaped[Array, "64 n"]:
    """Each 16 rows of x, which is TURNED, in the order of PERMUTED; pairs of rows stay together."""
    if interpret:
        return x.reshape(4, 4, 2, 2, -1).swapaxes(1, 2).reshape(x.shape)

    @inline(arg_types=(TURNED,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, TURNED_PERMUTED))
    def exchange(ctx: Any, x: fa.FragmentedArray) -> fa.FragmentedArray:
        lane = arith.andi(mgpu.utils.thread_idx(), mgpu.c(8, _i32()))
        even = arith.cmpi(arith.CmpIPredicate.eq, lane, mgpu.c(0, _i32()))
        out = []
        for first, second in x.registers.reshape(-1, 2):  # 8 rows apart
            keep, give = arith.select(even, first, second), arith.select(even, second, first)
            taken = mgpu.utils.shfl_bfly(give, 8)
            out += [arith.select(even, keep, taken), arith.select(even, taken, keep)]
        return _array(out, TURNED_PERMUTED, x.shape, None)

    return exchange(x)


def _of_quad(x: Any, lane: int) -> Any:
    """The f32 that one of each four lanes has."""
    ptx = f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1C1F, 0xFFFFFFFF;"
    return llvm.inline_asm(x.type, [x], ptx, "=f,f", has_side_effects=True)


def halves(rows: int, own: int) -> Any:
    """Layout of [row, column] of 16 bits, where each warp has `own` columns of 16 rows, or of 8.

    Lane 4 g + t has 8 neighbours of every 32 columns, from 8 t on, in rows g and g + 8: 16 bytes, one load.
    """
    return layout([(rows, 4 * own), (8, own), (8, 32), (8,)], (-6,), (-3, -2))


def mma_halves(acc: Sums, a: Float[Array, "16 n"], b: Float[Array, "8 n"], *, interpret: bool) -> Sums:
    """acc + a b' for each warp, of its columns of a and b (mma.sync), both in `halves` and of one type; sums in f32.

    The two products of 32 columns take 4 of each 8 neighbours: which columns a product joins is the same for a and b.
    """
    own = a.shape[1] // 4
    if interpret:
        rows, columns = (x.astype(jnp.float32).reshape(len(x), 4, own) for x in (a, b))
        return acc + jnp.einsum("rwk,nwk->rwn", rows, columns)
    kind = "bf16" if a.dtype == jnp.bfloat16 else "f16"
    ptx = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    ptx += " {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    out = plgpu.ShapeDtypeStruct((16, 4, 8), jnp.float32, SUMS)

    @inline(arg_types=(SUMS, halves(16, own), halves(8, own)), return_type=out)
    def multiply(ctx: Any, acc: Any, a: Any, b: Any) -> fa.FragmentedArray:
        sums = [_element(r, i) for r in acc.registers.flatten() for i in (0, 1)]
        rows = np.array([_cast(r, (4,)) for r in a.registers.flatten()], dtype=object).reshape(2, -1)
        columns = [_cast(r, (4,)) for r in b.registers.flatten()]
        f32, constraints = ir.F32Type.get(), ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
        for i, column in enumerate(columns):
            for words in ((0, 1), (2, 3)):
                given = [_element(row, j) for j in words for row in rows[:, i]] + [_element(column, j) for j in words]
                four = llvm.StructType.get_literal([f32] * 4)
                made = llvm.inline_asm(four, [*given, *sums], ptx, constraints, has_side_effects=False)
                sums = [llvm.extractvalue(f32, made, [j]) for j in range(4)]
        pairs = [vector.from_elements(ir.VectorType.get((2,), f32), sums[j : j + 2]) for j in (0, 2)]
        return _array(pairs, SUMS, (16, 4, 8), None)

    return multiply(acc, a, b)
