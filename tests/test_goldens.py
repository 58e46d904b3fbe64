"""Whole models against llama.cpp: every golden file, at every stored position, for several ways to run it."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxinfer
from jaxinfer import Sampler
from jaxinfer.quants import FORMATS, Packed

GOLDENS = Path(__file__).parent / "goldens"
PROMPTS = sorted(p.stem for p in GOLDENS.glob("*.npz") if not p.stem.startswith("SmolLM2"))


def check(got: np.ndarray, want: np.ndarray) -> None:
    """Ten times the worst float noise that llama.cpp shows against itself, see goldens/README.md."""
    assert np.abs(got - want).max() <= 3e-3
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)


def _weights(params):
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Packed))


def _is_packed(prompt: str) -> bool:
    return any(t.name in prompt for t in FORMATS)


@pytest.mark.parametrize("expand", [True, False], ids=["expanded", "packed"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_and_greedy_tokens(prompt, expand):
    golden = np.load(GOLDENS / f"{prompt}.npz")
    model, params, tokenizer = jaxinfer.load(GOLDENS / f"{prompt.split('.')[0]}.gguf", expand=expand)
    assert any(isinstance(w, Packed) for w in _weights(params)) == (not expand and _is_packed(prompt))
    tokens = golden["tokens"].tolist()
    check(jaxinfer.score(model, params, tokens)[golden["positions"]], golden["logits"])
    pieces = jaxinfer.stream(
        model, params, tokenizer, tokens, max_tokens=16, ignore_eos=True, sampler=Sampler.greedy(), ctx=4096
    )
    assert [piece.token for piece in pieces] == golden["greedy_tokens"].tolist()
