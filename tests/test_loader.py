"""Loading: what reaches the device, and a `ValueError` with names for every file that does not fit."""

import os
import re
import tracemalloc
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from models import Spec, fuse, keys, save, weights

import jaxinfer
from jaxinfer import loader
from jaxinfer.quants import Packed, dense

pytestmark = pytest.mark.usefixtures("quick_compiler")

TINY = Spec(layers=2, width=8, heads=4, kv_heads=2, head=4, ffn=6, vocab=11)
WIDE = Spec(layers=3, width=256, heads=4, kv_heads=2, head=64, ffn=256, vocab=300)
Q4_K_M = {"1.attn_v": Type.Q6_K, "1.ffn_down": Type.Q6_K, "output.": Type.Q6_K, "attn_norm": Type.F32}
Q4_K_M |= {"ffn_norm": Type.F32, "output_norm": Type.F32, "weight": Type.Q4_K}


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "some-model.gguf")


def refused(path: str, *parts: str) -> str:
    """Loading fails with a message that names the file and has all the parts."""
    with pytest.raises(ValueError, match=re.escape(path)) as error:
        jaxinfer.load(path)
    message = str(error.value)
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize("name", ["mamba", "Llama", "__init__", "llama.py", "../loader", " ", "qwen-2"])
def test_an_unknown_architecture_lists_the_known(path, name):
    save(path, keys(TINY) | {"general.architecture": name}, weights(TINY))
    refused(path, f"the architecture {name!r} is not known; known are {', '.join(loader.architectures())}")


def test_a_file_without_architecture(path):
    save(path, {k: v for k, v in keys(TINY).items() if k != "general.architecture"}, weights(TINY))
    refused(path, "general.architecture must be a string, not None")


REQUIRED = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]


@pytest.mark.parametrize("key", [*REQUIRED, "attention.layer_norm_rms_epsilon"])
def test_a_missing_key(path, key):
    save(path, {k: v for k, v in keys(TINY).items() if k != f"llama.{key}"}, weights(TINY))
    refused(path, f"the metadata has no llama.{key}, which llama needs")


WRONG = {
    "block_count": [0, -1, 2**31 - 1, 2**31, "2", True, 2.0, [2, 3]],
    "context_length": [0, "512", 512.0],
    "embedding_length": [0, -8, "8"],
    "feed_forward_length": [0, [6, 7]],
    "attention.head_count": [0, -4, 3, 2**31, [4, 2], "4"],  # 3: no multiple of 2 key heads
    "attention.head_count_kv": [0, 2**31, [2, 1]],
    "attention.key_length": [0, 5, 2**31 - 1, 2**31, "4"],
    "attention.value_length": [0, 6],
    "attention.layer_norm_rms_epsilon": [0.0, -1e-5, float("nan"), float("inf"), "small"],
    "rope.dimension_count": [0, 3, 6, 2**31 - 1],
    "rope.freq_base": [0.0, -1.0, float("inf"), "10000"],
    "rope.scaling.type": ["longrope", "", 1],
    "rope.scaling.factor": [0.0, -2.0, float("nan"), "2"],
    "rope.scaling.original_context_length": [0, 64.0],
    "rope.scaling.attn_factor": [0.0, float("inf")],
    "rope.scale_linear": [-2.0, "2", [2.0, 2.0], float("nan")],
    "expert_count": [-8, [0, 8]],
    "attention.causal": [False],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values], ids=repr)
def test_a_wrong_value(path, key, value):
    save(path, keys(TINY) | {f"llama.{key}": value}, weights(TINY))
    assert len(refused(path, f"llama.{key}")) < 1000


@pytest.mark.parametrize("key", [*REQUIRED[2:], "attention.key_length", "attention.head_count_kv", "vocab_size"])
def test_huge_claims_are_not_allocated(path, key):
    """Values that break no rule by themselves: the tensors do not agree."""
    huge = {"attention.key_length": 2**16, "attention.head_count_kv": 2**30}.get(key, 2**31 - 1)
    claims = {f"llama.{key}": huge}
    if key == "attention.head_count_kv":
        claims["llama.attention.head_count"] = huge
    if key == "attention.head_count":
        claims["llama.attention.head_count_kv"] = 1
    if key == "attention.key_length":
        claims |= {"llama.attention.value_length": huge}
    save(path, keys(TINY) | claims, weights(TINY))
    tracemalloc.start()
    if key == "vocab_size":  # informational
        jaxinfer.load(path)
    else:
        refused(path, "the tensors do not fit the architecture", "blk.1.")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


