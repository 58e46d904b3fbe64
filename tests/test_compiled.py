"""What XLA makes of the two programs: caches are updated in place, and decoding reads weights where they lie."""

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import model_path
from jax.experimental import topologies

import jaxinfer
from jaxinfer import Model, Sampler, engine
from jaxinfer.decoder import Config, LayerParams, Params
from jaxinfer.layers.attention import AttentionParams, AttentionSpec
from jaxinfer.layers.linear import Linear
from jaxinfer.layers.mlp import MlpParams, silu_gate
from jaxinfer.layers.moe import MoeParams, MoeSpec
from jaxinfer.layers.rope import Rope, frequencies
from jaxinfer.layers.routing import softmax_renormalised
from jaxinfer.models import qwen3
from jaxinfer.ops import HOPPER
from jaxinfer.ops.experts import ExpertParams
from jaxinfer.segments import Layers, Segment

MOVES = {"copy", "transpose", "copy-done", "concatenate", "pad"}
PLACES = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "constant"}


def executed(text: str) -> list[tuple[str, int, str]]:
    """(opcode, elements of the largest result, line) of every instruction that is not inside a fusion.

    A fusion goes by the opcode of its root, so that a fused transpose is one.
    """
    bodies = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{$(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    fused = set(re.findall(r"fusion\(.*?calls=%([\w.\-]+)", text))
    roots = {name: re.search(r"ROOT \S+ = .*? ([a-z\-]+)\(", body) for name, body in bodies.items()}
    found = []
    for name, body in bodies.items():
        for line in body.splitlines() if name not in fused else []:
            if not (match := re.match(r"\s*(?:ROOT )?%\S+ = (.*?) ([a-z\-]+)\(", line)):
                continue
            shapes, opcode = match.groups()
            if opcode.endswith("-start"):  # has its operands among its shapes; the "-done" has the result alone
                continue
            if opcode == "fusion" and (root := roots[re.findall(r"calls=%([\w.\-]+)", line)[0]]):
                opcode = root[1]
            sizes = [math.prod(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", shapes)]
            found.append((opcode, max(sizes, default=1), line.strip()[:200]))
    assert found
    return found


def check_caches_stay(text: str, cache) -> None:
    """No instruction moves as many elements as the largest stack of caches has."""
    stack = max(a.size for a in jax.tree.leaves(cache))
    assert not [line for opcode, size, line in executed(text) if opcode in MOVES and size >= stack]
    assert "input_output_alias" in text


def lowered(model, params, cache, tokens: int, sharding=None):
    """The two programs for one row, as `generate` calls them."""

    def shape(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    chunk = shape((1, tokens), jnp.int32)
    state = jax.eval_shape(
        lambda x, c: engine.start(x, [[1]], c, Sampler.greedy()),
        jax.ShapeDtypeStruct((1, model.config.vocab), jnp.float32),
        cache,
    )

    def place(tree):
        return jax.tree.map(lambda a: shape(a.shape, a.dtype), tree)

    keys = shape((1,), jax.random.key(0).dtype)
    args = model, params, place(state), keys, shape((1,), jnp.int32), shape((), jnp.int32)
    return (
        engine.prefill.lower(model, params, chunk, chunk, place(cache), chunk=tokens),
        engine.decode.lower(*args, sampler=Sampler.greedy(), room=16),
    )


@pytest.mark.usefixtures("quick_compiler")  # which leaves out what comes after the passes that are seen here
@pytest.mark.parametrize(
    ("name", "expand"),
    [("qwen3", True), ("gemma4-e", False), ("qwen35-mtp", False)],
)
def test_on_a_cpu_no_cache_is_copied(name, expand):
    model, params, _ = jaxinfer.load(model_path(name), expand=expand)
    # Long enough that a cache's stack is larger than anything else that a chunk of 16 tokens makes.
    cache = jax.eval_shape(lambda: model.init_cache(params, 1, 4096, chunk=16))
    for program in lowered(model, params, cache, 16):
        check_caches_stay(program.compile().as_text(), cache)


def published(sharding, *, layers: int, d: int, kv_heads: int, ffn: int, experts: int = 0) -> tuple[Model, Params]:
    """Qwen3-8B or, with 8 of `experts` for each token, Qwen3-30B-A3B in bf16, as shapes alone."""
    heads, head, vocab = 32, 128, 151936

    def w(*dims: int, dtype=jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def linear(out: int, into: int, dtype=jnp.bfloat16) -> Linear:
        return Linear(w(layers, out, into, dtype=dtype))

    f32 = jnp.float32
    q, kv = heads * head, kv_heads * head
    network = MlpParams(linear(ffn, d), linear(ffn, d), linear(d, ffn))
    if experts:
        stacks = (w(layers, experts, *shape) for shape in ((ffn, d), (ffn, d), (d, ffn)))
        network = MoeParams(linear(experts, d, f32), ExpertParams(*stacks))
    layer = LayerParams(
        w(layers, d, dtype=f32),
        AttentionParams(
            linear(q, d),
            linear(kv, d),
            linear(kv, d),
            linear(d, q),
            w(layers, head, dtype=f32),
            w(layers, head, dtype=f32),
        ),
        w(layers, d, dtype=f32),
        network,
    )
    spec = AttentionSpec(
        kv_heads=kv_heads,
        group=heads // kv_heads,
        width=head,
        scale=head**-0.5,
        rope=Rope(tuple(frequencies(1e6, head)), interleaved=False),
        eps=1e-6,
    )
    config = Config(
        layers=layers,
        width=d,
        vocab=vocab,
        context=40960,
        eps=1e-6,
        mixers=(("full", spec),),
        moe=MoeSpec(used=8, routing=softmax_renormalised, activation=silu_gate) if experts else None,
        dtype=np.dtype(jnp.bfloat16),
    )
    params = Params(w(vocab, d), Layers((layer,), (Segment((0,), layers),)), w(d, dtype=f32), w(vocab, d), None)
    return Model(qwen3, config, HOPPER), params  # pyright: ignore[reportArgumentType]


def check_gpu_programs(sharding) -> None:
    model, params = published(sharding, layers=36, d=4096, kv_heads=8, ffn=12288)
    cache = jax.eval_shape(lambda: model.init_cache(params, 1, 2304, chunk=2048))
    prefill, decode = (program.compile().as_text() for program in lowered(model, params, cache, 2048, sharding))
    check_caches_stay(prefill, cache)
    check_caches_stay(decode, cache)
    # The smallest weight of a layer has kv_heads * head * d elements. Nothing that decoding makes is as large, but for
    # the caches, which a kernel writes into.
    weight = 8 * 128 * 4096
    made = [x for x in executed(decode) if x[0] not in PLACES | {"custom-call"} and x[1] >= weight]
    assert not made
    # In the loop over layers: attention; for a token also the cache before it, the join of its parts behind it, and the
    # launches of four products. The head takes one token in both.
    for program, kernels in ((prefill, 2), (decode, 8)):
        assert len(re.findall(r'custom_call_target="mosaic_gpu', program)) == kernels


def check_gpu_programs_of_experts(sharding) -> None:
    experts, d, ffn = 128, 2048, 768
    model, params = published(sharding, layers=48, d=d, kv_heads=4, ffn=ffn, experts=experts)
    cache = jax.eval_shape(lambda: model.init_cache(params, 1, 2304, chunk=2048))
    prefill, decode = (program.compile().as_text() for program in lowered(model, params, cache, 2048, sharding))
    check_caches_stay(prefill, cache)
    check_caches_stay(decode, cache)
    # Decoding makes no expert's weights, prefill no more than one expert's beside the outputs of all its choices.
    made = {name: [x for x in executed(t) if x[0] not in PLACES] for name, t in (("p", prefill), ("d", decode))}
    assert not [x for x in made["d"] if x[0] != "custom-call" and x[1] >= d * ffn]
    assert not [x for x in made["p"] if x[0] != "scatter" and x[1] >= experts * d * ffn]


every_check = pytest.mark.parametrize("check", [check_gpu_programs, check_gpu_programs_of_experts])


@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin") or os.environ.get("JAX_PLATFORMS") != "cpu",
    reason="needs the wheels of the extra cuda13, and JAX_PLATFORMS=cpu where there is no GPU",
)
@every_check
def test_compiled_for_a_gpu_that_is_not_there(check):
    target = (Path(__file__).parent / "data/h200.txt").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    check(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


@pytest.mark.gpu
@every_check
def test_compiled_on_a_gpu(check):
    check(None)
