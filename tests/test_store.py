"""Norms, rotation and writes in one kernel, against float64: interpreted, lowered and compiled, and on a GPU."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from models import rms_norm, rotate

from jaxinfer.cache import KVCache
from jaxinfer.layers.rope import Rope
from jaxinfer.ops.store import store_ampere, store_reference
from jaxinfer.pallas.store import FEW, store

LAYER, EPS = 1, 1e-5
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative error of rounding


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer and a call: positions [B][T], and what the stack of caches is like."""

    pos: tuple[tuple[int, ...], ...]
    kv_heads: int
    group: int
    width: int
    rotated: int = 0  # elements of a head
    interleaved: bool = False
    magnitude: float = 1.0
    norms: bool = False
    norm_values: bool = False
    norm_rotated: bool = False
    values: bool = True  # or they are the keys
    keys: bool = True  # or they are another layer's
    dtype: str = "bfloat16"
    slots: int = 16
    shift: tuple[int, ...] | None = None
    apart: bool = False  # heads have positions of their own

    @property
    def theta(self) -> np.ndarray:
        return 100.0 ** (-np.arange(0, self.rotated, 2) / max(self.rotated, 1))

    @property
    def options(self) -> dict[str, Any]:
        turn = Rope(tuple(self.theta.tolist()), self.interleaved, self.magnitude) if self.rotated else None
        return {"rotation": turn, "eps": EPS, "norm_values": self.norm_values, "norm_rotated": self.norm_rotated}

    def operands(self) -> Any:
        """(q, k, v, cache, layer, pos), norms; every slot of the stack holds something."""
        rng = np.random.default_rng(0)
        pos = jnp.asarray(self.pos, jnp.int32)
        (b, t), heads = pos.shape, self.kv_heads

        def normal(*shape: int, dtype: Any = self.dtype) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

        q, k, v = (normal(b, t, n * self.width) for n in (heads * self.group, heads, heads))
        old_k, old_v = (normal(2, b, heads, self.slots, self.width) for _ in range(2))
        held = jnp.asarray(np.full((2, b, heads if self.apart else 1, self.slots), 1000, np.int32))
        cache = KVCache(old_k, old_v, held, shift=None if self.shift is None else jnp.asarray(self.shift, jnp.int32))
        norms = {x: normal(2, self.width, dtype=jnp.float32) for x in ("q_norm", "k_norm")} if self.norms else {}
        return (q, k if self.keys else None, v if self.keys and self.values else None, cache, LAYER, pos), norms


def check(got: np.ndarray, want: np.ndarray, size: np.ndarray, pos: np.ndarray) -> None:
    """What is normed and what is rotated is rounded, each by a unit at most; an angle in f32 errs by two roundings."""
    unit, got_f64 = UNIT[str(got.dtype)], np.asarray(got, np.float64)
    noise = 2.0**-20 + 2.0**-22 * np.abs(pos)[:, None, None]
    assert (np.abs(got_f64 - want) <= unit * 1.01 * (size + np.abs(want)) + noise * size).all()


