"""Whole models against llama.cpp: every golden prompt, at every stored position, in several ways to run it.

Logits come from weights as in the file and stacked layers, greedy tokens from expanded weights and separate layers.
Compiling takes the time, so only F32 models, which have every architecture, run in all ways. `-k` takes a way, a model
or both: `-k whole`, `-k "chunks and gemma4"`, `-k qwen3-Q4_K_M`.
"""

from functools import cache

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import PROMPTS

import jaxinfer
from jaxinfer import GPU, REFERENCE, Loaded, Ops, Sampler, engine
from jaxinfer.layers.norm import rms_norm
from jaxinfer.quants import FORMATS, Packed


def model(prompt: str) -> str:
    return prompt.split(".")[0]


F32 = [p for p in PROMPTS if model(p) in goldens.F32]
DRAFTING = [p for p in PROMPTS if "mtp" in p]


@cache
def load(prompt: str, expand: bool = False, ops: Ops | None = None) -> Loaded:
    return jaxinfer.load(goldens.model_path(model(prompt)), expand=expand, ops=ops)


def check(prompt: str, logits: np.ndarray, drafted: bool = False) -> None:
    """Ten times the worst float noise that llama.cpp shows against itself, see goldens/README.md."""
    golden = goldens.golden(prompt)
    got, want = logits[golden.positions], golden.mtp_logits if drafted else golden.logits
    assert want is not None
    assert np.abs(got - want).max() <= 3e-3
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_whole(prompt, request):
    if prompt not in F32:
        request.getfixturevalue("quick_compiler")
    model, params, _ = load(prompt)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Packed))
    assert any(isinstance(w, Packed) for w in leaves) == any(t.name in prompt for t in FORMATS)
    check(prompt, jaxinfer.score(model, params, goldens.golden(prompt).tokens))


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("prompt", F32)
def test_chunks_of_a_ragged_batch(prompt):  # chunks of one token are decoding, see test_greedy_tokens
    model, params, _ = load(prompt)
    tokens, rng = goldens.golden(prompt).tokens, np.random.default_rng(0)
    shorter, longer = (rng.integers(0, model.config.vocab, n).tolist() for n in (-(-len(tokens) // 2), len(tokens) + 9))
    check(prompt, jaxinfer.score(model, params, [shorter, tokens, longer], chunk=7)[1])


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("prompt", F32)
def test_reference_operations(prompt):
    model, params, _ = load(prompt, ops=REFERENCE)
    check(prompt, jaxinfer.score(model, params, goldens.golden(prompt).tokens))


@pytest.mark.usefixtures("quick_compiler")
# Decoding takes expanded weights here, so that their type makes no difference; of two prompts the long one is decoded,
# and a model that drafts decodes as one of its architecture that does not.
@pytest.mark.parametrize(
    "prompt", [p for p in F32 if p.replace(".base", ".long") not in set(F32) - {p} and p not in DRAFTING]
)
def test_greedy_tokens(prompt):
    golden, options = goldens.golden(prompt), {"max_tokens": 16, "ignore_eos": True, "ctx": 4096}
    pieces = jaxinfer.stream(*load(prompt, expand=True), golden.tokens, sampler=Sampler.greedy(), **options)
    assert [piece.token for piece in pieces] == golden.greedy_tokens


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("prompt", DRAFTING)
def test_drafts(prompt, chunk):
    """A draft sees the hidden state of the token before, which may be the last of the chunk before."""
    model, params, _ = load(prompt)
    arch, config, ops = model.arch, model.config, model.ops
    ids = goldens.golden(prompt).tokens
    held = model.init_cache(params, 1, 256, chunk=chunk)
    drafts = arch.init_draft_cache(params, 1, 256, chunk, config, config.dtype)

    @jax.jit
    def step(params, tokens, pos, last, held, drafts):
        x, held = model.forward(params, tokens, pos, held)
        hidden = jnp.where(pos[..., None] < 0, 0, rms_norm(x, params.norm, config.eps))
        before = jnp.concatenate([last, hidden[:, :-1]], axis=1)
        y, drafts = arch.draft(params, tokens, before, pos, drafts, config, ops)
        return arch.draft_logits(params, y, config, ops), hidden[:, -1:], held, drafts

    last, out = jnp.zeros((1, 1, config.width)), []
    tokens, pos = engine.left_pad([ids], chunk)
    for i in range(0, tokens.shape[1], chunk):
        t, p = tokens[:, i : i + chunk], pos[:, i : i + chunk]
        logits, last, held, drafts = step(params, t, p, last, held, drafts)
        out.append(np.asarray(logits[0]))
    check(prompt, np.concatenate(out)[-len(ids) :], drafted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("prompt", PROMPTS)
def test_on_a_gpu(prompt):
    model, params, _ = jaxinfer.load(goldens.model_path(prompt.split(".")[0]), dtype="float32")
    assert model.ops.experts is GPU.experts
    check(prompt, jaxinfer.score(model, params, goldens.golden(prompt).tokens, chunk=64))


@pytest.mark.gpu
@pytest.mark.parametrize("prompt", [p for p in F32 if "base" in p])
def test_on_a_gpu_in_bfloat16(prompt):
    """Rounding to 2**-9 at each of some hundred steps; where it changes a choice of experts, a row differs wholly."""
    model, params, _ = jaxinfer.load(goldens.model_path(prompt.split(".")[0]))
    assert model.config.dtype == jnp.bfloat16
    golden = goldens.golden(prompt)
    got, want = jaxinfer.score(model, params, golden.tokens, chunk=64)[golden.positions], golden.logits
    assert np.median(np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)) <= 0.1
    assert (got.argmax(1) == want.argmax(1)).mean() >= 0.75


def test_every_model_and_every_way_is_there():
    assert (len(goldens.MODELS), len(PROMPTS), len(F32), len(DRAFTING)) == (59, 71, 32, 2)
