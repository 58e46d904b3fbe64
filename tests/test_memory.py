"""What a run is said to take, against arithmetic from the metadata, real arrays, and the compiler's own account."""

import importlib.util
import math
import os
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from goldens import model_path
from jax.experimental import topologies

import jaxinfer
from jaxinfer import Sampler, engine, loader, memory
from jaxinfer.memory import Plan
from jaxinfer.ops import HOPPER

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "write_model.py"
spec = importlib.util.spec_from_file_location("write_model", SCRIPT)
assert spec
assert spec.loader
write_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_model)


@pytest.fixture(autouse=True)
def _no_fingerprint(monkeypatch):
    """It reads in every tensor, and of a file of holes the system clears as many pages as it would read ahead."""
    monkeypatch.setattr(loader.gguf, "fingerprint", lambda file: "")


def nbytes(tree: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def described(folder: Path, shape: str, file_type: str) -> loader.Description:
    """A published shape as a file of holes: a header, and no weight but the divisors that a configuration needs."""
    s, path = write_model.SHAPES[shape], folder / f"{shape}.gguf"
    writer: gguf.GGUFWriter = write_model.header(str(path), s, shape, file_type)
    entries = write_model.plan(s, file_type)
    for entry in entries:
        kind = GGMLQuantizationType[entry.kind]
        writer.add_tensor_info(entry.name, entry.stored, np.dtype(np.uint8), entry.size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout
    file = writer.fout[0]
    for entry in entries:
        writer.write_padding(file, file.tell())
        if entry.name == "rope_freqs.weight":
            file.write(np.ones(entry.shape, "<f4").tobytes())
        else:
            file.seek(entry.size, os.SEEK_CUR)
    file.truncate(file.tell())
    writer.write_padding(file, file.tell())
    writer.close()
    return loader.describe(path, dtype=jnp.bfloat16, ops=HOPPER, expand=False)


def plan_of(found: loader.Description, context: int, **options: Any) -> Plan:
    return memory.plan(found.model, found.params, context, **{"chunk": 2048, "expand": found.expand} | options)


# Weights and caches: exact


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("name", ["qwen3-Q4_K_M", "gemma4-e-Q4_0", "qwen3moe-Q8_0", "qwen35-mtp"])
def test_weights_and_caches_are_those_of_the_arrays(name, expand):
    found = plan_of(loader.describe(model_path(name), expand=expand), 700, chunk=64, batch=2)
    model, params, _ = jaxinfer.load(model_path(name), expand=expand)
    assert found.weights == nbytes(params)
    assert found.cached == nbytes(model.init_cache(params, 2, 768, chunk=64))
    assert memory.plan(model, params, 700, chunk=64, batch=2) == found


def test_weights_and_caches_of_gemma_by_hand(tmp_path):
    """60 layers, 10 of them full: 4 heads of 512; the others: 16 of 256 in rings of 1024 + 2048 - 1 slots."""
    found = plan_of(described(tmp_path, "gemma4-31b", "Q4_K_M"), 131072)
    ring = 3200  # in whole blocks of 128, and one to spare
    assert dict(found.caches) == {
        "sliding: ring of 3200 slots": 50 * ring * (2 * 16 * 256 * 2 + 4),  # and a position for each slot
        "full: 131072 slots": 10 * 131072 * (2 * 4 * 512 * 2 + 4),
    }
    tensors = write_model.plan(write_model.SHAPES["gemma4-31b"], "Q4_K_M")
    held = sum(entry.size for entry in tensors if entry.name != "rope_freqs.weight")  # which is in the configuration
    assert found.weights == held


def test_states_do_not_grow(tmp_path):
    """Of the 35B: 30 delta nets, f32; 10 attention layers of 2 heads of 256: 20 KiB a token, and its position."""
    found = described(tmp_path, "qwen3.6-35b-a3b", "Q4_K_M")
    for context in (256, 131072):
        state = 32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128)
        caches = {"delta: state": 30 * state * 4, f"full: {context} slots": 10 * context * (2 * 2 * 256 * 2 + 4)}
        assert dict(plan_of(found, context).caches) == caches


def test_recent_queries_and_other_types():
    found = loader.describe(model_path("qwen3"))
    full = found.model.config.mixer("full")
    layers = found.model.config.layers
    plain = plan_of(found, 256, chunk=64)
    assert plain.cached == layers * 256 * (2 * full.kv_heads * full.width * 4 + 4)
    observed = plan_of(found, 256, chunk=64, observe=16)
    assert observed.observed == layers * 16 * full.heads * full.width * 4
    assert observed.cached == plain.cached + observed.observed
    assert plan_of(found, 256, chunk=64, dtype=jnp.bfloat16).cached == layers * 256 * (
        full.kv_heads * full.width * 4 + 4
    )


def test_eviction_lowers_what_follows_and_not_the_prompts_peak(tmp_path):
    found = described(tmp_path, "qwen3-8b", "Q4_K_M")
    whole = plan_of(found, 32768)
    evicting = plan_of(found, 32768, observe=32, keep=2048, room=256)
    # 36 layers of 8 heads of 128; each head has positions of its own, and a stack (there are 2) the shift of its row.
    assert evicting.compacted == 36 * 8 * (2048 + 256) * (2 * 128 * 2 + 4) + 2 * 4
    assert evicting.total >= whole.total
    between = plan_of(found, 32768, observe=32, keep=2048, room=256, interleaved=True)
    assert between.cached < whole.cached / 7
    assert between.total < whole.total
    assert plan_of(found, 1024, keep=2048).compacted is None


# Workspace: an estimate, beside the compiler's account


def programs(model: Any, params: Any, slots: int, chunk: int, sharding: Any = None) -> dict[str, jax.stages.Lowered]:
    """The two programs for one row, as `generate` calls them, of shapes alone."""

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    params, cache = place(params), jax.eval_shape(lambda: model.init_cache(params, 1, slots, chunk=chunk))
    logits = jax.ShapeDtypeStruct((1, model.config.vocab), jnp.float32)
    state = jax.eval_shape(lambda x, c: engine.start(x, [[1]], c, Sampler.greedy()), logits, cache)
    tokens, keys = np.zeros((1, chunk), np.int32), jax.eval_shape(lambda: jax.random.key(0)[None])
    call = place((tokens, tokens, cache))
    rest = place((state, keys, np.zeros(1, np.int32), np.int32(1)))
    return {
        "prefill": engine.prefill.lower(model, params, *call, chunk=chunk),
        "decode": engine.decode.lower(model, params, *rest, sampler=Sampler.greedy(), room=8),
    }


@pytest.mark.usefixtures("quick_compiler")  # which leaves out what comes after buffers have their places
@pytest.mark.parametrize(
    ("name", "expand", "chunk"),
    [
        ("qwen3-Q4_K_M", False, 64),
        ("gemma4-e", True, 64),
        ("qwen35moe", True, 128),
    ],
)
def test_estimate_beside_the_compilers_on_a_cpu(name, expand, chunk):
    model, params, _ = jaxinfer.load(model_path(name), expand=expand)
    found = memory.plan(model, params, 4096, chunk=chunk)
    for program, lowered in programs(model, params, 4096, chunk).items():
        account = lowered.compile().memory_analysis()
        assert account
        # The tokens of a prefill and their positions. In decode, the state's logits, with a few numbers of a row.
        few = 2 * chunk * 4 if program == "prefill" else model.config.vocab * 4
        more = account.argument_size_in_bytes - found.weights - found.cached - few
        assert 0 <= more < 128
        assert account.alias_size_in_bytes - found.cached in range(model.config.vocab * 4 + 128)
        # These come out within a quarter; other versions of XLA fuse and order a little differently, and of a tiny
        # model some KiB of small arrays, which are not counted, weigh as well.
        estimate, temporary = getattr(found, program), account.temp_size_in_bytes
        assert temporary / 1.5 - 2**15 <= estimate <= temporary * 1.5 + 2**15, (program, estimate, temporary)


@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin") or os.environ.get("JAX_PLATFORMS") != "cpu",
    reason="needs the wheels of the extra cuda13, and JAX_PLATFORMS=cpu where there is no GPU",
)
@pytest.mark.parametrize(
    ("shape", "file_type", "context"),
    [("qwen3-8b", "BF16", 40960), ("qwen3-30b-a3b", "BF16", 32768)],
)
def test_estimate_beside_the_compilers_for_a_gpu_that_is_not_there(tmp_path, shape, file_type, context):
    target = (Path(__file__).parent / "data/h200.txt").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    described_ = described(tmp_path, shape, file_type)
    found = plan_of(described_, context)
    params = memory.placed(described_.params)
    for program, lowered in programs(described_.model, params, context, 2048, sharding).items():
        account = lowered.compile().memory_analysis()
        assert account
        assert 0 <= account.argument_size_in_bytes - found.weights - found.cached < 2**20  # tokens, logits, numbers
        # Of sixteen shapes and contexts prefill came out within 21 %. Decode is not as sure: XLA may copy keys and
        # values in turn and not both ahead, as is assumed, and keeps scales of weights that are not counted. Of the
        # whole it was 2 % at most; the shapes here are among the plain ones.
        estimate, temporary = getattr(found, program), account.temp_size_in_bytes
        assert abs(estimate - temporary) < 0.2 * temporary
        assert abs(estimate - temporary) < 0.02 * (found.weights + found.cached + temporary)