def check_case(case: Case, args: tuple, norms: dict, out: jax.Array, cache: KVCache) -> None:
    """Queries of the call and every slot of the stack, against float64."""
    q, k, v, before, _, pos = jax.tree.map(np.asarray, args)
    cache, out = jax.tree.map(np.asarray, (cache, out))
    (b, t), heads, slots = pos.shape, case.kv_heads, case.slots
    weights = {x: np.asarray(w[LAYER], np.float64) for x, w in norms.items()}
    quarter = np.full(case.rotated // 2, np.pi / 2)

    def by_head(x: jax.Array, row: int) -> np.ndarray:
        return np.asarray(x[row], np.float64).reshape(t, -1, case.width)

    def turned(x: np.ndarray, at: np.ndarray, weight: str) -> tuple[np.ndarray, np.ndarray]:
        """With a bound of the elements of each pair."""
        x = rms_norm(x, weights[weight], EPS) if case.norms else x
        y = rotate(x, at, case.theta, case.magnitude, case.interleaved)
        size = np.hypot(y, rotate(y, np.ones(t), quarter, 1.0, case.interleaved))
        scale = rms_norm(y, np.ones(1), EPS) / y if case.norm_rotated else 1.0
        return y * scale, size * np.abs(scale)

    assert out.dtype == q.dtype
    assert out.shape == (b, t, heads, case.group, case.width)
    written = np.zeros(before.k.shape[:4], bool)
    for row, at in enumerate(np.asarray(pos)):
        check(out[row].reshape(t, -1, case.width), *turned(by_head(q, row), at, "q_norm"), at)
        if k is None:
            continue
        real = at >= 0
        slot = ((at - (0 if case.shift is None else case.shift[row])) % slots)[real]
        written[LAYER, row, :, slot] = True
        want, size = turned(by_head(k, row), at, "k_norm")
        check(cache.k[LAYER, row][:, slot].swapaxes(0, 1), want[real], size[real], at[real])
        new, raw = cache.v[LAYER, row][:, slot].swapaxes(0, 1), (k if v is None else v)[row].reshape(t, heads, -1)[real]
        if case.norm_values:
            want = rms_norm(np.asarray(raw, np.float64), np.ones(1), EPS)
            check(new, want, np.abs(want), 0 * at[real])
        else:
            np.testing.assert_array_equal(new, raw)
        for held in cache.pos[LAYER, row]:
            np.testing.assert_array_equal(held[slot], at[real])
    for new, old in ((cache.k, before.k), (cache.v, before.v)):
        np.testing.assert_array_equal(new[~written], old[~written])
    untouched = ~written[:, :, : before.pos.shape[2]]
    np.testing.assert_array_equal(cache.pos[untouched], before.pos[untouched])


QWEN3 = Case(pos=((5,),), kv_heads=2, group=4, width=128, rotated=128, norms=True)
LLAMA = Case(pos=((3, 4, 5), (-1, 0, 1)), kv_heads=4, group=1, width=64, rotated=64, interleaved=True, dtype="float16")
CASES = {
    "head norms": QWEN3,
    "interleaved": LLAMA,
    "normed values, keys as values": replace(
        QWEN3, kv_heads=1, group=2, width=512, rotated=512, values=False, norm_values=True
    ),
    "a ring wraps": replace(QWEN3, width=256, rotated=256, norm_values=True, pos=((47, 48, 49), (15, 16, 17)), group=1),
    "some of a head": replace(QWEN3, width=256, rotated=64, group=3, magnitude=1.2, pos=((9,), (-1,), (2,))),
    "some of a head, interleaved": replace(LLAMA, width=192, norms=True, pos=((70,),)),
    "no rotation": replace(QWEN3, rotated=0, width=64),
    "normed after rotation": replace(LLAMA, norm_rotated=True, dtype="bfloat16"),
    "keys of another layer": replace(QWEN3, keys=False),
    "after an eviction": replace(
        QWEN3,
        kv_heads=3,
        group=1,
        width=64,
        rotated=64,
        shift=(90, 3),
        apart=True,
        pos=(tuple(range(99, 107)), (-1, -1, -1, 7, 8, 9, 10, 11)),
    ),
}


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case):
    args, norms = case.operands()
    run = jax.jit(lambda *x: store(*x, **norms, **case.options, interpret=True))
    check_case(case, args, norms, *mosaic.interpret(run, *args))


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_against_float64(case):
    args, norms = case.operands()
    run = jax.jit(lambda *x: store_reference(*x, **norms, **case.options))
    check_case(case, args, norms, *run(*args))


def test_what_the_kernel_does_not_cover_is_refused():
    def call(case: Case, **changed: Any) -> None:
        args, norms = case.operands()
        store(*args, **norms | changed, **case.options)

    with pytest.raises(NotImplementedError, match="store: queries of float32"):
        call(replace(QWEN3, dtype="float32"))
    with pytest.raises(NotImplementedError, match="heads of 96, of which 64"):
        call(replace(QWEN3, width=96, rotated=64))
    with pytest.raises(NotImplementedError, match="heads of 128, of which 32"):
        call(replace(QWEN3, rotated=32))
    with pytest.raises(NotImplementedError, match="all heads together"):
        call(QWEN3, q_norm=jnp.ones((2, 8 * 128)))
    (q, k, v, cache, _, pos), _ = LLAMA.operands()
    with pytest.raises(ValueError, match="a call of 3 tokens, but this cache was made for 2"):
        store(q, k, v, replace(cache, chunk=2), LAYER, pos, **LLAMA.options)


