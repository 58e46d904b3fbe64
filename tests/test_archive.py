"""Saved sessions: to go on from a file is never to have stopped, and no other file is gone on from."""

import hashlib
import os
import signal
import subprocess
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import model_path
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxinfer
from jaxinfer import Sampler, archive, engine, gguf
from jaxinfer.presses import PyramidKV, SnapKV
from jaxinfer.session import Session
from jaxinfer.snapkv import Eviction

pytestmark = pytest.mark.usefixtures("quick_compiler")

EVICTION = Eviction(press=SnapKV(window=8), keep=24)
STOPS = np.array([-1], np.int32)
MODELS = {"gemma4-e": jnp.bfloat16, "qwen35": jnp.float32}


@cache
def load(name: str, expand: bool = False, **options):
    return jaxinfer.load(model_path(name), expand=expand, **options)


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, 288, n).tolist() for n in lengths]


def begin(name: str, *lengths: int, chunk: int = 16, eviction: Eviction | None = EVICTION, **options) -> Session:
    """A session that has read so many tokens of each row: fewer than four chunks, which are one program."""
    model, params, _ = load(name)
    session = Session(model, params, chunk=chunk, batch=len(lengths), eviction=eviction, **{"ctx": 256} | options)
    session.extend(prompts(*lengths))
    return session


def answer(session: Session, count: int = 6) -> np.ndarray:
    sampler = Sampler.greedy()
    out, state = session.decode(session.start(sampler), count, sampler=sampler, stops=STOPS, burst=8)
    more, _ = session.decode(state, 2, sampler=sampler, stops=STOPS, burst=8)
    return np.concatenate([out, more], axis=1)


def again(session: Session, path, **options) -> Session:
    """The session after a way through a file."""
    session.save(path)
    return Session.load(path, session.model, session.params, **options)


def assert_same(one: Session, other: Session) -> None:
    """Bit for bit, the state that nobody sees with it."""
    for name in ("tokens", "ctx", "chunk", "_room", "_observed", "_evicted"):
        assert getattr(one, name) == getattr(other, name), name
    arrays = [(s.logits, s.cache, s.kept) for s in (one, other)]
    assert jax.tree.structure(arrays[0]) == jax.tree.structure(arrays[1])
    for a, b in zip(*map(jax.tree.leaves, arrays), strict=True):
        assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


@pytest.mark.parametrize("name", MODELS)
def test_going_on_from_a_file_is_never_having_stopped(name, tmp_path):
    """Ragged rows, past the end of a ring; queries observed across the stop, then evicted before the next one."""
    whole = begin(name, 180, 41, ctx=512, chunk=64, dtype=MODELS[name])
    whole.extend(prompts(120, 5))  # the same program again
    types = {str(a.dtype) for a in jax.tree.leaves(whole.cache)}
    kinds = {type(one).__name__ for one in whole.cache}
    rings = [one.k.shape[3] for one in whole.cache if getattr(one, "chunk", None)]
    assert ("bfloat16" in types) == (MODELS[name] == jnp.bfloat16)
    assert ("DeltaState" in kinds) == (name == "qwen35")
    assert rings == [256] * len(rings)
    assert bool(rings) == (name == "gemma4-e")
    stopped = again(whole.fork(), tmp_path / "read", eviction=EVICTION)
    assert_same(stopped, whole)
    for session in (whole, stopped):
        session.extend(prompts(50, 64))
        session.evict(32)
    assert_same(stopped, whole)
    assert whole.kept is not None
    assert min(whole._room) == 32
    stopped = again(stopped, tmp_path / "evicted", eviction=EVICTION)
    assert_same(stopped, whole)
    np.testing.assert_array_equal(answer(stopped), answer(whole))
    assert_same(stopped, whole)


@pytest.mark.parametrize(
    "eviction",
    [
        None,
        Eviction(press=SnapKV(window=8), keep=24, interleaved=True),
        Eviction(press=SnapKV(window=8), keep=24, one_list=True),
        Eviction(press=PyramidKV(window=8, beta=2), keep=32),
    ],
    ids=["none", "interleaved", "one list", "budgets of layers"],
)
def test_every_eviction_goes_on(eviction, tmp_path):
    for read in (20, 40):  # before and after an interleaved one begins
        whole = begin("qwen3", read, eviction=eviction)
        stopped = again(whole.fork(), tmp_path / "a", eviction=eviction)
        for session in (whole, stopped):
            session.extend(prompts(30))
            session.evict(32)
        assert_same(stopped, whole)
        assert_same(again(stopped, tmp_path / "a", eviction=eviction), whole)


