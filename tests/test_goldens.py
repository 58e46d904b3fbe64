"""Whole models against llama.cpp: every golden prompt, at every stored position, in several ways to run it.

Compiling takes the time. So all prompts of a model are rows of one batch; F32 models, which have every architecture,
run whole by the reference operations, and those of them that chunks may matter to in chunks and on by the operations
of this device; quantised ones run whole by these. On a GPU every prompt runs.
`-k` takes a way, a model or both: `-k whole`, `-k "chunks and gemma4"`, `-k llama-Q4_K_M`.
"""

from functools import cache

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import MODELS, PROMPTS

import jaxinfer
from jaxinfer import GPU, REFERENCE, Loaded, Ops, Sampler, engine
from jaxinfer.layers.norm import rms_norm
from jaxinfer.quants import FORMATS, Packed


def prompts_of(name: str) -> list[str]:
    return [p for p in PROMPTS if p.split(".")[0] == name]


F32 = goldens.F32
DRAFTING = [name for name in F32 if "mtp" in name]
# Of each type there are a llama and a qwen3 file, which differ in what is seen in F32; delta nets and types of blocks
# are seen in others, and the layers before a draft where that is.
WHOLE = [name for name in MODELS if not (name.startswith("qwen3-") and f"llama-{name[6:]}" in MODELS)]
WHOLE = [name for name in WHOLE if name != "qwen35-Q8_0" and name not in DRAFTING]
# What these have beyond another model - biases, scaled positions, another choice of experts, another order of rows - is
# the same in a chunk of any size: llamas are as qwen3; delta nets and experts as they are in qwen35moe; rings as they
# are in gemma4-e and gpt-oss.
ALIKE = {"llama", "llama-linear", "llama-moe", "llama-tied", "olmoe", "qwen2", "qwen3-yarn", "qwen3moe"}
ALIKE |= {"gemma3", "gemma4-dense", "gemma4-moe", "qwen35", "qwen3next"}
TRUNKS = [name for name in F32 if name not in ALIKE and name not in DRAFTING]
STACKED = {"gpt-oss"}  # in chunks too
OPTIMISED = {"gemma4-e", "gpt-oss", "qwen3", "qwen35moe"}  # whole; the third has a prompt of 1200 tokens
GREEDY, CHUNK, STEPS = Sampler.greedy(), 7, 16


@cache
def load(name: str, expand: bool = False, ops: Ops | None = None) -> Loaded:
    return jaxinfer.load(goldens.model_path(name), expand=expand, ops=ops)


def check(prompt: str, logits: np.ndarray, drafted: bool = False) -> None:
    """Ten times the worst float noise that llama.cpp shows against itself, see goldens/README.md."""
    golden = goldens.golden(prompt)
    got, want = logits[golden.positions], golden.mtp_logits if drafted else golden.logits
    assert want is not None
    assert np.abs(got - want).max() <= 3e-3
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("name", WHOLE)
def test_whole(name, request):
    """Weights as in the file and stacked layers."""
    if name not in OPTIMISED:
        request.getfixturevalue("quick_compiler")
    model, params, _ = load(name, ops=REFERENCE if name in F32 else None)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Packed))
    assert any(isinstance(w, Packed) for w in leaves) == any(t.name in name for t in FORMATS)
    prompts = prompts_of(name)
    found = jaxinfer.score(model, params, [goldens.golden(p).tokens for p in prompts])
    for prompt, logits in zip(prompts, found, strict=True):
        check(prompt, logits)


@pytest.fixture(scope="module", params=TRUNKS)
def trunk(request) -> str:
    """Tests that take it come model by model, so that they share its programs."""
    return request.param


