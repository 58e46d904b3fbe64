"""Prompts to text: what ends an answer, what is held back, what is refused."""

import dataclasses
from functools import cache

import numpy as np
import pytest
from goldens import model_path

import jaxinfer
from jaxinfer import Sampler, engine
from jaxinfer.generate import StopText, plan

pytestmark = pytest.mark.usefixtures("quick_compiler")

GREEDY = Sampler.greedy()


@cache
def load(name: str = "qwen3"):
    return jaxinfer.load(model_path(name), expand=False)


@pytest.mark.parametrize(
    ("texts", "stop", "want", "found"),
    [
        ("a b ab", [], ["a", "b", "ab"], False),
        ("a stop b", ["stop"], ["a", ""], True),
        ("a st op b", ["stop"], ["a", "", ""], True),
        ("a st a b", ["stop"], ["a", "", "sta", "b"], False),  # what looked like a stop string comes out later
        ("a st", ["stop"], ["a", "st"], False),  # and at the end
        ("ab ab c", ["ba", "bc"], ["a", ""], True),  # the earliest one wins
        ("xstopy b", ["stop", "x"], [""], True),
    ],
)
def test_stop_strings_are_held_back_and_cut(texts, stop, want, found):
    text, out, texts = StopText(stop), [], texts.split()
    for i, one in enumerate(texts):
        if not text.found:
            out.append(text.push(one, last=i == len(texts) - 1))
    assert (out, text.found) == (want, found)


@pytest.mark.parametrize("stop", ["text", [""]])
def test_stop_strings_must_not_be_empty(stop):
    with pytest.raises(ValueError, match="stop="):
        StopText([*stop, ""])


def test_an_answer_streams_with_figures_on_its_last_piece():
    seen, compiled = [], []
    out = list(
        jaxinfer.stream(
            *load(),
            list(range(40)),
            max_tokens=9,
            chunk=16,
            burst=4,
            ignore_eos=True,
            sampler=GREEDY,
            progress=lambda done, total: seen.append((done, total)),
            compiling=lambda name, seconds: compiled.append((name, seconds)),
        )
    )
    assert [p.stats for p in out[:-1]] == [None] * 8
    stats = out[-1].stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.new_tokens, stats.finish) == (40, 9, "length")
    assert seen == [(8, 40), (24, 40), (40, 40)]  # the padding is on the left
    assert [name for name, _ in compiled] == ["prefill of 16 tokens"] * 2 + ["decode"] * 2
    assert [seconds is None for _, seconds in compiled] == [True, False, True, False]
    assert list(stats.compile_s) == ["prefill of 16 tokens", "decode"]
    assert min(stats.prompt_s, stats.decode_s, stats.first_token_s, stats.peak_bytes) > 0


def test_generate_is_the_text_of_stream():
    options = {"max_tokens": 12, "sampler": Sampler(seed=3, temperature=1.0)}
    text = jaxinfer.generate(*load(), "hello", **options)
    assert text == "".join(p.text for p in jaxinfer.stream(*load(), "hello", **options))
    assert text == jaxinfer.generate(*load(), "hello", chunk=2, burst=3, **options)


def test_an_end_token_ends_the_answer():
    model, params, tokenizer = load()
    ids = list(range(10))
    free = [p.token for p in jaxinfer.stream(*load(), ids, max_tokens=12, ignore_eos=True, sampler=GREEDY)]
    run = plan(model, params, tokenizer, [ids], max_tokens=12, sampler=GREEDY)
    assert set(run.stops.tolist()) == set(tokenizer.eog_ids)
    ending = dataclasses.replace(tokenizer, eog_ids=(free[4],))
    out = list(jaxinfer.stream(model, params, ending, ids, max_tokens=12, sampler=GREEDY))
    first = free.index(free[4])
    assert [p.token for p in out] == free[: first + 1]
    assert out[-1].stats is not None
    assert out[-1].stats.finish == "stop"


def test_no_program_is_compiled_twice():
    programs = engine.prefill, engine.decode
    for program in programs:
        program.clear_cache()
    for _ in range(2):
        list(jaxinfer.stream(*load(), list(range(30)), max_tokens=20, chunk=8, ignore_eos=True, sampler=GREEDY))
    assert [program._cache_size() for program in programs] == [1, 1]


def test_score_takes_a_list_or_a_list_of_lists():
    model, params, _ = load()
    one, two = list(range(5)), list(range(100, 117))
    a, b = jaxinfer.score(model, params, [one, two], chunk=8)
    assert (a.shape, b.shape, a.dtype) == ((5, 288), (17, 288), np.float32)
    # Ten times the 7e-5 that llama.cpp's own logits move by with the shape of a batch.
    np.testing.assert_allclose(a, jaxinfer.score(model, params, one), rtol=0, atol=7e-4)
    np.testing.assert_allclose(b, jaxinfer.score(model, params, two, chunk=3), rtol=0, atol=7e-4)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([1, 288], {}, r"token ids \[288\].*0 to 287"),
        ([-1], {}, r"token ids \[-1\]"),
        ([1], {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ([1], {"chunk": 0}, "chunk=0"),
        ([1], {"ctx": 0}, "ctx=0"),
        ([1], {"burst": 0}, "burst=0"),
        ([1] * 10, {"max_tokens": 7, "ctx": 16}, "10 tokens.*16 tokens: the largest max_tokens that fits is 6"),
        ("the", {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs={'a': 1} needs a prompt of chat messages"),
        ([1] * 20, {"max_tokens": 7, "ctx": 16}, "the longest prompt that fits has 9 tokens"),
    ],
)
def test_what_cannot_run_is_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        jaxinfer.generate(*load(), prompt, **options)


def test_text_needs_a_tokenizer():
    model, params, _ = load()
    with pytest.raises(ValueError, match="no tokenizer"):
        jaxinfer.generate(model, params, None, "text")
    assert jaxinfer.generate(model, params, None, [1, 2], max_tokens=2) == ""
