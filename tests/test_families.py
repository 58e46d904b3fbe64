"""Every family of models against float64 numpy, in the forms that their files may take and the goldens do not have."""

import re
import warnings
from functools import cache

import chex
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import File, changed, decoder, draw, fused, gemma3, gemma4, gpt_oss, hybrid, llama4
from models import save

import jaxinfer
from jaxinfer import engine
from jaxinfer.models import llama4 as llama4_module

pytestmark = pytest.mark.usefixtures("quick_compiler")

QKV = ("attn_q", "attn_k", "attn_v")
GATE_UP = ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps")
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
HALF = {"expert_feed_forward_length": None, "feed_forward_length": 26}  # of which a token uses two
UNSAID = {"final_logit_softcapping": 2.5, "attention.shared_kv_layers": None, "rope.freq_base_swa": None}
E_FORM = {"sliding": (True, True, False, True, False), "shared": 2, "inputs": 14, "ffn": (20, 20, 20, 28, 28)}


def tensors(prefix: str, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return draw({f"{prefix}{name}.weight": shape for name, shape in shapes.items()})


def without(file: File, name: str) -> File:
    return changed(file, dict.fromkeys(full for full in file.tensors if name in full))


CASES = {
    "smollm3": lambda: decoder("smollm3", layers=4, biased=(*QKV, "ffn_up")),
    "smollm3 scaled, untied": lambda: decoder("smollm3", LINEAR, layers=5, tied=False),
    "llama with experts and biases": lambda: decoder("llama", mixture=5, biased=(*QKV, "attn_output")),
    "qwen3moe fused, with biases, experts of half the width of all": lambda: fused(
        decoder("qwen3moe", HALF, norms="head", mixture=6, ffn=13, biased=QKV), "attn_qkv", *QKV
    ),
    "olmoe": lambda: decoder(
        "olmoe", {"expert_feed_forward_length": None}, norms="all", mixture=6, ffn=families.FFN, tied=False
    ),
    "gemma3": lambda: gemma3({"attention.sliding_window_pattern": [True, False, False]}, layers=3),
    "gemma3 without a window": lambda: gemma3({"attention.sliding_window": None}),
    "gemma3 with a window of 0": lambda: gemma3({"attention.sliding_window": 0}),
    "gemma3 with every third layer full": lambda: gemma3({"attention.sliding_window_pattern": 3}, layers=3),
    "gemma3 with a soft cap, two bases, and scaled where it is full": lambda: gemma3(
        LINEAR | {"final_logit_softcapping": 2.5, "rope.freq_base_swa": 500.0, "attention.sliding_window_pattern": 2}
    ),
    "gemma3 27B": lambda: gemma3({"attention.sliding_window_pattern": 2}, layers=62),
    "gemma4 with the soft cap that goes without saying": gemma4,
    "gemma4 E": lambda: gemma4(**E_FORM),
    "gemma4 dense, without more that goes without saying": lambda: without(
        changed(gemma4(UNSAID, kv_heads=(2, 1)), {"blk.2.attn_v.weight": None}), "layer_output_scale"
    ),
    "gemma4 with experts": lambda: gemma4(mixture=5),
    "gemma4 fused, with experts of one stack and no scale": lambda: without(
        fused(fused(gemma4(mixture=5, kv_heads=(4, 1)), *GATE_UP), "attn_qkv", *QKV), "down_exps.scale"
    ),
    "gemma4 that slides everywhere": lambda: gemma4(sliding=(True,) * 3),
    "gpt-oss with a pattern and two bases": lambda: gpt_oss(
        {"attention.sliding_window_pattern": [False, True, True], "rope.freq_base_swa": 1000.0}
    ),
    "llama4": llama4,
    "llama4 with two experts in every second layer, two bases": lambda: changed(
        llama4({"expert_used_count": 2, "rope.freq_base": 5e5, "rope.freq_base_swa": 100.0}, step=2),
        tensors("", rope_freqs=(5,)),
    ),
    "llama4 with 128 experts": lambda: llama4(mixture=128),
    "qwen35 with a list of layers": lambda: hybrid(
        "qwen35", {"attention.recurrent_layers": [False, True, True]}, layers=3, full=(0,), tied=False
    ),
    "qwen35 with every second layer full": lambda: fused(
        hybrid("qwen35", {"full_attention_interval": 2}, full=(1, 3)), "attn_qkv", *QKV
    ),
    "qwen35 partly rotated, with as many keys as values": lambda: hybrid(
        "qwen35", {"rope.dimension_count": 4}, key_heads=4
    ),
    "qwen35 with pairs that stand still": lambda: hybrid("qwen35", {"rope.dimension_sections": [1, 1, 0, 1]}),
    "qwen35moe with gate and up in one": lambda: fused(
        hybrid("qwen35moe", {"expert_shared_feed_forward_length": None}), *GATE_UP
    ),
    "qwen3next": lambda: hybrid("qwen3next", value_heads=6),
}


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    monkeypatch.setattr(llama4_module, "BLOCK", families.BLOCK)


def load(path, file: File, **options) -> jaxinfer.Loaded:
    save(path, file.metadata, file.tensors)
    return jaxinfer.load(path, dtype="float32", **options)


def ids_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, families.VOCAB, length).tolist()