@cache
def chunked(name: str) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Logits and greedy tokens of a model's prompts as rows of a ragged batch, mostly with separate layers, in chunks
    and then by `decode`."""
    model, params, _ = load(name, expand=name not in STACKED)
    prompts, rng = [p for p in prompts_of(name) if p != "qwen3.long"], np.random.default_rng(0)  # 172 calls of CHUNK
    rows = [goldens.golden(p).tokens for p in prompts]
    sizes = -(-len(rows[0]) // 2), max(map(len, rows)) + 9
    rows += [rng.integers(0, model.config.vocab, n).tolist() for n in sizes]
    tokens, pos = engine.left_pad(rows, CHUNK)
    held = model.init_cache(params, len(rows), engine.slots_for(tokens.shape[1] + STEPS), chunk=CHUNK)
    parts = []
    for i in range(0, tokens.shape[1], CHUNK):
        part = slice(i, i + CHUNK)
        logits, held = engine.chunk_logits(model, params, tokens[:, part], pos[:, part], held)
        parts.append(np.asarray(logits))
    state = engine.start(jnp.asarray(parts[-1][:, -1]), rows, held, GREEDY)
    keys, stops = jnp.broadcast_to(jax.random.key(0), len(rows)), np.array([-1], np.int32)
    made, _ = engine.decode(model, params, state, keys, stops, STEPS, sampler=GREEDY, room=STEPS)
    logits, made = np.concatenate(parts, axis=1), np.asarray(made)
    return {p: (logits[i, -len(rows[i]) :], made[i].tolist()) for i, p in enumerate(prompts)}


@pytest.mark.usefixtures("quick_compiler")
def test_chunks_of_a_ragged_batch(trunk):
    for prompt, (logits, _) in chunked(trunk).items():
        check(prompt, logits)


@pytest.mark.usefixtures("quick_compiler")
def test_greedy_tokens(trunk):
    """Decoding is chunks of one token."""
    for prompt, (_, tokens) in chunked(trunk).items():
        assert tokens == goldens.golden(prompt).greedy_tokens


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(("name", "chunk"), list(zip(DRAFTING, (1, CHUNK), strict=True)))
def test_drafts(name, chunk):
    """A draft sees the hidden state of the token before, which may be the last of the chunk before."""
    model, params, _ = load(name)
    (prompt,) = prompts_of(name)
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
        return (model.logits(params, x), arch.draft_logits(params, y, config, ops)), hidden[:, -1:], held, drafts

    last, out = jnp.zeros((1, 1, config.width)), []
    tokens, pos = engine.left_pad([ids], chunk)
    for i in range(0, tokens.shape[1], chunk):
        t, p = tokens[:, i : i + chunk], pos[:, i : i + chunk]
        logits, last, held, drafts = step(params, t, p, last, held, drafts)
        out.append([np.asarray(one[0]) for one in logits])
    for drafted, parts in enumerate(zip(*out, strict=True)):
        check(prompt, np.concatenate(parts)[-len(ids) :], drafted=bool(drafted))


@pytest.mark.gpu
@pytest.mark.parametrize("prompt", PROMPTS)
def test_on_a_gpu(prompt):
    model, params, _ = jaxinfer.load(goldens.model_path(prompt.split(".")[0]), dtype="float32")
    assert model.ops.experts is GPU.experts
    check(prompt, jaxinfer.score(model, params, goldens.golden(prompt).tokens, chunk=64))


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [64, 8])
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_in_bfloat16(name, chunk):
    """Rounding to 2**-9 at each of some hundred steps; where it changes a choice of experts, a row differs wholly.

    Packed weights of 256 columns and more go through the kernels for many rows and for few.
    """
    model, params, _ = jaxinfer.load(goldens.model_path(name))
    assert model.config.dtype == jnp.bfloat16
    golden = goldens.golden(f"{name}.base")
    got, want = jaxinfer.score(model, params, golden.tokens, chunk=chunk)[golden.positions], golden.logits
    assert np.median(np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)) <= 0.1
    assert (got.argmax(1) == want.argmax(1)).mean() >= 0.75


def test_every_model_and_every_way_is_there():
    assert (len(MODELS), len(PROMPTS), len(F32), len(DRAFTING)) == (59, 71, 20, 2)
    assert (len(WHOLE), len(TRUNKS)) == (40, 5)
    assert {*WHOLE, *DRAFTING} > {*F32, *ALIKE, *OPTIMISED}
    assert set(TRUNKS) > STACKED