def test_layers_that_are_only_claimed(path):
    """As many as there are tensors, so that the claim itself is possible; what follows must not grow as its cube."""
    more = {f"t{i}": np.zeros(1, np.float32) for i in range(250)}
    save(path, keys(TINY) | {"llama.block_count": 250}, weights(TINY) | more)
    with pytest.raises(ValueError, match="blk") as error:
        jaxinfer.load(path, expand=False)
    assert path in str(error.value)


@pytest.mark.parametrize("base", [1.0, 0.5, 1e30])
def test_yarn_of_any_base_is_a_model_or_an_error(path, base):
    spec = Spec(layers=1, width=8, heads=1, head=8, ffn=6, vocab=11, base=base, scaling={"type": "yarn", "factor": 2.0})
    save(path, keys(spec), weights(spec))
    try:
        model, params, _ = jaxinfer.load(path)
    except ValueError as error:
        assert "rope" in str(error)  # noqa: PT017
    else:
        assert len(jax.tree.leaves(params)) > 0
        assert np.isfinite(model.config.mixer("full").rope.frequencies).all()


def test_missing_left_over_and_misshapen_tensors_are_named_together(path):
    tensors = weights(TINY)
    del tensors["blk.0.attn_k.weight"], tensors["output_norm.weight"]
    tensors["blk.1.ffn_up.weight"] = np.zeros((8, 6), np.float32)
    tensors["blk.1.attn_norm.weight"] = np.zeros(9, np.float32)
    tensors["blk.0.attn_q_norm.weight"] = np.ones(4, np.float32)
    tensors["blk.2.attn_q.weight"] = tensors["blk.1.attn_q.weight"]
    tensors["output.weight"] = np.zeros((12, 8), np.float32)
    save(path, keys(TINY), tensors)
    message = refused(
        path,
        "blk.0.attn_k.weight [8, 8] is missing",
        "output_norm.weight [8] is missing",
        "blk.1.ffn_up.weight has the shape [8, 6], not [6, 8]",
        "blk.1.attn_norm.weight has the shape [9], not [8]",
        "blk.0.attn_q_norm.weight is not known",
        "blk.2.attn_q.weight is not known",
        "output.weight has the shape [12, 8], not [11, 8]",
    )
    assert message.count(";") == 6  # and nothing else


def test_more_layers_than_tensors(path):
    save(path, keys(TINY), {"rope_freqs.weight": np.ones(2, np.float32)})
    refused(path, "block_count is 2")


def test_a_vector_may_be_stored_as_a_matrix_of_one_row(path):
    tensors = weights(TINY)
    save(path, keys(TINY), tensors)
    want = jaxinfer.load(path, expand=False)
    save(path, keys(TINY), tensors | {name: v[None] for name, v in tensors.items() if v.ndim == 1})
    got = jaxinfer.load(path, expand=False)
    chex.assert_trees_all_equal(got.params, want.params)


@pytest.mark.parametrize("change", ["no embedding", "embedding of one axis"])
def test_an_embedding_that_is_none(path, change):
    tensors = weights(TINY)
    tensors.pop("token_embd.weight")
    if change == "embedding of one axis":
        tensors["token_embd.weight"] = np.zeros(88, np.float32)
    save(path, keys(TINY), tensors)
    refused(path, "token_embd.weight")


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight"])
@pytest.mark.parametrize("expand", [True, False])
def test_an_unsupported_tensor_type_lists_the_supported(path, name, expand):
    save(path, keys(WIDE), weights(WIDE), {name: Type.TQ1_0})
    for read in (jaxinfer.load, loader.describe):
        with pytest.raises(ValueError, match="has the type TQ1_0, not one of F32, F16, BF16") as error:
            read(path, expand=expand)
        assert path in str(error.value)
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "output_norm.weight", "blk.0.attn_q.bias"])
def test_a_vector_of_a_packed_type(path, name):
    """No converter writes one; the layers take vectors as plain arrays."""
    spec = Spec(layers=1, width=32, heads=1, head=32, ffn=32, vocab=11, biases=("attn_q",))
    save(path, keys(spec), weights(spec), {name: Type.Q8_0})
    for expand in (True, False):
        with pytest.raises(ValueError, match=re.escape(name)) as error:
            jaxinfer.load(path, expand=expand)
        assert path in str(error.value)


@pytest.mark.parametrize(
    "divisors",
    [np.ones(3), np.zeros(2), -np.ones(2), np.array([1, np.nan]), np.array([1, np.inf])],
    ids=repr,
)
def test_wrong_rope_divisors(path, divisors):
    save(path, keys(TINY), weights(TINY) | {"rope_freqs.weight": divisors.astype(np.float32)})
    refused(path, "rope_freqs.weight must hold 2 F32 numbers, finite and above zero")


def test_rope_divisors_of_another_type(path):
    save(path, keys(TINY), weights(TINY) | {"rope_freqs.weight": np.ones(2, np.float16)})
    refused(path, "rope_freqs.weight must hold 2 F32 numbers")