# Half a unit of f32, 6e-8, on every weight moves these logits by up to 3.4e-6 of the largest (gated delta nets, 62
# layers; 1e-6 elsewhere), and values are rounded as often as weights. A wrong formula shows as 1e-2 or more.
BOUND = 6e-6
FAR = 3e-5  # at the position 700 an angle, in radians, is itself rounded by so much


def close(got: np.ndarray, want: np.ndarray, bound: float = BOUND):
    assert np.abs(got - want).max() <= bound * np.abs(want).max()


@pytest.mark.parametrize("file", CASES.values(), ids=CASES)
def test_logits_at_every_position(file, tmp_path):
    """Two chunks, of which the first begins with padding; layers of one kind are a stack. No key is unknown."""
    file, ids = file(), ids_of(29)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, params, _ = load(tmp_path / "model.gguf", file, expand=False)
    close(jaxinfer.score(model, params, ids, chunk=16), families.forward(file, ids))


def test_keys_and_values_that_nothing_uses(tmp_path):
    """Published files of gemma4 E have projections to keys in layers that take those of others."""
    file = gemma4(**E_FORM)
    unused = tensors("blk.4.", attn_k=(20, families.D), attn_v=(20, families.D), attn_k_norm=(10,))
    with pytest.warns(UserWarning, match=re.escape(", ".join(f"blk.4.{x}.weight" for x in ("attn_k", "attn_v")))):
        got = load(tmp_path / "more.gguf", changed(file, unused))
    want = load(tmp_path / "model.gguf", file)
    assert got.model == want.model
    chex.assert_trees_all_equal(got.params, want.params)


OWN = {"shared_head_norm": (families.D,), "embed_tokens": (families.VOCAB, families.D)}
OWN |= {"shared_head_head": (families.VOCAB, families.D)}
TWO = {"layers": 2, "full": (1,), "drafts": True}
DRAFTS = {
    "qwen35 with all of its own": lambda: changed(
        hybrid("qwen35", {"full_attention_interval": 2}, tied=False, **TWO), tensors("blk.2.nextn.", **OWN)
    ),
    "qwen35moe with a list of layers, untied": lambda: hybrid(
        "qwen35moe", {"attention.recurrent_layers": [True, False, True]}, tied=False, **TWO
    ),
}


