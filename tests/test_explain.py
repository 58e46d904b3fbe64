"""What `explain` says of models of every kind, against figures from their metadata; and that it can change."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from goldens import model_path

import jaxinfer
from jaxinfer import AMPERE, CPU, HOPPER, REFERENCE, __main__, loader
from jaxinfer.explain import Layer, Report, Use, explain, lines
from jaxinfer.memory import placed
from jaxinfer.ops.attention import attention_dense, attention_tiles

CTX, SLOTS = 4000, 4096  # slots come in 256s
CHUNK = 512  # on a CPU
RING = 768  # a window of 16 and a chunk less one are 527, which is 640 in blocks of 128, and a block to spare
ON_GPU: dict[str, Any] = {"ops": HOPPER, "dtype": "bfloat16", "expand": False}


@cache
def report(name: str, ctx: int = CTX, **options: Any) -> Report:
    return explain(loader.describe(model_path(name), **options), ctx)


def kv(slots: int, heads: int, width: int, item: int = 4) -> int:
    """Bytes of keys and values, and of an int32 position for each slot."""
    return slots * (2 * heads * width * item + 4)


def caches(found: Report) -> dict[tuple[int, ...], tuple]:
    return {x.numbers: (x.kind, x.cache, x.source, x.slots, x.size_bytes) for x in found.layers}


def use(uses: tuple[Use, ...], op: str) -> Use:
    (one,) = (x for x in uses if x.op == op)
    return one


def layer_of(found: Report, number: int) -> Layer:
    (one,) = (x for x in found.layers if number in x.numbers)
    return one


KINDS = {  # the layers that are alike: kind, cache, and whose cache it is where it is shared
    "qwen3": {(0, 1, 2): ("full", "full", None)},
    "gemma3": {(0, 1, 2, 3, 4, 6): ("sliding", "ring", None), (5,): ("full", "full", None)},
    "gemma4-e": {
        (0, 1, 2): ("sliding", "ring", None),
        (3,): ("full", "full", None),
        (4, 5, 6): ("sliding", "shared", 2),
        (7,): ("full", "shared", 3),
    },
    "gemma4-moe": {(0, 1, 2, 3, 4): ("sliding", "ring", None), (5,): ("full", "full", None)},
    "qwen35moe": {(0, 1, 2): ("delta", "state", None), (3,): ("full", "full", None)},
    "gpt-oss": {(0, 2): ("sliding", "ring", None), (1, 3): ("full", "full", None)},
}


@pytest.mark.parametrize("name", KINDS)
def test_caches_by_layer(name):
    """A layer has 2 * heads * width * 4 bytes for a slot, and 4 for its position; or a state of constant size."""
    metadata = loader.describe(model_path(name)).file.metadata
    m = {key.split(".", 1)[1]: value for key, value in metadata.items() if "." in key}
    assert m.get("attention.sliding_window", 16) == 16
    want = {}
    for numbers, (kind, where, source) in KINDS[name].items():
        slots = RING if kind == "sliding" else SLOTS
        heads = int(np.broadcast_to(m["attention.head_count_kv"], m["block_count"])[numbers[0]])
        width = m.get("attention.key_length_swa") if kind == "sliding" else None
        size = 0 if where == "shared" else kv(slots, heads, width or m["attention.key_length"])
        if kind == "delta":  # f32: a matrix for each head of v; the last projections to two of keys and one of values
            slots, n, v = 0, m["ssm.state_size"], m["ssm.time_step_rank"]
            size = 4 * (v * n * n + (m["ssm.conv_kernel"] - 1) * (2 * m["ssm.group_count"] + v) * n)
        want[numbers] = kind, where, source, slots, size
    found = report(name)
    assert caches(found) == want
    assert (found.platform, found.dtype, found.tokens, found.chunk) == ("cpu", "float32", CTX, CHUNK)


def test_short_contexts_and_halves():
    assert caches(report("gemma3", 200, dtype="bfloat16")) == {
        (0, 1, 2, 3, 4, 6): ("sliding", "full", None, 256, kv(256, 1, 32, 2)),  # no ring is shorter than all slots
        (5,): ("full", "full", None, 256, kv(256, 1, 32, 2)),
    }


def products(uses: Iterable[Use]) -> list[Use]:
    """Of one weight, and of several with what goes before and after."""
    return [one for one in uses if one.op in ("matmul", "project")]


@pytest.mark.parametrize("name", KINDS)
def test_operations_on_a_cpu(name):
    for layer in report(name).layers:
        for uses in (layer.prefill, layer.decode):
            assert products(uses)
            for one in products(uses):
                assert one == Use(one.op, f"{one.op}_reference", ("product",), None)
            if layer.kind != "delta":
                assert use(uses, "attention") == Use("attention", "attention_blocks", ("blocks of 256 keys",), None)
        if layer.kind == "delta":
            assert use(layer.prefill, "delta").forms == ("chunks of 64 tokens",)
            assert use(layer.decode, "delta").forms == ("token by token",)
        if name in ("qwen35moe", "gpt-oss", "gemma4-moe"):
            assert use(layer.prefill, "experts").forms == ("grouped by expert",)
            assert use(layer.decode, "experts").forms == ("choice by choice",)
        else:
            assert not [x for x in layer.prefill if x.op == "experts"]


@pytest.mark.parametrize(
    ("name", "number"), [("qwen3", 0), ("gemma3", 0), ("qwen35moe", 3), ("gpt-oss", 0), ("llama4", 0)]
)
def test_attention_on_a_gpu(name, number):
    layer = layer_of(report(name, **ON_GPU), number)
    prefill, decode = use(layer.prefill, "attention"), use(layer.decode, "attention")
    assert (prefill.function, prefill.forms) == ("attention_hopper", ("flash attention, warpgroups in turns",))
    assert (decode.function, decode.forms) == ("attention_hopper", ("flash attention, keys in parts",))
    assert prefill.why == "attention_blocks is the fastest on this device"  # which is a CPU


def test_attention_on_a_gpu_before_hopper():
    layer = layer_of(report("qwen3", **ON_GPU | {"ops": AMPERE}), 0)
    assert use(layer.prefill, "attention").forms == ("flash attention",)
    assert use(layer.decode, "attention").forms == ("flash attention, keys in parts",)


def test_writes_on_a_gpu():
    found = report("gemma4-e", **ON_GPU)  # heads of 32 on sliding layers, of 64 on the others
    for layer, form in ((0, "step by step; heads of 32, of which 32 are turned"), (3, "one kernel"), (7, "one kernel")):
        assert use(layer_of(found, layer).prefill, "store").forms == ("step by step",)
        (decode,) = use(layer_of(found, layer).decode, "store").forms
        assert decode.startswith(form)


def test_what_the_kernels_do_not_cover_is_told():
    layer = layer_of(report("qwen3", **ON_GPU | {"dtype": "float32"}), 0)
    why = "queries of float32 and a cache of float32 are not alike bfloat16 or float16"
    for uses in (layer.prefill, layer.decode):
        assert use(uses, "attention").forms == (f"all slots at once; {why}",)


@pytest.mark.parametrize("name", ["qwen35moe", "gemma4-moe"])
def test_other_operations_on_a_gpu(name):
    found = report(name, **ON_GPU)
    for layer in found.layers:
        assert {one.forms for one in products(layer.prefill)} == {("product",)}
        assert {one.forms for one in products(layer.decode)} == {("multiply and sum, in place",)}
        for program in (layer.prefill, layer.decode):
            assert use(program, "experts").forms == ("by XLA; 32 columns are no multiple of 64",)
    assert use(found.prefill, "matmul").forms == ("multiply and sum, in place",)  # the head sees the last token alone


def test_weights_and_that_packed_ones_are_slower_on_a_cpu():
    packed, wide = (report("qwen35moe-Q4_0", expand=expand) for expand in (False, True))
    assert layer_of(packed, 3).weights == ("attention Q4_0", "experts Q4_0", "feed-forward Q4_0")
    assert layer_of(wide, 3).weights == ("attention float32", "experts Q4_0", "feed-forward float32")
    for found, why in ((packed, "packed weights are decoded for every product"), (wide, None)):
        assert {one.why for x in found.layers for one in products(x.decode)} == {why}


@pytest.mark.parametrize(("name", "expand"), [("qwen35moe-Q4_0", False), ("qwen35moe-Q4_0", True), ("gemma4-e", False)])
def test_a_file_and_what_is_loaded_of_it_are_told_alike(name, expand):
    found, loaded = (f(model_path(name), expand=expand) for f in (loader.describe, jaxinfer.load))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), loaded.params)
    assert placed(found.params, expand) == shapes
    assert explain(found, CTX) == explain(loaded, CTX)


def test_an_operation_that_is_swapped_is_told():
    def unnamed(q, *args, **kwargs):
        return q * 2

    for attention, forms in (
        (REFERENCE.attention, ("key by key, in the order of positions",)),
        (attention_dense, ("all slots at once",)),
        (attention_tiles, ("all slots at once, for 128 queries at a time",)),
        (unnamed, ()),
    ):
        found = report("gemma4-e", ops=CPU._replace(attention=attention))
        why = f"{CPU.attention.__name__} is the fastest on this device"
        assert {use(x.prefill, "attention") for x in found.layers} == {Use("attention", attention.__name__, forms, why)}
        assert {one.why for x in found.layers for one in products(x.prefill)} == {None}


def test_the_trace_is_that_of_the_program_that_runs():
    """The marks of a chunk's real program are those of the report."""
    model, params, _ = jaxinfer.load(model_path("qwen35moe"))
    cache = jax.eval_shape(lambda: model.init_cache(params, 1, SLOTS, chunk=CHUNK))
    tokens = jax.ShapeDtypeStruct((1, CHUNK), np.int32)
    text = jaxinfer.engine.prefill.lower(model, params, tokens, tokens, cache, chunk=CHUNK).as_text(debug_info=True)
    for layer in report("qwen35moe").layers:
        for one in layer.prefill:
            assert all(f"[{form}]" in text for form in one.forms)
    assert "[choice by choice]" not in text


def test_the_command(capsys):
    path = str(model_path("gemma4-e"))
    assert __main__.main(["explain", "-m", path, "-c", str(CTX), "-b", "64", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == list(lines(explain(loader.describe(path, dtype="bfloat16"), CTX, 64)))
    assert out[0] == f"cpu, bfloat16: {CTX} tokens in chunks of 64"
    assert "layers 4-6: sliding" in out
    assert "  cache    shared of 4096 slots, layer 3's" in out
    assert "  both     attention: attention_blocks (blocks of 256 keys)" in out
    assert __main__.main(["explain", "-m", path, "-b", "0"]) == 2
    assert "chunk=0 must be at least 1" in capsys.readouterr().err