def test_a_session_that_has_read_nothing(tmp_path):
    model, params, _ = load("qwen3")
    empty = Session(model, params, ctx=64, chunk=16, batch=2)
    stopped = again(empty, tmp_path / "a")
    assert_same(stopped, empty)
    for session in (empty, stopped):
        session.extend([prompts(20)[0], []])  # a row of padding alone
    assert_same(again(stopped, tmp_path / "a"), empty)


def test_another_process_goes_on(tmp_path):
    session = begin("qwen3", 50, ctx=512)  # which no other test decodes with: a program that it compiled would be used
    session.save(tmp_path / "a")
    code = f"""
import jaxinfer, numpy as np
from jaxinfer import Sampler
from jaxinfer.session import Session
model, params, _ = jaxinfer.load({str(model_path("qwen3"))!r}, expand=False)
session, sampler = Session.load({str(tmp_path / "a")!r}, model, params), Sampler.greedy()
out, _ = session.decode(session.start(sampler), 8, sampler=sampler, stops=np.array([-1], np.int32), burst=8)
print(out[0].tolist(), np.asarray(session.logits).tobytes().hex())
"""
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in this one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    sampler = Sampler.greedy()
    want, _ = session.decode(session.start(sampler), 8, sampler=sampler, stops=STOPS, burst=8)
    assert done.stdout.strip() == f"{want[0].tolist()} {np.asarray(session.logits).tobytes().hex()}"


def test_the_file_is_plain(tmp_path):
    """Others read it by name, a layer at a time, whatever is stacked here."""
    model, params, _ = load("qwen3-Q4_0", expand=False)
    session = Session(model, params, ctx=64, chunk=64, batch=2, eviction=EVICTION, dtype=jnp.bfloat16)
    session.extend(prompts(40, 9))
    session.evict(16)
    session.save(tmp_path / "a")
    arrays, stack = load_file(tmp_path / "a"), session.cache[0]
    assert stack.k.shape[0] == 2
    assert arrays["layers.1.k"].dtype == bfloat16
    for layer in (0, 1):
        for name in ("k", "v", "pos"):
            np.testing.assert_array_equal(arrays[f"layers.{layer}.{name}"], getattr(stack, name)[layer])
        np.testing.assert_array_equal(arrays[f"layers.{layer}.shift"], stack.shift)
        np.testing.assert_array_equal(arrays[f"layers.{layer}.kept"], session.kept[0][layer])
    assert [arrays[f"tokens.{row}"].tolist() for row in (0, 1)] == session.tokens
    np.testing.assert_array_equal(arrays["logits"], session.logits)
    with safe_open(tmp_path / "a", "np") as file:
        found = file.metadata()
    assert found.pop("sha256")
    assert found == {
        "format": "jaxinfer session 1",
        "model": model.fingerprint,
        "activations": "float32",
        "dtype": "bfloat16",
        "ctx": "64",
        "chunk": "64",
        "evicted": "40",
    }


def test_packed_and_expanded_weights_read_one_file(tmp_path):
    packed, wide = (load("qwen3-Q4_0", expand=expand) for expand in (False, True))
    session = Session(packed.model, packed.params, ctx=64, chunk=64, batch=2, eviction=EVICTION, dtype=jnp.bfloat16)
    session.extend(prompts(33, 12))
    session.save(tmp_path / "a")
    other = Session.load(tmp_path / "a", wide.model, wide.params, eviction=EVICTION)
    assert [len(one.cache) for one in (session, other)] == [1, 2]  # two layers in one stack, or each alone
    other.save(tmp_path / "b")
    assert_same(Session.load(tmp_path / "b", packed.model, packed.params, eviction=EVICTION), session)
    for one in (session, other):
        one.extend(prompts(20, 50))
    # Products of packed and of expanded weights are summed in other orders, as in test_engine; what they write into the
    # cache is then rounded to bf16, and one that falls the other way is off by 2**-8 of itself.
    np.testing.assert_allclose(other.logits, session.logits, rtol=0, atol=2e-2)
    np.testing.assert_array_equal(other.logits.argmax(1), session.logits.argmax(1))


# Interrupted while reading.


class Stop(Exception):
    pass