def test_unknown_keys_are_named_and_known_ones_are_not(path):
    known = {"vocab_size": 11, "rope.dimension_count": 4, "expert_count": 0, "attention.causal": True}
    known |= {"rope.scaling.type": "linear", "rope.scaling.finetuned": True, "rope.scale_linear": 2.0}
    save(path, keys(TINY) | {f"llama.{k}": v for k, v in known.items()} | {"general.name": "n"}, weights(TINY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _, _ = jaxinfer.load(path)
    np.testing.assert_allclose(model.config.mixer("full").rope.frequencies, [0.5, 0.5 * 10000**-0.5])
    save(path, keys(TINY) | {"llama.mystery": 1, "llama.attention.clamp_kqv": 8.0}, weights(TINY))
    with pytest.warns(UserWarning, match=r"some-model\.gguf: .*llama\.attention\.clamp_kqv, llama\.mystery"):
        jaxinfer.load(path)


def test_arrays_of_one_value_a_layer_are_taken(path):
    save(path, keys(TINY) | {"llama.feed_forward_length": [6, 6], "llama.attention.head_count": [4, 4]}, weights(TINY))
    assert jaxinfer.load(path).params.layers.stacks[0].ffn.up.weight.shape == (1, 6, 8)


def test_without_key_value_lengths_and_key_heads(path):
    spec = Spec(layers=1, width=12, heads=3, kv_heads=3, head=4, ffn=6, vocab=11)
    optional = ("_length", "head_count_kv", "freq_base")
    found = {k: v for k, v in keys(spec).items() if not ("attention" in k or "rope" in k) or not k.endswith(optional)}
    assert len(found) == len(keys(spec)) - 4
    save(path, found, weights(spec))
    attention = jaxinfer.load(path).model.config.mixer("full")
    assert (attention.kv_heads, attention.group, attention.width, attention.scale) == (3, 1, 4, 0.5)
    assert attention.rope.frequencies == (1.0, 0.01)


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0])
def test_fused_projections_are_the_separate_ones(tmp_path, kind, expand):
    biases = ("attn_q", "attn_k", "attn_v")
    spec = Spec(layers=2, width=32, heads=3, kv_heads=1, head=10, ffn=32, vocab=11, biases=biases)
    apart, fused = tmp_path / "apart.gguf", tmp_path / "fused.gguf"
    tensors = weights(spec)
    types = {f"attn_{x}.weight": kind for x in ("q", "k", "v", "qkv")}
    save(apart, keys(spec), tensors, types)
    for i in range(spec.layers):
        fuse(tensors, f"blk.{i}.")
    assert "blk.1.attn_qkv.bias" in tensors
    save(fused, keys(spec), tensors, types)
    one, other = (jaxinfer.load(p, expand=expand) for p in (apart, fused))
    assert one.model == other.model
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
    for a, b in zip(leaves(one.params), leaves(other.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_fused_weight_with_separate_biases_and_its_faults(path):
    spec = Spec(layers=1, width=8, heads=2, kv_heads=1, head=4, ffn=6, vocab=11, biases=("attn_q", "attn_k", "attn_v"))
    tensors = weights(spec)
    qkv = np.concatenate([tensors.pop(f"blk.0.attn_{x}.weight") for x in "qkv"])
    save(path, keys(spec), tensors | {"blk.0.attn_qkv.weight": qkv})
    p = jaxinfer.load(path).params.layers.stacks[0].mixer
    np.testing.assert_array_equal(np.concatenate([x.weight[0] for x in (p.q, p.k, p.v)]), qkv)
    np.testing.assert_array_equal(p.k.bias[0], tensors["blk.0.attn_k.bias"])
    save(path, keys(spec), tensors | {"blk.0.attn_qkv.weight": qkv[:-1], "blk.0.attn_q.weight": qkv[:8]})
    refused(path, "blk.0.attn_qkv.weight has the shape [15, 8], not [16, 8]", "blk.0.attn_q.weight is not known")


def test_a_tied_head_is_no_second_weight(path):
    save(path, keys(TINY), weights(TINY))
    assert jaxinfer.load(path).params.head is None
    untied = Spec(layers=1, width=8, heads=1, head=8, ffn=6, vocab=11, tied=False)
    tensors = save(path, keys(untied), weights(untied))
    np.testing.assert_array_equal(jaxinfer.load(path).params.head, tensors["output.weight"])


def test_packed_and_expanded_weights_give_the_same_logits(path):
    tensors = save(path, keys(WIDE), weights(WIDE), Q4_K_M)
    packed, wide = (jaxinfer.load(path, expand=expand, dtype="float32") for expand in (False, True))
    assert any(isinstance(w, Packed) for w in jax.tree.leaves(packed.params, is_leaf=lambda w: isinstance(w, Packed)))
    np.testing.assert_array_equal(wide.params.layers.stacks[1].ffn.down.weight[0], tensors["blk.1.ffn_down.weight"])
    one, other = (jaxinfer.score(*m[:2], [3, 1, 4, 1, 5, 9], chunk=16) for m in (packed, wide))
    assert np.abs(one - other).max() <= 2e-6 * np.abs(one).max()  # the same numbers, multiplied in another order


def test_a_rhythm_of_weight_types_becomes_one_segment_unless_expanded(path):
    spec = Spec(layers=6, width=256, heads=1, head=8, ffn=4, vocab=11)
    tensors = save(path, keys(spec), weights(spec), {"2.attn_q": Type.Q6_K, "5.attn_q": Type.Q6_K, "attn_q": Type.Q4_K})
    packed, wide = (jaxinfer.load(path, expand=expand).params.layers for expand in (False, True))
    assert packed.segments == (((0, 0, 1), 2),)
    assert wide.segments == ((tuple(range(6)), 1),)  # every layer for itself
    for i in range(6):
        for layers in (packed, wide):
            k, index = list(layers.places())[i]
            weight = dense(layers.stacks[k].mixer.q.weight)[index]
            np.testing.assert_array_equal(weight, tensors[f"blk.{i}.attn_q.weight"])


def test_packed_weights_take_the_files_bytes(path):
    save(path, keys(WIDE), weights(WIDE), Q4_K_M)
    assert sum(x.nbytes for x in leaves(jaxinfer.load(path, expand=False).params)) <= 1.1 * os.path.getsize(path)


def test_progress_counts_the_files_bytes_to_the_end(path):
    calls = []
    tensors = save(path, keys(TINY), weights(TINY))
    jaxinfer.load(path, progress=lambda done, total: calls.append((done, total)))
    done, totals = zip(*calls, strict=True)
    assert set(totals) == {sum(t.nbytes for t in tensors.values())}
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1]


@pytest.mark.parametrize("named", [None, "none", "no_vocab"])
def test_a_file_without_vocabulary_has_no_tokenizer(path, named):
    save(path, keys(TINY) | ({"tokenizer.ggml.model": named} if named else {}), weights(TINY))
    assert jaxinfer.load(path).tokenizer is None


def test_a_file_with_vocabulary_has_one(path):
    spec = Spec(layers=1, width=8, heads=1, head=8, ffn=6, tokenizer=True)
    save(path, keys(spec), weights(spec))
    tokenizer = jaxinfer.load(path).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("the") == [257]


def test_types_operations_and_device_are_as_asked(path):
    save(path, keys(TINY), weights(TINY))
    plain, again = (jaxinfer.load(path, dtype=dtype) for dtype in ("float32", np.float32))
    assert plain.model == again.model  # one static argument, one compilation
    assert hash(plain.model) == hash(again.model)
    assert plain.model.config.dtype == np.float32
    device = jax.devices()[0]
    model, params, _ = jaxinfer.load(path, dtype="bfloat16", ops=jaxinfer.REFERENCE, device=device)
    assert model.ops is jaxinfer.REFERENCE
    cache = model.init_cache(params, 2, 16, chunk=16)
    assert {a.dtype.name for a in jax.tree.leaves(cache)} == {"bfloat16", "int32"}
    assert model.init_cache(params, 2, 16, chunk=16, dtype=jnp.float32)[0].k.dtype == jnp.float32
    assert {a.devices().pop() for a in jax.tree.leaves(params)} == {device}
    half, full = jaxinfer.score(model, params, [1, 2, 3]), jaxinfer.score(*plain[:2], [1, 2, 3])
    assert half.dtype == full.dtype == np.float32
    assert np.linalg.norm(half - full) <= 0.05 * np.linalg.norm(full)  # bf16 rounds by 2**-8 at each of some 40 steps


def test_a_description_reads_no_weights_and_agrees_with_load(path):
    save(path, keys(TINY), weights(TINY))
    found = loader.describe(path)
    assert found.model == jaxinfer.load(path).model
    assert found.file.path == path
    sources = jax.tree.leaves(found.params, is_leaf=lambda s: isinstance(s, loader.Source))
    assert sum(len(s.tensors) for s in sources) == len(found.file.tensors)


def test_architectures_are_the_modules_there_are():
    dense, routed = (
        {"llama", "qwen2", "qwen3", "gemma3", "smollm3"},
        {"qwen3moe", "olmoe", "llama4", "gpt_oss", "gemma4"},
    )
    assert set(loader.architectures()) == dense | routed | {"qwen35", "qwen35moe", "qwen3next"}
