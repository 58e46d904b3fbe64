"""Needles: where they lie, what counts as found, and that every policy answers from the caches that it says."""

import csv
import sys
from dataclasses import replace
from functools import cache

import chex
import numpy as np
import pytest
from goldens import model_path

import jaxinfer
from jaxinfer import Sampler
from jaxinfer.cache import KVCache, size_bytes
from jaxinfer.chat import CHATML
from jaxinfer.needle import Answer, Policy, answers, make, plot, policies, recovered, sentences, table
from jaxinfer.presses import LagKV, SnapKV, Votes
from jaxinfer.session import Session
from jaxinfer.snapkv import Eviction

pytestmark = pytest.mark.usefixtures("quick_compiler")

LENGTH, NEW = 240, 8


@cache
def load(name: str = "qwen3"):
    return jaxinfer.load(model_path(name), expand=False)


@pytest.mark.usefixtures("templates_here")
@pytest.mark.parametrize(
    ("name", "template", "begin", "end"),
    [
        ("qwen3", None, "", " is"),
        ("qwen3", CHATML, "<|im_start|>user\n", "<|im_start|>assistant\n"),
        ("gemma3", None, "<bos>", " is"),  # SentencePiece's merges
    ],
)
def test_a_needle_stands_at_its_depth_of_a_text_of_its_length(name, template, begin, end):
    tokenizer = replace(load(name).tokenizer, chat_template=template)
    # No sentence of ours is longer: bytes are most of these vocabularies, a real one has a quarter as many tokens.
    longest = max(len(tokenizer.encode(" " + s)) for s in sentences(np.random.default_rng(5), 300)) + 20
    seen = set()
    for length, depth in [(1500, 0.0), (1500, 0.4), (1500, 1.0), (2000, 0.75)]:
        case = make(tokenizer, length, depth, 7)
        assert length - longest < len(case.tokens) <= length
        text = tokenizer.decode(case.tokens, skip_special=False)
        assert text.count(case.number) == text.count(case.needle) == 1
        assert text.startswith(begin)
        assert text.endswith(end)
        filler = text.removeprefix(begin).split("\n\nWhat is the secret number of the ")[0]
        before, after = map(str.strip, filler.split(case.needle))
        share = len(tokenizer.encode(before)) / len(tokenizer.encode(before + after))
        assert share == pytest.approx(depth, abs=longest / length)
        assert (before == "", after == "") == (depth == 0, depth == 1)
        seen.add((case.needle, (before + after).split(".")[0]))
    assert len(seen) == 1, "one seed, one needle and one text"
    assert make(tokenizer, 1500, 0.5, 8).needle != case.needle


def test_the_text_is_made_of_different_sentences_without_numbers():
    texts = [sentences(np.random.default_rng(seed), 5000) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 5000
    assert not any(c.isdigit() for text in texts[0] for c in text)
    assert all(text[0].isupper() and text.endswith(".") and len(text.split()) > 8 for text in texts[0])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The secret number of the blue harbour is 58213.", True),
        ("**58,213**", True),
        ("58213", True),
        ("5821", False),
        ("158213", False),
        ("582130", False),
        ("5 8 2 1 3", False),
        ("", False),
    ],
)
def test_an_answer_has_the_number_as_one_of_its_own(text, found):
    assert recovered("58213", text) == found


SNAPKV = SnapKV(window=16)
EVICTIONS = {
    "all": Eviction(press=SNAPKV, keep=LENGTH),
    "auto": Eviction(press=SNAPKV),  # so small a cache is left whole
    "snapkv": Eviction(press=SNAPKV, keep=64),
    "interleaved": Eviction(press=SNAPKV, keep=64, interleaved=True),
    "votes": Eviction(press=Votes(window=8), keep=64, one_list=True),  # of the 16 that are observed
}