def test_a_program_says_which_form_it_takes():
    def marks(case: Case) -> str:
        args, norms = case.operands()
        return str(
            jax.make_jaxpr(lambda *x: store_ampere(*x, **norms, **case.options))(*args).pretty_print(name_stack=True)
        )

    few, many = ((tuple(range(n)),) for n in (FEW, FEW + 1))
    assert "[one kernel]" in marks(replace(QWEN3, pos=few))
    assert "[one kernel]" not in marks(replace(QWEN3, pos=many))
    assert "[step by step]" in marks(replace(QWEN3, pos=many))
    assert "[step by step; heads of 96, of which 96 are turned" in marks(replace(QWEN3, width=96, rotated=96))


def programs(arch: tuple[int, int], widths: tuple[int, ...] = (64, 128, 256, 512)) -> Iterator[mosaic.Program]:
    """Kernels as models of every width call them, and those of the cases."""

    def one(name: str, case: Case) -> mosaic.Program:
        args, norms = jax.eval_shape(case.operands)
        return name, lambda args, norms: store(*args, **norms, **case.options), (args, norms)

    for width in widths:
        for interleaved in (False, True):
            case = replace(QWEN3, width=width, rotated=width, interleaved=interleaved, pos=((0,) * FEW,) * 2)
            yield one(f"{width} {interleaved}", case)
    for name, case in CASES.items() if len(widths) > 1 else ():
        yield one(name, case)


@pytest.mark.parametrize("arch", [(8, 0), (9, 0)])  # sm_89 is like sm_80 in what is used here
def test_lowered_for_a_gpu(arch):
    for _, f, args in programs(arch, widths=(128,)):
        assert "mosaic_gpu" in mosaic.lower(f, *args, arch=arch)


@mosaic.needs_ptxas
@pytest.mark.parametrize("arch", mosaic.ARCHS)
def test_compiled_for_a_gpu_without_spills(arch):
    reports = mosaic.ptxas("test_store", arch)
    assert reports.keys() == {name for name, *_ in programs(arch)}
    assert not {name: report for name, report in reports.items() if report[1]}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, FEW])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize(
    "case",
    [
        replace(QWEN3, kv_heads=8, slots=2304),
        replace(QWEN3, kv_heads=16, group=2, width=256, rotated=256, norm_values=True, slots=1280),
        replace(QWEN3, kv_heads=4, group=8, width=512, rotated=512, norm_values=True, values=False, slots=256),
        replace(LLAMA, kv_heads=8, group=4, slots=512, dtype="bfloat16"),
    ],
    ids=["Qwen3-8B", "Gemma 4 31B, sliding", "Gemma 4 31B, full", "Llama 3.2 1B"],
)
def test_on_a_gpu_at_full_size(case, batch, tokens):
    pos = np.random.default_rng(1).integers(0, 30000, (batch, 1)) + np.arange(-2, tokens - 2)
    case = replace(case, pos=tuple(map(tuple, np.maximum(pos, -1).tolist())))
    args, norms = case.operands()
    out, cache = jax.jit(lambda *x: store(*x, **norms, **case.options))(*args)
    check_case(case, args, norms, out, cache)
    with jax.disable_jit():  # or XLA would leave out roundings between its steps
        want, wanted = store_reference(*args, **norms, **case.options)
    np.testing.assert_array_equal(cache.pos, wanted.pos)
    for got, ref in ((out, want), (cache.k[LAYER], wanted.k[LAYER]), (cache.v[LAYER], wanted.v[LAYER])):
        # Sums in another order and fused multiply-adds err by some 2**-22, which turns the rounding of one in 2**-14.
        assert np.mean(np.asarray(got != ref)) <= 2.0**-9