def interrupted(how: str, ids: list[int], monkeypatch) -> Session:
    model, params, _ = load("qwen35")
    session = Session(model, params, ctx=256, chunk=64, eviction=EVICTION)
    with monkeypatch.context() as patch:
        if how == "progress":

            def progress(done: int, total: int) -> None:
                if done >= 64:
                    raise Stop

            with pytest.raises(Stop):
                session.extend([ids], progress)
        else:
            prefill = engine.prefill

            def signalled(*args, **options):
                os.kill(os.getpid(), signal.SIGINT)
                return prefill(*args, **options)

            patch.setattr(engine, "prefill", signalled)
            with pytest.raises(KeyboardInterrupt):
                session.extend([ids])
    return session


@pytest.mark.parametrize("how", ["progress", "signal"])
def test_an_interrupted_prompt_is_gone_on_with(how, tmp_path, monkeypatch):
    ids = prompts(150)[0]
    whole = begin("qwen35", 150, chunk=64)  # three calls
    session = interrupted(how, ids, monkeypatch)
    read = len(session.tokens[0])
    assert 0 < read < 150
    assert session.tokens[0] == ids[:read]
    session = again(session, tmp_path / "a", eviction=EVICTION)
    session.extend([ids[read:]])
    assert_same(session, whole)


