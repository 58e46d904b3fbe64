"""Whole models against llama.cpp: every golden prompt, at every stored position, in several ways to run it.

Logits come from weights as in the file and stacked layers, greedy tokens from expanded weights and separate layers.
Compiling takes the time, so only F32 models, which have every architecture, run in all ways. `-k` takes a way, a model
or both: `-k whole`, `-k "chunks and gemma4"`, `-k qwen3-Q4_K_M`.
"""

from functools import cache

import goldens
import jax
import numpy as np
import pytest

import jaxinfer
from jaxinfer import REFERENCE, Loaded, Ops, Sampler, gguf
from jaxinfer.loader import architectures
from jaxinfer.quants import FORMATS, Packed


@cache
def architecture(name: str) -> str:
    return gguf.read(goldens.model_path(name)).metadata["general.architecture"].replace("-", "_")


def model(prompt: str) -> str:
    return prompt.split(".")[0]


PROMPTS = [p for p in goldens.PROMPTS if architecture(model(p)) in architectures()]
F32 = [p for p in PROMPTS if model(p) in goldens.F32]


@cache
def load(prompt: str, expand: bool = False, ops: Ops | None = None) -> Loaded:
    return jaxinfer.load(goldens.model_path(model(prompt)), expand=expand, ops=ops)


def check(prompt: str, logits: np.ndarray) -> None:
    """Ten times the worst float noise that llama.cpp shows against itself, see goldens/README.md."""
    golden = goldens.golden(prompt)
    got, want = logits[golden.positions], golden.logits
    assert np.abs(got - want).max() <= 3e-3
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_whole(prompt):
    model, params, _ = load(prompt)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Packed))
    assert any(isinstance(w, Packed) for w in leaves) == any(t.name in prompt for t in FORMATS)
    check(prompt, jaxinfer.score(model, params, goldens.golden(prompt).tokens))


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("prompt", F32)
def test_chunks(prompt, chunk):
    model, params, _ = load(prompt)
    check(prompt, jaxinfer.score(model, params, goldens.golden(prompt).tokens, chunk=chunk))


@pytest.mark.parametrize("prompt", F32)
def test_row_of_a_ragged_batch(prompt):
    model, params, _ = load(prompt)
    tokens, rng = goldens.golden(prompt).tokens, np.random.default_rng(0)
    shorter, longer = (rng.integers(0, model.config.vocab, n).tolist() for n in (-(-len(tokens) // 2), len(tokens) + 9))
    check(prompt, jaxinfer.score(model, params, [shorter, tokens, longer], chunk=7)[1])


@pytest.mark.parametrize("prompt", F32)
def test_reference_operations(prompt):
    model, params, _ = load(prompt, ops=REFERENCE)
    check(prompt, jaxinfer.score(model, params, goldens.golden(prompt).tokens))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens(prompt):
    golden, options = goldens.golden(prompt), {"max_tokens": 16, "ignore_eos": True, "ctx": 4096}
    pieces = jaxinfer.stream(*load(prompt, expand=True), golden.tokens, sampler=Sampler.greedy(), **options)
    assert [piece.token for piece in pieces] == golden.greedy_tokens
