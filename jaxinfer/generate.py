"""From prompts to text, and from tokens to scores: the host's side of the engine."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import engine
from jaxinfer.loader import Model
from jaxinfer.sample import Sampler
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.tree import Device

type Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
type Progress = Callable[[int, int], None]
type Compiling = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Stats:
    """What a run did. Times are in seconds and leave out compiling, which `compile_s` lists by program."""

    prompt_tokens: int
    prompt_s: float
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
    """One batch of prompts with all that its programs are compiled for."""

    model: Model
    params: Any
    prompts: list[list[int]]
    slots: int
    chunk: int
    sampler: Sampler
    stops: np.ndarray  # int32 [E], the tokens that end a row
    burst: int  # tokens decoded in a call

    def compile(self, compiling: Compiling | None = None) -> dict[str, float]:
        """Compiles the programs and returns the times; `compiling(program, seconds)` hears before (None) and after."""
        cache = jax.eval_shape(
            lambda: self.model.init_cache(self.params, len(self.prompts), self.slots, chunk=self.chunk)
        )
        logits = jax.ShapeDtypeStruct((len(self.prompts), self.model.config.vocab), jnp.float32)
        state = jax.eval_shape(lambda x, c: engine.start(x, self.prompts, c, self.sampler), logits, cache)
        programs: dict[str, Callable[[], jax.stages.Lowered]] = {}
        for call in engine.calls(*engine.left_pad(self.prompts, self.chunk), self.chunk):
            args = self.model, self.params, *call, cache
            programs[f"prefill of {call[0].shape[1]} tokens"] = partial(engine.prefill.lower, *args, chunk=self.chunk)
        programs["decode"] = partial(engine.decode.lower, *self._decode_args(state, 1), **self._decode_shape)
        took = {}
        for name, lower in programs.items():
            if compiling:
                compiling(name, None)
            began = time.perf_counter()
            lower().compile()  # jit finds it again
            took[name] = time.perf_counter() - began
            if compiling:
                compiling(name, took[name])
        return took

    def prefill(self, progress: Progress | None = None) -> engine.State:
        """Fills a new cache; `progress(done, total)` counts each row's tokens and is called between chunks."""
        tokens, pos = engine.left_pad(self.prompts, self.chunk)
        cache = self.model.init_cache(self.params, len(self.prompts), self.slots, chunk=self.chunk)
        total = max(map(len, self.prompts))
        logits = None
        for t, p in engine.calls(tokens, pos, self.chunk):
            logits, cache = engine.prefill(self.model, self.params, t, p, cache, chunk=self.chunk)
            jax.block_until_ready(logits)  # so that the count is of work done, and an interrupt ends it here
            if progress:
                progress(int(p.max()) + 1, total)
        assert logits is not None
        return engine.start(logits, self.prompts, cache, self.sampler)

    def decode(self, state: engine.State, limit: int) -> tuple[np.ndarray, engine.State]:
        """The next `limit` tokens of each row [B, limit], -1 after a row's end; the state is used up."""
        out, state = engine.decode(*self._decode_args(state, limit), **self._decode_shape)
        return np.asarray(out)[:, :limit], state

    def _decode_args(self, state: engine.State, limit: int) -> tuple[Any, ...]:
        keys = jnp.broadcast_to(jax.random.key(self.sampler.seed), len(self.prompts))
        return self.model, self.params, state, keys, self.stops, np.int32(limit)

    @property
    def _decode_shape(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "room": self.burst}


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
) -> Run:
    """Checks a batch of prompts and fixes the shapes to run them in; see `stream` for the arguments."""
    for name, value in (("max_tokens", max_tokens), ("chunk", chunk), ("ctx", ctx), ("burst", burst)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    ids = [encode(tokenizer, p, model.config.vocab, chat_template_kwargs) for p in prompts]
    longest = max(map(len, ids))
    ctx = ctx or int(model.config.context)
    if longest + max_tokens > ctx:
        fits = f"the largest max_tokens that fits is {ctx - longest}"
        if longest >= ctx:
            fits = f"the longest prompt that fits has {max(0, ctx - max_tokens)} tokens"
        raise ValueError(f"a prompt of {longest} tokens and {max_tokens=} exceed the context of {ctx} tokens: {fits}")
    chunk = chunk or default_chunk(device_of(params))
    return Run(
        model=model,
        params=params,
        prompts=ids,
        slots=engine.slots_for(longest + max_tokens),
        # A short prompt takes a short chunk; powers of two keep the number of compiled shapes low.
        chunk=min(chunk, max(16, 1 << (longest - 1).bit_length())),
        sampler=sampler or Sampler(),
        stops=np.array([-1] if ignore_eos or tokenizer is None else tokenizer.eog_ids or [-1], np.int32),
        burst=burst,
    )


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
    progress: Progress | None = None,
    compiling: Compiling | None = None,
) -> Iterator[Piece]:
    """Yields the answer to a prompt, token by token.

    The prompt is text (special tokens in it are parsed), a list of ids, or a list of chat messages. The answer ends at
    an end token of the vocabulary (unless `ignore_eos`), before the first of the strings in `stop`, or after
    `max_tokens`. `chunk` tokens are prefilled at a time, `burst` tokens are decoded between two looks at them; neither
    changes the text. `ctx` is the most tokens of prompt and answer together, by default what the model was trained for.
    `chat_template_kwargs` are variables for the chat template of messages: `{"enable_thinking": False}`, for one.
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
        burst=burst,
        chat_template_kwargs=chat_template_kwargs,
    )
    compile_s = run.compile(compiling)
    words, text = tokenizer.stream() if tokenizer else None, StopText(stop)
    began = time.perf_counter()
    state = run.prefill(progress)
    prompt_s, first_s, decode_s, made = time.perf_counter() - began, None, 0.0, 0
    while True:
        began_burst = time.perf_counter()
        # The first token alone, so that it is there soonest.
        out, state = run.decode(state, min(burst, max_tokens - made) if made else 1)
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
                    prompt_tokens=len(run.prompts[0]),
                    prompt_s=prompt_s,
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
    run = plan(model, params, None, [ids] if single else ids, max_tokens=1, chunk=chunk, ctx=2**31 - 1)  # pyright: ignore
    cache = model.init_cache(params, len(run.prompts), run.slots, chunk=run.chunk)
    tokens, pos = engine.left_pad(run.prompts, run.chunk)
    parts = []
    for start in range(0, tokens.shape[1], run.chunk):
        t, p = (a[:, start : start + run.chunk] for a in (tokens, pos))
        logits, cache = engine.chunk_logits(model, params, t, p, cache)
        parts.append(np.asarray(logits))
    logits = np.concatenate(parts, axis=1)
    rows = [logits[i, -len(prompt) :] for i, prompt in enumerate(run.prompts)]
    return rows[0] if single else rows


def encode(
    tokenizer: Tokenizer | None, prompt: Prompt, vocab: int, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """A prompt as ids: text (its special tokens are parsed), chat messages (through the file's template), or ids."""
    messages = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)
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
    """Tokens of a prompt that are prefilled at a time, unless told."""
    return 512 if device.platform == "cpu" else 2048


def device_of(params: Any) -> Device:
    return next(iter(jax.tree.leaves(params)[0].devices()))


def peak_bytes(device: Device) -> int:
    """Most bytes in use so far: of the device, or of this process where the device is a CPU."""
    stats = device.memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