# What fits


def test_a_plan_grows_with_context_chunk_and_batch(tmp_path):
    found = described(tmp_path, "qwen3.6-27b", "Q4_K_M")
    for plans in (
        [plan_of(found, n) for n in (1, 256, 257, 5000, 8192, 131072)],
        [plan_of(found, 32768, chunk=n) for n in (16, 100, 512, 2048, 4096)],
        [plan_of(found, 8192, batch=n) for n in (1, 2, 8)],
    ):
        totals = [p.total for p in plans]
        assert totals == sorted(totals)
        assert totals[0] < totals[-1]


@pytest.mark.parametrize("limit", ["20GB", "24GiB", "40 GB"])
def test_the_largest_context_is_the_largest(tmp_path, limit):
    found = described(tmp_path, "gemma4-31b", "Q4_K_M")
    size = memory.parse_size(limit)
    largest = memory.largest_context(partial(plan_of, found), size, most=10**6)
    assert largest % engine.SLOTS == 0
    assert plan_of(found, largest).total <= size < plan_of(found, largest + engine.SLOTS).total


def test_the_largest_context_has_bounds(tmp_path):
    found = described(tmp_path, "qwen3-8b", "Q4_K_M")
    assert memory.largest_context(partial(plan_of, found), 2**40, most=40001) == 40001  # no whole step
    assert memory.largest_context(partial(plan_of, found), 5 * 10**9, most=40960) == 0  # the weights take more


