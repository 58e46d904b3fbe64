"""Every format against gguf-py's decoder, and packed weights as pytrees; a new entry of FORMATS is covered at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxinfer.gguf import Tensor
from jaxinfer.quants import FORMATS, PLAIN, Format, Packed, at, dense, pack, rows

EDGES = np.array([0, -0.0, 2**-24, -(2**-24), 1023 * 2**-24, 2**-14, 65504, -65504], np.float16)  # subnormals, extremes
every_format = pytest.mark.parametrize("kind", FORMATS, ids=lambda t: t.name)


def random_blocks(form: Format, n: int, seed: int = 0) -> np.ndarray:
    """n valid blocks as bytes [n, size]: any codes, finite half-precision fields with edge cases, exponents to 254."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n, form.size), np.uint8)
    for field, plane in form.split(raw).items():
        if plane.dtype == np.float16:
            bits = rng.integers(0, 2**16, plane.shape, np.uint16)
            plane[...] = np.where(np.isfinite(bits.view(np.float16)), bits, bits & 0x83FF).view(np.float16)
            pick = rng.random(plane.shape) < 0.1
            plane[pick] = rng.choice(EDGES, pick.sum())
        elif form.name == "MXFP4" and field == "e":
            plane[...] = np.resize(np.arange(255), plane.shape)
    return raw


def tensors(kind: GGMLQuantizationType, repeats: int = 3, out: int = 4, n_blocks: int = 2) -> list[Tensor]:
    form = FORMATS[kind]
    raw = random_blocks(form, repeats * out * n_blocks).reshape(repeats, out, n_blocks * form.size)
    return [Tensor(f"blk.{r}.w", kind, (out, n_blocks * form.block), raw[r]) for r in range(repeats)]


def oracle(ts: list[Tensor]) -> np.ndarray:
    return np.stack([dequantize(t.data, t.type) for t in ts])


def on_device(w):
    return jax.tree.map(jnp.asarray, w)


def assert_same_bits(got, want: np.ndarray):
    got = np.asarray(got)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    np.testing.assert_array_equal(got.view(f"u{want.itemsize}"), want.view(f"u{want.itemsize}"))


def test_all_types_are_there():
    named = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4"
    assert set(named.split()) <= {t.name for t in FORMATS}
    assert [t.name for t in PLAIN] == ["F32", "F16", "BF16"]
    assert all(t.name == form.name for t, form in FORMATS.items())


@every_format
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_decode_equals_gguf_py_bit_for_bit(kind, wrap):
    form = FORMATS[kind]
    raw = random_blocks(form, 2000, seed=1)
    with np.errstate(over="ignore"):  # MXFP4's largest exponents
        want = dequantize(raw, kind)
    assert_same_bits(wrap(form.decode)(on_device(form.split(raw))), want)


@every_format
def test_decode_takes_any_leading_axes(kind):
    form = FORMATS[kind]
    flat = random_blocks(form, 24)
    shapes = [(24, form.size), (1, 24, form.size), (2, 3, 4, form.size)]
    got = jax.jit(lambda planes: [form.decode(p) for p in planes])([form.split(flat.reshape(s)) for s in shapes])
    for s, y in zip(shapes, got, strict=True):
        assert_same_bits(y, dequantize(flat, kind).reshape(*s[:-1], form.block))


@every_format
def test_split_gives_views_that_cover_the_block(kind):
    form = FORMATS[kind]
    assert (form.block, form.size) == GGML_QUANT_SIZES[kind]
    raw = random_blocks(form, 6).reshape(2, 3, form.size)
    planes = form.split(raw)
    assert all(np.shares_memory(raw, plane) for plane in planes.values())
    assert all(plane.shape[:-1] == (2, 3) for plane in planes.values())
    as_bytes = [np.ascontiguousarray(plane).view(np.uint8) for plane in planes.values()]
    np.testing.assert_array_equal(np.concatenate(as_bytes, axis=-1), raw)