# Interrupted while writing.


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_an_interrupted_save_keeps_the_old_file(error, tmp_path, monkeypatch):
    session = begin("qwen3", 20)
    session.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    session.extend(prompts(16))

    def half(arrays, path, header):
        path.write_bytes(before[: len(before) // 2])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(archive, "save_file", half)
        with pytest.raises(ValueError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            session.save(tmp_path / "a")
    if isinstance(error, OSError):
        assert str(tmp_path / "a") in str(caught.value)
        assert "No space left" in str(caught.value)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == before
    assert_same(again(session, tmp_path / "a", eviction=EVICTION), session)


def test_what_cannot_be_written(tmp_path):
    session = begin("qwen3", 20)
    for path in (tmp_path / "none" / "a", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: the session cannot be written"):
            session.save(path)
    assert os.listdir(tmp_path) == []
    session.cache[0].k.delete()
    with pytest.raises(ValueError, match="lost in an error before"):
        session.save(tmp_path / "a")


# Files that are no session of this model.


@cache
def small(evicted: bool) -> Session:
    session = begin("qwen3", 30, 9, ctx=48)
    if evicted:
        session.evict(16)
    return session


def refused(path, rule: str, name: str = "qwen3", **options) -> None:
    """Loading says so, and leaves nothing on the device."""
    model, params, _ = load(name, **options)
    before = len(jax.live_arrays())
    with pytest.raises(ValueError, match=rule) as caught:
        Session.load(path, model, params, eviction=EVICTION)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 1000
    assert len(jax.live_arrays()) == before


def test_other_models_are_refused(tmp_path):
    model, params, _ = load("llama")
    Session(model, params, ctx=64, chunk=16).save(tmp_path / "a")
    names = [load(name).model.fingerprint for name in ("llama", "qwen3")]
    refused(tmp_path / "a", f"its model is '{names[0]}', not '{names[1]}'")
    small(False).save(tmp_path / "a")
    refused(tmp_path / "a", "its type of activations is 'float32', not 'bfloat16'", dtype=jnp.bfloat16)


def test_fingerprints():
    file = gguf.read(model_path("qwen3"))
    print_, described = gguf.fingerprint(file), load("qwen3").model
    assert described.fingerprint == print_
    assert described == load("qwen3", expand=True).model
    assert gguf.fingerprint(file._replace(path="elsewhere")) == print_
    assert gguf.fingerprint(file._replace(tensors=dict(reversed(file.tensors.items())))) == print_
    assert gguf.fingerprint(file._replace(metadata=file.metadata | {"tokenizer.chat_template": "other"})) == print_
    found = {print_}
    for key, value in (("qwen3.rope.freq_base", 5.0), ("tokenizer.ggml.tokens", ["a"]), ("general.name", "other")):
        found.add(gguf.fingerprint(file._replace(metadata=file.metadata | {key: value})))
    for name, tensor in list(file.tensors.items())[:3]:
        for place in (0, tensor.data.size // 2, -1):
            data = tensor.data.copy()
            data.reshape(-1)[place] ^= 1
            found.add(gguf.fingerprint(file._replace(tensors=file.tensors | {name: tensor._replace(data=data)})))
    assert len(found) == 1 + 3 + 9


def test_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "none", "no such file")
    refused(tmp_path, "not a regular file")
    refused(model_path("qwen3"), "header")
    for content in (b"", b"abc", bytes(100), (10**15).to_bytes(8, "little") + b"{}", b"\xff" * 64):
        (tmp_path / "a").write_bytes(content)
        refused(tmp_path / "a", "header")
    save_file({"x": np.zeros(3)}, tmp_path / "a")
    refused(tmp_path / "a", "its format is None, not 'jaxinfer session 1'")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def sign(header: dict[str, str], arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """With the sha256 that the format has."""
    header = {name: text for name, text in header.items() if name != "sha256"}
    digest = hashlib.sha256(repr(sorted(header.items())).encode())
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(repr((name, a.dtype.name, a.shape)).encode() + a.tobytes())
    return header | {"sha256": digest.hexdigest()}


SHIFTS = [f"layers.{i}.shift" for i in range(3)]
WRONG = {  # of an evicted session of 30 and 9 tokens, or of one that was not: what is changed, and the rule
    "version": (False, {"format": "jaxinfer session 2"}, "its format is 'jaxinfer session 2'"),
    "ctx": (False, {"ctx": "300"}, r"'I32 \[2, 1, 256\]', not 'I32 \[2, 1, 512\]'|not 'F32 \[2, 2, 512, 32\]'"),
    "ctx huge": (False, {"ctx": "2147483647"}, "2147483648, 32"),
    "ctx none": (False, {"ctx": "0"}, "its ctx is '0', not a number from 1"),
    "ctx word": (False, {"ctx": "٣"}, "its ctx is '٣', not a number"),
    "chunk long": (False, {"chunk": "9" * 5000}, "its chunk is '999"),
    "dtype": (False, {"dtype": "bfloat16"}, "not 'BF16"),
    "dtype unknown": (False, {"dtype": "int32"}, "its dtype is 'int32', not float32, bfloat16 or float16"),
    "evicted": (True, {"evicted": "31"}, "its evicted has 31, which is not from 0 to 30"),
    "array missing": (False, {"layers.1.v": None}, "its array 'layers.1.v' is 'missing', not 'F32"),
    "array more": (False, {"layers.9.v": np.zeros(3)}, r"its array 'layers.9.v' is 'F64 \[3\]', not 'missing'"),
    "no tokens": (False, {"tokens.0": None, "tokens.1": None}, "it has no tokens.0"),
    "rows": (False, {"tokens.1": None}, "'layers.0.k' is 'F32 .2, 2, 256, 32.', not 'F32 .1, 2, 256, 32.'"),
    "token names": (False, {"tokens.x": np.zeros(3, np.int32)}, "not 'F32 .3, 2"),
    "token": (False, {"tokens.1": np.full(9, 288, np.int32)}, "row 1 has the token ids .288.*from 0 to 287"),
    "token below": (False, {"tokens.0": np.full(30, -1, np.int32)}, "row 0 has the token ids"),
    "token type": (False, {"tokens.0": np.zeros(30, np.float32)}, "'F32 .30.', not 'I32 .30.'"),
    "fewer tokens": (False, {"tokens.0": np.zeros(29, np.int32)}, "its observed has 30, which is not from 0 to 29"),
    "room": (False, {"room": np.array([18, 40], np.int32)}, "its room has 40, which is not from 0 to 39"),
    "room below": (False, {"room": np.array([-1, 39], np.int32)}, "its room has -1, which is not from 0"),
    "room evicted": (True, {"room": np.array([17, 16], np.int32)}, "its room has 17, which is not from 0 to 16"),
    "logits": (False, {"logits": np.full((2, 288), np.nan, np.float32)}, "its logits are not all finite"),
    "logits shape": (False, {"logits": np.zeros((2, 287), np.float32)}, "not 'F32 .2, 288.'"),
    "pos": (False, {"layers.2.pos": np.full((2, 1, 256), 9, np.int32)}, "layers.2.pos has 9, .* from -1 to 8"),
    "pos below": (False, {"layers.0.pos": np.full((2, 1, 256), -2, np.int32)}, "layers.0.pos has -2"),
    "pos rank": (True, {"layers.0.pos": np.zeros(3, np.int32)}, "'layers.0.k' is"),
    "slots": (True, {f"layers.0.{n}": np.zeros((2, 2, 39, 32), np.float32) for n in "kv"}, "39, 32.', not"),
    "no slots": (True, {f"layers.0.{n}": np.zeros((2, 2, 0, 32), np.float32) for n in "kv"}, "0, 32.', not"),
    "shift": (True, dict.fromkeys(SHIFTS, np.array([31, 0], np.int32)), "layers.0.shift has 31, .* from 0 to 30"),
    "shifts": (True, {"layers.1.shift": np.array([1, 0], np.int32)}, "shifts of the layers .0, 1, 2. differ, but"),
    "shift missing": (True, dict.fromkeys(SHIFTS), "'layers.0.k' is .* not 'F32 .2, 2, 256, 32.'"),
    "a shift missing": (True, {"layers.1.shift": None}, "'layers.1.shift' is 'missing', not 'I32 .2.'"),
    "kept": (True, {"layers.0.kept": np.zeros((2, 2, 24), np.int32)}, "layers.0.kept is not strictly increasing"),
    "queries": (
        False,
        {f"layers.{i}.recent_q": np.zeros((1, 2, 10**12, 2, 0, 32), np.float32) for i in range(3)},
        "'layers.0.recent_q' is 'F32 .1, 2, 1000000000000",
    ),
}


@pytest.mark.parametrize(("evicted", "changes", "rule"), WRONG.values(), ids=WRONG)
def test_what_is_not_this_models_is_refused(evicted, changes, rule, tmp_path):
    """Whole files, signed, that say what no session of the model can."""
    small(evicted).save(tmp_path / "a")
    arrays = load_file(tmp_path / "a")
    with safe_open(tmp_path / "a", "np") as file:
        header = file.metadata()
    assert header == sign(header, arrays)
    header |= {name: value for name, value in changes.items() if isinstance(value, str)}
    arrays |= {name: value for name, value in changes.items() if not isinstance(value, str)}
    arrays = {name: a for name, a in arrays.items() if a is not None}
    save_file(arrays, tmp_path / "a", sign(header, arrays))
    refused(tmp_path / "a", rule)


def test_a_ring_is_of_its_chunk(tmp_path):
    model, params, _ = load("gpt-oss")
    Session(model, params, ctx=512, chunk=16).save(tmp_path / "a")
    arrays = load_file(tmp_path / "a")
    with safe_open(tmp_path / "a", "np") as file:
        header = file.metadata() | {"chunk": "200"}
    save_file(arrays, tmp_path / "a", sign(header, arrays))
    refused(tmp_path / "a", r"256, \d+\]', not 'F32 \[1, \d, 384", "gpt-oss")


def test_a_cache_too_small_for_an_eviction_is_refused(tmp_path):
    model, params, _ = load("qwen3")
    small(True).save(tmp_path / "a")  # 24 + 16 slots
    for keep in (32, 0):
        eviction = Eviction(press=SnapKV(window=8), keep=keep, interleaved=True)
        with pytest.raises(ValueError, match=rf"{tmp_path / 'a'}: its caches have 40 slots, but keep={keep} needs"):
            Session.load(tmp_path / "a", model, params, eviction=eviction)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bits, bytes or a run of bytes changed, in the header or anywhere; or cut, lengthened, or a part moved."""
    size = len(data) if rng.random() < 0.4 else 8 + int.from_bytes(data[:8], "little")
    at, length = int(rng.integers(size)), int(rng.integers(1, 9))
    match rng.integers(6):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
        case 1:
            return data[:at] + rng.bytes(length) + data[at + length :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at + length :]
        case 4:
            return data[:at] + rng.choice(np.frombuffer(b'0123456789[]{},:"', "S1")).tobytes() + data[at + 1 :]
        case _:
            return data + rng.bytes(length)


@pytest.mark.parametrize("evicted", [False, True])
def test_no_damage_goes_unseen(evicted, tmp_path):
    path, session, rng = tmp_path / "a", small(evicted), np.random.default_rng(evicted)
    session.save(path)
    data, errors = path.read_bytes(), []
    for _ in range(200):
        path.write_bytes(mutated(data, rng))
        try:
            assert_same(Session.load(path, session.model, session.params), session)
        except ValueError as error:
            errors.append(str(error))
    assert all(error.startswith(f"{path}: ") for error in errors)
    assert len(errors) > 150