def test_a_refusal_states_the_arithmetic():
    gib = 2**30
    found = Plan(
        context=131072, chunk=2048, weights=19 * gib, caches=(("full: 131072 slots", 12 * gib),), observed=0,
        prefill=2 * gib, decode=gib,
    )  # fmt: skip
    memory.check(found, 33 * gib, 131072)
    with pytest.raises(ValueError, match="the largest context that fits is 65,536 tokens") as refusal:
        memory.check(found, 24 * gib, 65536)
    for words in ("weights 19.00 GiB + caches 12.00 GiB + workspace 2.00 GiB = 33.00 GiB", "24.00 GiB", "131,072"):
        assert words in str(refusal.value)
    with pytest.raises(ValueError, match="not even the shortest context fits"):
        memory.check(found, gib, 0)
    assert [line.rsplit("  ", 1)[1].strip() for line in str(found).splitlines()] == [
        "19.00 GiB", "12.00 GiB", "2.00 GiB", "1.00 GiB", "33.00 GiB",
    ]  # fmt: skip


def test_sizes():
    sizes = {"12GiB": 12 * 2**30, "24 GB": 24 * 10**9, "1.5gib": 3 * 2**29, "900MiB": 900 * 2**20, "5MB": 5_000_000}
    for text, size in (sizes | {"4096": 4096, "7 KiB": 7168, "3b": 3}).items():
        assert memory.parse_size(text) == size
    for text in ("", "GiB", "12 GiBs", "-3GB", "1e9", "12 G i B", "twelve", "0", "0.1B"):
        with pytest.raises(ValueError, match=r"no size in memory|less than one byte"):
            memory.parse_size(text)


@pytest.mark.parametrize("option", ["context", "chunk", "batch", "keep"])
def test_bad_numbers(option):
    found = loader.describe(model_path("qwen3"))
    numbers: dict[str, Any] = {"context": 256, "chunk": 64, option: -1}
    with pytest.raises(ValueError, match=f"{option}=-1 must be at least"):
        memory.plan(found.model, found.params, **numbers)


def test_a_cpu_has_memory():
    assert (
        2**20
        < memory.available_bytes(jax.devices("cpu")[0])
        <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


def test_nothing_is_allocated(tmp_path):
    found = described(tmp_path, "gemma4-31b", "Q4_K_M")
    assert math.prod(found.params.embedding.tensors[0].shape) > 10**9
    began = time.perf_counter()
    tracemalloc.start()
    plan_of(found, 131072)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24
    assert time.perf_counter() - began < 5  # it takes a twentieth of a second