@pytest.mark.parametrize("file", DRAFTS.values(), ids=DRAFTS)
def test_drafts(file, tmp_path):
    """A prompt, and then a token after the draft block's own hidden state. The layers before are as without it."""
    file, ids = file(), ids_of(16)
    model, params, _ = load(tmp_path / "model.gguf", file)
    close(jaxinfer.score(model, params, ids, chunk=16), families.forward(file, ids))
    before = np.concatenate([np.zeros((1, families.D)), families.hidden(file, ids)[:-2]])
    before = np.concatenate([before, families.draft(file, ids[:-1], before)[0][-1:]])
    arch, config, ops = model.arch, model.config, model.ops

    @jax.jit
    def step(params, tokens, pos, hidden, cache):
        y, cache = arch.draft(params, tokens, hidden, pos, cache, config, ops)
        return y, arch.draft_logits(params, y, config, ops), cache

    cache, parts = arch.init_draft_cache(params, 1, 16, 15, config, config.dtype), []
    for start, end in ((0, 15), (15, 16)):
        pos = np.arange(end - 15, end)
        pos[pos < start] = -1
        args = (jnp.asarray(a)[None] for a in (np.array(ids)[pos], pos, np.float32(before)[pos]))
        *got, cache = step(params, *args, cache)
        parts.append([a[0][pos >= 0] for a in got])
    for got, want in zip(zip(*parts, strict=True), families.draft(file, ids, before), strict=True):
        close(np.concatenate(got), want)


# Prompts several times as long as the rings of layers with windows, which have 256 slots.

PROMPTS = {
    "gemma4": lambda: gemma4({"attention.sliding_window": 16}, **E_FORM),
    "llama4": lambda: llama4(step=4),
    "qwen35moe": lambda: hybrid("qwen35moe", {"full_attention_interval": 2}, layers=2, full=(1,)),
}


@cache
def long_prompt(name: str, length: int = 700) -> tuple[File, list[int], np.ndarray]:
    file, ids = PROMPTS[name](), ids_of(length)
    return file, ids, families.forward(file, ids)


def rings(model: jaxinfer.Model, params, chunk: int) -> set[int]:
    """The sizes of all caches of a long prompt."""
    made = jax.eval_shape(lambda: model.init_cache(params, 1, 1024, chunk=chunk))
    return {held.k.shape[3] for held in made}


@pytest.mark.parametrize("name", ["gemma4", "llama4"])  # gpt-oss: in the goldens, and in test_long.py
def test_long_prompts_in_a_ragged_batch_in_small_chunks(name, tmp_path):
    file, ids, want = long_prompt(name)
    model, params, _ = load(tmp_path / "model.gguf", file, expand=False)
    assert rings(model, params, 7) == {256, 1024}
    prompts = [ids[:333], ids, ids[:40]]
    for got, prompt in zip(jaxinfer.score(model, params, prompts, chunk=7), prompts, strict=True):
        close(got, want[: len(prompt)], FAR)


def test_turns_that_follow_one_another(tmp_path):
    """Two rows with turns of their own lengths, one of them sometimes silent, in chunks of 64; rings: test_long.py."""
    file, ids, want = long_prompt("qwen35moe")
    model, params, _ = load(tmp_path / "model.gguf", file, expand=False)
    held = model.init_cache(params, 2, 768, chunk=64)
    ends = np.zeros(2, int)
    for turn in [(250, 1), (3, 256), (0, 190), (256, 7), (191, 246)]:
        tokens, pos = np.zeros((2, 256), np.int32), np.full((2, 256), -1, np.int32)
        for row, n in enumerate(turn):
            at = np.arange(ends[row], ends[row] + n)
            tokens[row, 256 - n :], pos[row, 256 - n :] = np.array(ids)[at], at
        ends += turn
        logits, held = engine.prefill(model, params, tokens, pos, held, chunk=64)
        spoke = np.array(turn) > 0
        close(np.asarray(logits)[spoke], want[ends - 1][spoke], FAR)
    assert ends.tolist() == [700, 700]


def test_a_ring_that_is_no_whole_number_of_blocks_of_keys(tmp_path):
    """384 slots, which a CPU visits as two overlapping blocks of 256."""
    own = {"attention.sliding_window": 130, "attention.sliding_window_pattern": 2}
    file, ids = gemma3(own), ids_of(900)
    model, params, _ = load(tmp_path / "model.gguf", file, expand=False)
    assert rings(model, params, 64) == {384, 1024}
    close(jaxinfer.score(model, params, ids, chunk=64), families.forward(file, ids), FAR)
