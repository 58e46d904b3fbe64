"""The real model of the quickstart, as its run file names it, against llama.cpp with the weights dequantised to F32."""

import json
import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import jaxinfer
from jaxinfer import HOPPER, HOPPER_INT8, HOPPER_INVARIANT, Sampler

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/goldens/SmolLM2-135M-Instruct.Q4_1"
CTX = 512


_RUN = tomllib.loads((ROOT / "configs/quickstart.toml").read_text())
MODEL = {"path": _RUN["model"], "sha256": _RUN["sha256"]}


@cache
def load(expand: bool | None = None):
    return jaxinfer.load(**MODEL, expand=expand)


@pytest.fixture
def loaded():
    return load(False)


@pytest.fixture(scope="module")
def golden():
    return np.load(f"{GOLDEN}.npz"), json.loads(Path(f"{GOLDEN}.json").read_text())


def test_logits_and_likelihood(loaded, golden):
    """With packed weights."""
    arrays, _ = golden
    model, params, _ = loaded
    tokens = arrays["chat_tokens"].tolist()
    logits = jaxinfer.score(model, params, tokens)
    best = logits[-1, arrays["chat_dequant_top50_ids"]]
    # A hundred times llama.cpp's own float noise on this model, 5e-5 in a logit.
    np.testing.assert_allclose(best, arrays["chat_dequant_top50_logits"], rtol=0, atol=5e-3)
    logits = logits[:-1].astype(np.float64)
    top = logits.max(axis=1)
    nll = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[range(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(nll.sum(), arrays["chat_dequant_nll_sum"], rtol=0, atol=0.02)


def test_greedy_tokens(golden):
    """With weights as they are loaded without more said: expanded."""
    arrays, _ = golden
    tokens, want = arrays["short_tokens"].tolist(), arrays["short_dequant_greedy_tokens"].tolist()
    options = {"max_tokens": 32, "sampler": Sampler.greedy(), "ctx": CTX}
    assert arrays["short_dequant_greedy_margins"].min() > 0.01  # far above the noise, so the tokens are determined
    assert [p.token for p in jaxinfer.stream(*load(), tokens, **options)] == want[:32]


def test_text_and_chat_messages_become_the_golden_tokens(loaded, golden):
    arrays, facts = golden
    for name in ("short", "long"):
        text = facts["prompts"][name]["text"]
        assert loaded.tokenizer.encode(text, parse_special=True) == arrays[f"{name}_tokens"].tolist()
    assert loaded.tokenizer.chat(facts["chat_messages"]) == arrays["chat_tokens"].tolist()


def test_it_answers_in_english(loaded):
    text = jaxinfer.generate(
        *loaded,
        [{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=300,  # it ends far before
        ctx=CTX,
        sampler=Sampler.greedy(),
    )
    assert "Paris" in text


@pytest.mark.gpu
@pytest.mark.parametrize("ops", [None, HOPPER_INVARIANT], ids=["default", "invariant"])
@pytest.mark.parametrize("name", ["short", "chat", "long"])
def test_greedy_tokens_on_a_gpu(golden, name, ops):
    """With the kernels: float16 is wrong by less than half of these margins, the smallest apart."""
    arrays, _ = golden
    model, params, _ = jaxinfer.load(**MODEL, dtype="float16", ops=ops)
    assert model.ops in (HOPPER, HOPPER_INVARIANT)
    tokens, want = arrays[f"{name}_tokens"].tolist(), arrays[f"{name}_dequant_greedy_tokens"].tolist()
    logits = jaxinfer.score(model, params, tokens + want[:-1], chunk=256)[len(tokens) - 1 :]
    sure = arrays[f"{name}_dequant_greedy_margins"] > 0.05
    assert sure.sum() >= 63
    np.testing.assert_array_equal(logits.argmax(1)[sure], np.array(want)[sure])
    options = {"max_tokens": 64, "ignore_eos": True, "sampler": Sampler.greedy()}
    made = [p.token for p in jaxinfer.stream(model, params, None, tokens, **options)]
    known = 64 if sure.all() else int(np.argmin(sure))
    assert made[:known] == want[:known]


@pytest.mark.gpu
@pytest.mark.parametrize("ops", [HOPPER, HOPPER_INT8], ids=["15 bits", "8 bits"])
@pytest.mark.parametrize("chunk", [256, 8])
def test_next_tokens_on_a_gpu_in_bfloat16(golden, ops, chunk):
    """Many rows at a time, and few: tokens that are the best by far, as a logit is wrong by some 2^-8 of its 20."""
    arrays, _ = golden
    model, params, _ = jaxinfer.load(**MODEL, ops=ops)
    for name in ("short", "chat"):
        tokens, want = arrays[f"{name}_tokens"].tolist(), arrays[f"{name}_dequant_greedy_tokens"]
        logits = jaxinfer.score(model, params, tokens + want[:-1].tolist(), chunk=chunk)[len(tokens) - 1 :]
        sure = arrays[f"{name}_dequant_greedy_margins"] > 0.5
        assert sure.sum() >= 40
        np.testing.assert_array_equal(logits.argmax(1)[sure], want[sure])
