"""Sessions: forked, cut back, asked several things, continued as a chat; always what a run without them gives."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from goldens import model_path

import jaxinfer
from jaxinfer import Sampler
from jaxinfer.cache import KVCache
from jaxinfer.ops import REFERENCE
from jaxinfer.presses import SnapKV
from jaxinfer.session import Session
from jaxinfer.snapkv import Eviction

pytestmark = pytest.mark.usefixtures("quick_compiler")

GREEDY = Sampler.greedy()
NEVER = np.array([-1], np.int32)
CHUNK, SLOTS, BURST = 16, 512, 8
EVICTION = Eviction(press=SnapKV(window=8), keep=32)
KINDS = ["qwen3", "gemma4-dense", "qwen35moe"]  # full caches; rings of 256 slots; recurrent states


@cache
def load(name: str):
    return jaxinfer.load(model_path(name), ops=REFERENCE, expand=False)


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 288, n).tolist()


def new(name: str, *parts: list[int], eviction: Eviction | None = None) -> Session:
    session = Session(*load(name)[:2], ctx=SLOTS, chunk=CHUNK, eviction=eviction)
    return read(session, *parts)


def read(session: Session, *parts: list[int]) -> Session:
    """Reads them, each from a chunk of its own on, in calls of one chunk."""
    for part in parts:
        first = len(part) % CHUNK or CHUNK
        for start in (0, *range(first, len(part), CHUNK)):
            session.extend([part[start : first if start == 0 else start + CHUNK]])
    return session


def answer(session: Session, n: int = BURST) -> list[int]:
    out, _ = session.decode(session.start(GREEDY), n, sampler=GREEDY, stops=NEVER, burst=BURST)
    return out[0].tolist()


def bits(session: Session):
    """All that is in it, as copies."""
    arrays = jax.tree.map(np.array, (session.cache, session.logits))
    return arrays, [*session.tokens[0]], [*session._room], [*session._observed]


def assert_same(one, other):
    assert one[1:] == other[1:]
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])


def live(session: Session):
    """Keys and values at their positions, of which there may be others in slots that nobody sees; states."""

    def one(stack):
        if not isinstance(stack, KVCache):
            return stack
        seen = np.asarray(stack.pos >= 0)[..., None]
        return np.where(seen, stack.k, 0), np.where(seen, stack.v, 0), np.asarray(stack.pos)

    return [one(stack) for stack in session.cache], np.asarray(session.logits)


def assert_goes_on_alike(one: Session, other: Session):
    """From the same bits to the same answer."""
    jax.tree.map(np.testing.assert_array_equal, live(one), live(other))
    assert one.tokens == other.tokens
    assert answer(one) == answer(other)
    jax.tree.map(np.testing.assert_array_equal, live(one), live(other))


@pytest.mark.parametrize("name", KINDS)
def test_a_fork_goes_on_as_the_original_which_it_leaves_alone(name):
    session = new(name, prompt(60, 1))
    before, fork = bits(session), session.fork()
    more = prompt(20, 2)
    found = answer(read(fork, more))
    assert_same(bits(session), before)
    assert answer(read(session, more)) == found
    assert_same(bits(session), bits(fork))


@pytest.mark.parametrize("name", ["qwen3", "gemma4-dense"])
def test_a_session_is_cut_back_to_any_token(name):
    first, lost, then = prompt(48, 3), prompt(27, 4), prompt(20, 5)
    session = new(name, first, lost)
    answer(session)
    assert session.rewind(48) == 48
    assert session.tokens == [first]
    with pytest.raises(ValueError, match="no logits to go on from"):
        session.start(GREEDY)
    assert_goes_on_alike(read(session, then), new(name, first, then))
    assert session.rewind(1000) == 76  # it has no more
    assert session._room == [SLOTS - 76]


def test_a_ring_that_has_wrapped_comes_back_to_its_mark_only():
    first, second, then = prompt(256, 6), prompt(48, 7), prompt(20, 8)
    session = new("gemma4-dense", first)
    session.mark()
    read(session, second)
    assert session.rewind(290) == 256
    fresh = new("gemma4-dense", first)
    np.testing.assert_array_equal(session.logits, fresh.logits)
    assert_goes_on_alike(read(session, then), read(fresh, then))
    assert session.rewind(255) == 0
    assert session.tokens == [[]]
    assert_goes_on_alike(read(session, then), new("gemma4-dense", then))


def test_a_mark_beyond_a_cut_is_none():
    """The ring was cut to before it, and then held other tokens."""
    session = new("gemma4-dense", prompt(100, 9))
    session.mark()
    assert session.rewind(60) == 60
    read(session, prompt(230, 10))
    assert session.rewind(120) == 0


def test_a_recurrent_state_comes_back_to_its_mark_only():
    first, second, then = prompt(48, 11), prompt(30, 12), prompt(20, 13)
    session = new("qwen35moe", first)
    session.mark()
    for _ in range(2):  # the mark is not used up
        read(session, second)
        answer(session)
        assert session.rewind(70) == 48
        assert session.tokens == [first]
    assert_goes_on_alike(read(session, then), new("qwen35moe", first, then))
    assert session.rewind(47) == 0
    assert_goes_on_alike(read(session, then), new("qwen35moe", then))


def test_an_evicted_session_is_cut_back_to_the_eviction_at_most():
    first, then = prompt(96, 14), prompt(10, 15)
    session, other = (new("qwen3", first, eviction=EVICTION) for _ in range(2))
    for one in (session, other):
        one.evict(64)
        read(one, then)
    want = bits(session)
    read(session, prompt(20, 16))
    assert session.rewind(106) == 106
    assert session._room == want[2]
    more = prompt(5, 17)
    assert_goes_on_alike(read(session, more), read(other, more))
    assert session.rewind(95) == 0
    assert_goes_on_alike(read(session, first), new("qwen3", first, eviction=EVICTION))


def test_queries_that_a_cut_loses_are_read_again():
    first, then = prompt(80, 18), prompt(30, 19)
    session = new("qwen3", first, prompt(20, 20), eviction=EVICTION)
    assert session.rewind(80) == 72
    with pytest.raises(ValueError, match="looks from 8 tokens, but only the last 0 were observed"):
        session.evict(8)
    read(session, first[72:], then)
    fresh = new("qwen3", first[:72], first[72:], then, eviction=EVICTION)
    for one in (session, fresh):
        one.evict(8)
    jax.tree.map(np.testing.assert_array_equal, session.kept, fresh.kept)
    assert_goes_on_alike(session, fresh)


def test_a_mark_without_its_queries_is_none():
    session = new("qwen35moe", prompt(48, 21), eviction=EVICTION)
    session._observed = [7]  # as after a cut
    session.mark()
    read(session, prompt(5, 22))
    assert session.rewind(50) == 0


@pytest.mark.parametrize("name", ["qwen3", "qwen35moe"])
def test_questions_of_one_document_each_have_their_own_eviction(name):
    document, questions = prompt(80, 23), [prompt(16, 24), prompt(16, 25)]
    whole = new(name, document, eviction=EVICTION)
    before, lists = bits(whole), []
    for question in questions:
        asked = read(whole.fork(), question)
        with_question = bits(asked)
        found = asked.evicted(BURST)
        lists.append(found.kept)
        alone = new(name, document, question, eviction=EVICTION)
        alone.evict(BURST)
        jax.tree.map(np.testing.assert_array_equal, found.kept, alone.kept)
        assert_goes_on_alike(found, alone)
        assert_same(bits(asked), with_question)
    assert_same(bits(whole), before)
    assert any((one != other).any() for one, other in zip(*map(jax.tree.leaves, lists), strict=True))


def test_what_an_interruption_leaves_is_what_was_read():
    ids = prompt(64, 26)
    session = new("qwen3", ids[:32])

    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert (done, total) == (48, 64)
        raise Enough

    with pytest.raises(Enough):
        session.extend([ids[32:]], stop)
    assert session.tokens == [ids[:48]]
    assert_goes_on_alike(read(session, ids[48:]), new("qwen3", ids))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda s: s.extend([[1], [2]]), "2 rows for a session of 1"),
        (lambda s: s.extend([[]]), "1 rows for a session of 1, of which one must have new tokens"),
        (lambda s: s.extend([[5, 288, -1]]), r"token ids \[288, -1\], but the model's are from 0 to 287"),
        (lambda s: s.extend([[1] * 473]), "473 tokens after 40, but the session has room for 472 more"),
        (lambda s: answer(s, 473), "473 tokens more, but the session has room for 472"),
    ],
)
def test_what_cannot_be_read_leaves_the_session_as_it_is(use, message):
    session = new("qwen3", prompt(40, 27), eviction=EVICTION)
    before = bits(session)
    with pytest.raises(ValueError, match=message):
        use(session)
    assert_same(bits(session), before)
    assert answer(session) == answer(new("qwen3", prompt(40, 27), eviction=EVICTION))


@pytest.mark.parametrize("name", ["ctx", "chunk", "batch"])
def test_sizes_must_be_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        Session(*load("qwen3")[:2], **{"ctx": SLOTS, "chunk": CHUNK} | {name: 0})


def test_nothing_read_gives_no_answer_and_a_batch_is_not_cut_back():
    session = new("qwen3")
    with pytest.raises(ValueError, match="it must read a token of each row first"):
        answer(session)
    with pytest.raises(ValueError, match="a session of 2 rows cannot be cut back"):
        Session(*load("qwen3")[:2], ctx=SLOTS, chunk=CHUNK, batch=2).rewind(0)


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.mark.usefixtures("templates_here")
@pytest.mark.parametrize(("name", "evicting"), [*((name, False) for name in KINDS), ("qwen3", True)])
def test_a_chat_reads_only_what_is_new(name, evicting):
    model, params, tokenizer = load(name)
    tokenizer = replace(tokenizer, chat_template=TEMPLATE)
    eviction = EVICTION if evicting else None
    options = {"max_tokens": 12, "sampler": GREEDY, "burst": BURST, "ignore_eos": True}
    session, messages, last = new(name, eviction=eviction), [], 0
    for turn, text in enumerate(("the cat sat", "and then the dog ran away", "why")):
        messages.append({"role": "user", "content": text})
        ids = tokenizer.chat(messages)
        told = tokenizer.chat(messages, add_generation_prompt=False)
        known = session.tokens[0]
        common = next(
            (i for i, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids))
        )
        pieces = list(jaxinfer.stream(model, params, tokenizer, messages, session=session, **options))
        stats = pieces[-1].stats
        # A recurrent state goes back to what was told before the last answer.
        want = last if name == "qwen35moe" else common
        assert (stats.reused_tokens, stats.prompt_tokens) == (want, len(ids))
        assert (stats.reused_tokens > 0) == (turn > 0)
        assert (stats.kept_bytes < stats.cache_bytes / 2) == (evicting and len(ids) > 32)
        alone = list(
            jaxinfer.stream(model, params, tokenizer, messages, session=new(name, eviction=eviction), **options)
        )
        assert [p.token for p in pieces] == [p.token for p in alone]
        assert "".join(p.text for p in pieces) == "".join(p.text for p in alone)
        if name == "qwen3" and not evicting and turn == 0:
            free = jaxinfer.generate(model, params, tokenizer, messages, chunk=CHUNK, ctx=SLOTS, **options)
            assert free == "".join(p.text for p in pieces)
        messages.append({"role": "assistant", "content": "".join(p.text for p in pieces)})
        last = len(told)
    assert last > 2 * 32


def test_a_session_reads_no_further_than_a_stop_string():
    model, params, tokenizer = load("qwen3")
    options = {"max_tokens": 24, "sampler": GREEDY, "burst": BURST, "ignore_eos": True}
    free = list(jaxinfer.stream(model, params, tokenizer, prompt(20), chunk=CHUNK, ctx=SLOTS, **options))
    at, stop = next((i, p.text) for i, p in enumerate(free) if 8 < i < 15 and p.text.strip())
    session = new("qwen3")
    list(jaxinfer.stream(model, params, tokenizer, prompt(20), session=session, stop=[stop], **options))
    made = session.tokens[0][20:]
    assert 0 < len(made) <= at + 1
    assert made == [p.token for p in free[: len(made)]]
    assert stop in tokenizer.decode(made)
    assert stop not in tokenizer.decode(made[:-1])