def test_each_policy_answers_as_a_session_of_its_own(monkeypatch):
    model, params, tokenizer = load()
    answering, decode, depths = [], Session.decode, [0.2, 0.8]
    greedy, stops = Sampler.greedy(), np.array(tokenizer.eog_ids, np.int32)

    def spy(session, *args, **options):
        answering.append(session)
        return decode(session, *args, **options)

    monkeypatch.setattr(Session, "decode", spy)
    some = [Policy("full"), *(Policy(*one) for one in EVICTIONS.items())]
    options = {"lengths": [LENGTH], "depths": depths, "seeds": 1, "max_tokens": NEW, "chunk": 64, "batch": 2}
    got = list(answers(model, params, tokenizer, some, **options))
    monkeypatch.undo()
    assert [(one.policy, one.depth) for one in got] == [(p.name, depth) for p in some for depth in depths]
    cases, texts = [make(tokenizer, LENGTH, depth, 0) for depth in depths], {}
    for i, ((policy, eviction), session) in enumerate(zip(some, answering, strict=True)):
        texts[policy] = [one.text for one in got[2 * i : 2 * i + 2]]
        assert [one.recovered for one in got[2 * i : 2 * i + 2]] == [False] * 2, "random weights find nothing"
        full = [c for c in session.cache if isinstance(c, KVCache) and c.chunk is None]
        assert got[2 * i].cache_bytes * 2 == size_bytes(session.cache)
        whole = policy in ("full", "all", "auto")
        assert {c.k.shape[3] for c in full} == {256 if whole else 64 + NEW}
        assert got[2 * i].keep == {"full": 0, "all": LENGTH, "auto": 0}.get(policy, 64)
        if policy in ("all", "auto"):
            assert session.kept is None
            continue
        own = Session(model, params, ctx=LENGTH + NEW, chunk=64, batch=2, eviction=eviction)
        own.extend([case.tokens for case in cases])
        if eviction:
            own.evict(NEW)
        chex.assert_trees_all_equal(session.kept, own.kept)
        out, _ = own.decode(own.start(greedy), NEW, sampler=greedy, stops=stops, burst=NEW)
        assert texts[policy] == [tokenizer.decode(row[row >= 0].tolist()).strip() for row in out]
    assert all((texts[policy] == texts["full"]) == (policy in ("full", "all", "auto")) for policy in texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [0.5, 1.1]}, "depth=1.1 must be from 0 to 1"),
        ({"depths": [-0.1]}, "depth=-0.1 must be from 0 to 1"),
        ({"depths": []}, "depths is empty"),
        ({"lengths": [600, 4090]}, r"lengths \[4090\] and max_tokens=8 exceed the context: prompts can have 4088"),
        ({"lengths": [100]}, "length=100 is less than the [0-9]+ tokens of needle and question alone"),
        ({"lengths": [-1]}, "length=-1 is less than"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"batch": 0}, "batch=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"policies": []}, "policies is empty"),
        ({"tokenizer": None}, "no tokenizer"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(options, message):
    model, params, tokenizer = load()
    given = {"tokenizer": tokenizer, "policies": [Policy("full")], "lengths": [600], "depths": [0.5], "max_tokens": 8}
    with pytest.raises(ValueError, match=message):
        answers(model, params, **given | options)


def test_policies_by_name():
    rope = dict(load().model.config.mixers)["full"].rope
    found = policies(["snapkv", "votes", "tova", "expected"], [64, 128], rope, 32)
    assert [(p.name, p.eviction and p.eviction.keep) for p in found] == [
        ("full", None),
        *((name, keep) for name in ("snapkv", "votes", "tova", "expected") for keep in (64, 128)),
    ]
    evictions = [p.eviction for p in found[1:]]
    assert [e.press.window for e in evictions] == [32] * 4 + [1] * 2 + [32] * 2
    assert [e.one_list for e in evictions] == [False] * 2 + [True] * 2 + [False] * 4
    assert evictions[-1].press.rope == rope
    [_, one] = policies(["snapkv"], [64], rope, one_list=True, interleaved=True)
    assert one == ("snapkv, one list, interleaved", Eviction(press=SnapKV(), keep=64, one_list=True, interleaved=True))
    assert isinstance(policies(["lagkv"], [8], None)[1].eviction.press, LagKV)
    with pytest.raises(ValueError, match="'snap' is no press; known are snapkv,"):
        policies(["snap"], [64], rope)
    with pytest.raises(ValueError, match="keep=8 is below the 64 tokens"):
        policies(["snapkv"], [8], rope)


SOME = [
    Answer("full", 0, 512, 0.25, 0, True, 3_000_000, "It is 11111."),
    Answer("full", 0, 512, 0.75, 0, True, 3_000_000, 'It "is" 11111, yes'),
    Answer("full", 0, 512, 0.25, 1, False, 3_000_000, "no"),
    Answer("full", 0, 1024, 0.25, 0, True, 6_000_000, "11111"),
    Answer("tova", 64, 512, 0.25, 0, False, 400_000, ""),
    Answer("tova", 64, 512, 0.75, 0, True, 400_000, "11111"),
]


def test_tables(tmp_path):
    assert list(table(SOME)) == [
        "| policy | keep | tokens | cache | 0.25 | 0.75 | all |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| full | all | 512 | 3.0 MB | 1/2 | 1/1 | 2/3 |",
        "| full | all | 1024 | 6.0 MB | 1/1 | 0/0 | 1/1 |",
        "| tova | 64 | 512 | 0.4 MB | 0/1 | 1/1 | 1/2 |",
    ]
    rows = list(csv.DictReader(table(iter(SOME), "csv")))
    assert rows[1] == {name: str(value) for name, value in SOME[1]._asdict().items()}
    assert len(rows) == len(SOME)
    with pytest.raises(ValueError, match="'xml' is not a form of output; known are md, csv"):
        list(table(SOME, "xml"))


def test_a_plot_is_a_picture(tmp_path):
    plot(iter(SOME), tmp_path / "needles.png")
    assert (tmp_path / "needles.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"needles.png: a plot needs matplotlib: pip install 'jaxinfer\[plot\]'"):
        plot(SOME, tmp_path / "needles.png")
