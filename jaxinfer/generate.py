"""From prompts to text, and from tokens to scores: the host's side of the engine."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxinfer import engine, memory
from jaxinfer.cache import BLOCK, size_bytes
from jaxinfer.engine import State
from jaxinfer.loader import Model
from jaxinfer.sample import Sampler
from jaxinfer.session import Session
from jaxinfer.snapkv import Eviction
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.tree import Device

CPU_CHUNK, GPU_CHUNK = 512, 4096  # tokens of a prompt at a time, unless told

type Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
type Progress = Callable[[int, int], None]
type Compiling = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Stats:
    """What a run did. Times are in seconds and leave out compiling, which `compile_s` lists by program."""

    prompt_tokens: int  # in all
    reused_tokens: int  # of these, what the session had read before
    prompt_s: float
    evict_s: float
    cache_bytes: int  # of the prompt's caches
    kept_bytes: int  # of the caches with which the answer began
    new_tokens: int
    decode_s: float
    first_token_s: float  # from the start of the prefill
    compile_s: dict[str, float]
    peak_bytes: int  # most memory in use: of the device, or of the process where the device is a CPU
    finish: str  # "stop": an end token or a stop string; "length": max_tokens


class Piece(NamedTuple):
    """The text that one more token brings: empty while a character, or what may be a stop string, is incomplete."""

    text: str
    token: int
    stats: Stats | None = None  # on the last piece


@dataclass(frozen=True)
class Run:
    """One prompt, or a batch of them, with all that its programs are compiled for."""

    session: Session
    rows: list[list[int]]  # what the session is to read
    history: int  # how many of these tokens the next turn of a chat repeats
    own: bool  # the session is for this run alone: nothing of what is evicted must stay
    max_tokens: int
    sampler: Sampler
    stops: np.ndarray  # int32 [E], the tokens that end a row
    burst: int  # tokens decoded in a call

    def compile(self, compiling: Compiling | None = None) -> dict[str, float]:
        """Compiles the programs, each while the next one is lowered, and returns the seconds that each added.

        `compiling(program, seconds)` hears before (None) and after.
        """
        took, wanted = {}, self.session.programs(self._parts(), self._room, **self._decoding)
        tell = compiling or (lambda program, seconds: None)
        with ThreadPoolExecutor(len(wanted)) as pool:
            began, running = time.perf_counter(), {}
            for name, prepares in wanted.items():
                if not running:
                    tell(name, None)
                running[name] = [pool.submit(prepare()) for prepare in prepares]
            for name, futures in running.items():
                if took:
                    tell(name, None)
                for one in futures:
                    one.result()
                now = time.perf_counter()
                took[name], began = now - began, now
                tell(name, took[name])
        return took

    def prefill(self, progress: Progress | None = None) -> None:
        """Has the session read the prompt; `progress(done, total)` counts tokens and is called between chunks."""
        for i, rows in enumerate(self._parts()):
            if i > 0:
                self.session.mark()
            self.session.extend(rows, progress)

    def answering(self) -> Session:
        """The session that answers, less what is evicted."""
        if self.session.eviction is None:
            return self.session
        if not self.own:
            return self.session.evicted(self._room)
        self.session.evict(self._room)
        return self.session

    def decode(self, session: Session, state: State | None, limit: int) -> tuple[np.ndarray, State]:
        """The next `limit` tokens of each row [B, limit], -1 after a row's end; the state is used up, None to start."""
        return session.decode(state or session.start(self.sampler), limit, **self._decoding)

    def _parts(self) -> list[list[list[int]]]:
        if not 0 < self.history < len(self.rows[0]):
            return [self.rows]
        return [[self.rows[0][: self.history]], [self.rows[0][self.history :]]]

    @property
    def _room(self) -> int:
        """Slots for the answer where others are evicted: whole blocks, for few shapes."""
        return -(-self.max_tokens // BLOCK) * BLOCK

    @property
    def _decoding(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "stops": self.stops, "burst": self.burst}


def plan(
    model: Model,
    params: Any,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    ignore_eos: bool = False,
    chunk: int | None = None,
    ctx: int | None = None,
    sampler: Sampler | None = None,
    burst: int = 8,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    session: Session | None = None,
    eviction: Eviction | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Run:
    """Checks a batch of prompts and fixes the shapes to run them in; see `stream` for the arguments."""
    for name, value in (("max_tokens", max_tokens), ("chunk", chunk), ("ctx", ctx), ("burst", burst)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    ids = [encode(tokenizer, p, model.config.vocab, chat_template_kwargs) for p in prompts]
    own, history = session is None, 0
    before = 0 if session is None or _is_chat(prompts[0]) else len(session.tokens[0])
    longest = before + max(map(len, ids))
    most = ctx or int(model.config.context) if session is None else session.ctx
    if longest + max_tokens > most:
        fits = f"the largest max_tokens that fits is {most - longest}"
        if longest >= most:
            fits = f"the longest prompt that fits has {max(0, most - max_tokens)} tokens"
        raise ValueError(f"a prompt of {longest} tokens and {max_tokens=} exceed the context of {most} tokens: {fits}")
    if session is None:
        chunk = engine.chunk_for(longest, chunk or default_chunk(device_of(params)))
        shape = {"chunk": chunk, "batch": len(ids), "dtype": cache_dtype}
        planned = partial(memory.plan, model, params, **shape, **memory.of_eviction(eviction))
        memory.require(planned, longest + max_tokens, memory.limit_bytes(params, device_of(params)), most)
        session = Session(model, params, ctx=longest + max_tokens, eviction=eviction, **shape)
    elif any(x is not None for x in (chunk, ctx, eviction, cache_dtype)) or len(session.tokens) != 1:
        raise ValueError("a session of one row is continued with its own chunk, ctx, eviction and cache_dtype")
    elif _is_chat(prompts[0]):
        known = session.rewind(min(_common(session.tokens[0], ids[0]), len(ids[0]) - 1))
        assert tokenizer is not None
        told = tokenizer.chat(prompts[0], **(chat_template_kwargs or {}) | {"add_generation_prompt": False})  # pyright: ignore
        ids, history = [ids[0][known:]], len(told) - known if ids[0][: len(told)] == told else 0
    return Run(
        session=session,
        rows=ids,
        history=history,
        own=own,
        max_tokens=max_tokens,
        sampler=sampler or Sampler(),
        stops=np.array([-1] if ignore_eos or tokenizer is None else tokenizer.eog_ids or [-1], np.int32),
        burst=burst,
    )


def _is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def stream(
    model: Model,
    params: Any,
    tokenizer: Tokenizer | None,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    chunk: int | None = None,
    ctx: int | None = None,
    sampler: Sampler | None = None,
    burst: int = 8,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    session: Session | None = None,
    eviction: Eviction | None = None,
    cache_dtype: DTypeLike | None = None,
    progress: Progress | None = None,
    compiling: Compiling | None = None,
) -> Iterator[Piece]:
    """Yields the answer to a prompt, token by token.

    The prompt is text (special tokens in it are parsed), a list of ids, or a list of chat messages. The answer ends at
    an end token of the vocabulary (unless `ignore_eos`), before the first of the strings in `stop`, or after
    `max_tokens`. `chunk` tokens are prefilled at a time, `burst` tokens are decoded between two looks at them; neither
    changes the text. `ctx` is the most tokens of prompt and answer together, by default what the model was trained for.
    `chat_template_kwargs` are variables for the chat template of messages: `{"enable_thinking": False}`, for one.

    `session` goes on from what it has read, and reads prompt and answer. Text and ids follow what is there; messages
    are the whole conversation, of which only what is new is read. With `eviction` the answer sees what that keeps of
    the prompt. A session that was made with one keeps the whole prompt, and not the answer. `cache_dtype` is the type
    of keys and values, by default the activations'.

    `progress(done, total)` counts prompt tokens; `compiling(program, seconds)` is called before (with None) and after
    each compilation.

    Raises ValueError for a prompt that is empty, has ids that the model does not, or does not fit.
    """
    run = plan(
        model,
        params,
        tokenizer,
        [prompt],
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        chunk=chunk,
        ctx=ctx,
        sampler=sampler,
        burst=1 if session and stop else burst,  # so that a session does not read past a stop string
        chat_template_kwargs=chat_template_kwargs,
        session=session,
        eviction=eviction,
        cache_dtype=cache_dtype,
    )
    words, text = tokenizer.stream() if tokenizer else None, StopText(stop)
    reused, compile_s = len(run.session.tokens[0]), run.compile(compiling)
    began = time.perf_counter()
    run.prefill(progress)
    prompt_s, first_s, decode_s, made = time.perf_counter() - began, None, 0.0, 0
    prompt_tokens, cache_bytes = len(run.session.tokens[0]), size_bytes(run.session.cache)
    answering = run.answering()
    evict_s, kept_bytes, state = time.perf_counter() - began - prompt_s, size_bytes(answering.cache), None
    while True:
        began_burst = time.perf_counter()
        # The first token alone, so that it is there soonest.
        out, state = run.decode(answering, state, min(run.burst, max_tokens - made) if made else 1)
        decode_s += time.perf_counter() - began_burst
        first_s = first_s or time.perf_counter() - began
        for token in out[0, out[0] >= 0].tolist():
            made += 1
            ended = token in run.stops
            last = ended or made == max_tokens
            new = words.push(token) + (words.flush() if last else "") if words else ""
            new = text.push(new, last=last)
            if not (last or text.found):
                yield Piece(new, token)
                continue
            yield Piece(
                new,
                token,
                Stats(
                    prompt_tokens=prompt_tokens,
                    reused_tokens=reused,
                    prompt_s=prompt_s,
                    evict_s=evict_s,
                    cache_bytes=cache_bytes,
                    kept_bytes=kept_bytes,
                    new_tokens=made,
                    decode_s=decode_s,
                    first_token_s=first_s,
                    compile_s=compile_s,
                    peak_bytes=peak_bytes(device_of(params)),
                    finish="stop" if ended or text.found else "length",
                ),
            )
            return


def generate(model: Model, params: Any, tokenizer: Tokenizer | None, prompt: Prompt, **options: Any) -> str:
    """The answer to a prompt as one string; takes what `stream` takes."""
    return "".join(piece.text for piece in stream(model, params, tokenizer, prompt, **options))


def score(model: Model, params: Any, ids: Sequence[int] | Sequence[Sequence[int]], *, chunk: int | None = None) -> Any:
    """Logits after every token of a sequence: f32 [T, V] for a list of ids, a list of those for a list of lists."""
    single = not ids or isinstance(ids[0], int | np.integer)
    prompts = [encode(None, row, model.config.vocab) for row in ([ids] if single else ids)]  # pyright: ignore
    if chunk is not None and chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1")
    chunk = engine.chunk_for(max(map(len, prompts)), chunk or default_chunk(device_of(params)))
    tokens, pos = engine.left_pad(prompts, chunk)
    cache = model.init_cache(params, len(prompts), engine.slots_for(tokens.shape[1]), chunk=chunk)
    parts = []
    for start in range(0, tokens.shape[1], chunk):
        t, p = (a[:, start : start + chunk] for a in (tokens, pos))
        logits, cache = engine.chunk_logits(model, params, t, p, cache)
        parts.append(np.asarray(logits))
    logits = np.concatenate(parts, axis=1)
    rows = [logits[i, -len(prompt) :] for i, prompt in enumerate(prompts)]
    return rows[0] if single else rows


def encode(
    tokenizer: Tokenizer | None, prompt: Prompt, vocab: int, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """A prompt as ids: text (its special tokens are parsed), chat messages (through the file's template), or ids."""
    messages = _is_chat(prompt)
    if chat_template_kwargs and not messages:
        raise ValueError(f"{chat_template_kwargs=} needs a prompt of chat messages")
    if isinstance(prompt, str) or messages:
        if tokenizer is None:
            raise ValueError("the file has no tokenizer: give the prompt as a list of token ids")
        chat = chat_template_kwargs or {}
        ids = tokenizer.chat(prompt, **chat) if messages else tokenizer.encode(prompt, parse_special=True)  # pyright: ignore
    else:
        ids = [int(i) for i in prompt]  # pyright: ignore[reportArgumentType]
    if not ids:
        raise ValueError("the prompt is empty: it has no tokens")
    if wrong := [i for i in ids if not 0 <= i < vocab]:
        raise ValueError(f"the prompt has the token ids {wrong[:5]}, but the model's are from 0 to {vocab - 1}")
    return ids


class StopText:
    """Text as it comes, held back while its end may become a stop string."""

    def __init__(self, stop: Sequence[str]):
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"{stop=} must be a list of strings that are not empty")
        self._stop = list(stop)
        self._held = ""
        self.found = False

    def push(self, text: str, *, last: bool) -> str:
        """The text that is now certain, all of it if it is the last; up to a stop string where one is `found`."""
        self._held += text
        if starts := [i for i in map(self._held.find, self._stop) if i >= 0]:
            self.found = True
            return self._held[: min(starts)]
        keep = 0 if last else max((_overlap(self._held, s) for s in self._stop), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def default_chunk(device: Device) -> int:
    """Tokens of a prompt that are prefilled at a time on a device, unless told."""
    return CPU_CHUNK if device.platform == "cpu" else GPU_CHUNK


def device_of(params: Any) -> Device:
    return next(iter(jax.tree.leaves(params)[0].devices()))


def peak_bytes(device: Device) -> int:
    """Most bytes in use so far: of the device, or of this process where the device is a CPU."""
    stats = device.memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