@every_format
def test_pack_stacks_tensors_in_as_many_bytes_as_the_file(kind):
    ts = tensors(kind)
    packed = pack(ts)
    assert isinstance(packed, Packed)
    assert all(isinstance(plane, np.ndarray) and plane.flags.c_contiguous for plane in packed.planes.values())
    assert packed.shape == (3, *ts[0].shape)
    assert packed.ndim == 3
    assert packed.size_bytes == sum(t.data.nbytes for t in ts)
    assert on_device(packed).size_bytes == packed.size_bytes
    exact, rounded = jax.jit(lambda w: (dense(w), dense(w, jnp.bfloat16)))(packed)
    assert_same_bits(exact, oracle(ts))
    assert_same_bits(rounded, oracle(ts).astype(jnp.bfloat16))  # rounded once, from f32


@every_format
def test_packed_is_a_pytree_for_every_transformation(kind):
    ts = tensors(kind)
    w, want = on_device(pack(ts)), oracle(ts)
    ids = jnp.array([[3, 0], [1, 1]])

    @jax.jit
    def uses(w, i):
        layers = [at(w, r) for r in range(3)]
        stacked = jax.tree.map(lambda *planes: jnp.stack(planes), *layers)
        assert (layers[1].shape, stacked.shape) == (want.shape[1:], w.shape)
        assert jax.tree.structure(stacked) == jax.tree.structure(w)
        assert rows(layers[1], ids).shape == (2, 2, want.shape[-1])
        experts = jax.tree.map(lambda plane: plane[:, None], w)  # one more leading axis
        return {
            "at": dense(layers[1]),
            "traced at": dense(at(w, i)),
            "stack": dense(stacked),
            "vmap": jax.vmap(dense)(w),
            "scan": jax.lax.scan(lambda _, layer: (None, dense(layer)), None, w)[1],
            "rows": dense(rows(layers[1], ids)),
            "experts": dense(experts),
        }

    got = uses(w, 2)
    assert_same_bits(got["at"], want[1])
    assert_same_bits(got["traced at"], want[2])
    assert_same_bits(got["rows"], want[1][np.asarray(ids)])
    assert_same_bits(got["experts"], want[:, None])
    for whole in ("stack", "vmap", "scan"):
        assert_same_bits(got[whole], want)


@pytest.mark.parametrize("kind", PLAIN, ids=lambda t: t.name)
def test_plain_types_are_arrays(kind):
    dtype = PLAIN[kind]
    values = np.random.default_rng(0).standard_normal((2, 3, 5), np.float32).astype(dtype)
    ts = [Tensor(f"blk.{r}.w", kind, (3, 5), v.view(np.uint8)) for r, v in enumerate(values)]
    w = pack(ts)
    assert isinstance(w, np.ndarray)
    assert_same_bits(w, values)
    w = on_device(w)
    assert_same_bits(dense(w), values.astype(np.float32))
    assert_same_bits(dense(w), oracle(ts))
    assert_same_bits(at(w, 1), values[1])
    assert_same_bits(rows(at(w, 1), jnp.array([2, 0])), values[1][[2, 0]])


def test_pack_names_the_tensor_that_does_not_fit():
    a, b = tensors(GGMLQuantizationType.Q4_0, repeats=2)
    with pytest.raises(ValueError, match=r"'blk.1.w' is Q4_0 \(2, 64\), but 'blk.0.w' is Q4_0 \(4, 64\)"):
        pack([a, b._replace(shape=(2, 64), data=b.data[:2])])
    with pytest.raises(ValueError, match=r"'blk.1.w' is Q4_K .* but 'blk.0.w' is Q4_0"):
        pack([a, b._replace(type=GGMLQuantizationType.Q4_K)])
    with pytest.raises(ValueError, match=r"'blk.0.w' has type TQ1_0; supported types: F32, F16, BF16, Q4_0, "):
        pack([a._replace(type=GGMLQuantizationType.TQ1_0)])
