"""Speed in llama-bench's terms, so that tables can be pasted side by side.

`pp512` is a prompt of 512 tokens, `tg128` the generation of 128, `@ d8192` what comes after 8192 tokens in the cache.
https://github.com/ggml-org/llama.cpp/tree/master/tools/llama-bench
"""

import csv
import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import mean, stdev
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import engine, gguf
from jaxinfer.generate import default_chunk, device_of
from jaxinfer.info import parameters, size_bytes, title
from jaxinfer.loader import Model
from jaxinfer.sample import Sampler

FORMS = ("md", "csv", "json", "jsonl")
BURST = 64  # tokens that one call decodes


@dataclass(frozen=True)
class Test:
    """A prompt of `prompt` tokens or the generation of `new` ones, after `depth` tokens."""

    prompt: int
    new: int
    depth: int

    def __str__(self) -> str:
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.new}"
        return f"{name} @ d{self.depth}" if self.depth else name


def tests(prompts: Sequence[int], new: Sequence[int], depths: Sequence[int]) -> list[Test]:
    """Every prompt length and every number of new tokens, at every depth; 0 of either is left out."""
    for name, values in (("prompts", prompts), ("new tokens", new), ("depths", depths)):
        if wrong := [v for v in values if v < 0]:
            raise ValueError(f"lengths of {name} must be 0 or more, not {wrong}")
    return [Test(p, n, d) for d in depths for p, n in [(p, 0) for p in prompts if p] + [(0, n) for n in new if n]]


def measure(
    model: Model, params: Any, test: Test, *, chunk: int | None = None, burst: int = BURST, repetitions: int = 5
) -> tuple[float, list[float]]:
    """Seconds that a test on random tokens takes: (the first run, with all compiling; each of the others).

    It makes the calls of `prefill` and `decode` that `generate` makes. The runs share a cache that holds the tokens of
    the depth: each writes the same positions again, and until then nothing attends to what the run before left there.
    """
    for name, value in (("burst", burst), ("repetitions", repetitions), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    random, vocab = np.random.default_rng(0), model.config.vocab
    before, prompt = (random.integers(vocab, size=size).tolist() for size in (test.depth, test.prompt))
    sampler, keys, stops = Sampler.greedy(), jax.random.key(0)[None], np.array([-1], np.int32)

    def chunk_of(tokens: list[int]) -> int:
        return engine.chunk_for(len(tokens), chunk or default_chunk(device_of(params))) if tokens else 1

    def prefill(tokens: list[int], start: int, cache: Any) -> tuple[Any, Any]:
        own, logits = chunk_of(tokens), None
        for t, pos in engine.calls(*engine.left_pad([tokens], own), own):
            logits, cache = engine.prefill(model, params, t, np.where(pos < 0, pos, pos + start), cache, chunk=own)
        return logits, cache

    def run(logits: Any, cache: Any) -> tuple[Any, Any]:
        if test.prompt:
            return prefill(prompt, test.depth, cache)
        state = engine.start(logits, [before], cache, sampler)
        for made in range(0, test.new, burst):
            limit = np.int32(min(burst, test.new - made))
            _, state = engine.decode(model, params, state, keys, stops, limit, sampler=sampler, room=burst)
        return state.logits, state.cache

    slots, longest = engine.slots_for(test.depth + test.prompt + test.new), max(chunk_of(before), chunk_of(prompt))
    cache = model.init_cache(params, 1, slots, chunk=longest)
    logits, took = jnp.zeros((1, vocab)), []
    if before:
        logits, cache = jax.block_until_ready(prefill(before, 0, cache))
    for _ in range(1 + repetitions):
        began = time.perf_counter()
        logits, cache = jax.block_until_ready(run(logits, cache))
        took.append(time.perf_counter() - began)
    return took[0], took[1:]


def row(
    file: gguf.File, model: Model, params: Any, test: Test, chunk: int | None, seconds: Sequence[float]
) -> dict[str, Any]:
    """One result under llama-bench's names, with what it was measured on."""
    device, rates = device_of(params), [(test.prompt + test.new) / s for s in seconds]
    nanoseconds = [round(1e9 * s) for s in seconds]
    return {
        "jaxinfer": version("jaxinfer"),
        "jax": version("jax"),
        "backend": device.platform.upper(),
        "device": device.device_kind,
        "model_filename": file.path,
        "model_type": title(file),
        "model_size": size_bytes(file),
        "model_n_params": parameters(file),
        "chunk": chunk,
        "dtype": str(model.config.dtype),
        "n_prompt": test.prompt,
        "n_gen": test.new,
        "n_depth": test.depth,
        "test_time": datetime.now(UTC).isoformat(timespec="seconds"),
        "avg_ns": round(mean(nanoseconds)),
        "stddev_ns": round(_deviation(nanoseconds)),
        "avg_ts": mean(rates),
        "stddev_ts": _deviation(rates),
        "samples_ns": nanoseconds,
        "samples_ts": rates,
        "test": str(test),
    }


def _deviation(values: Sequence[float | int]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def table(rows: Iterable[dict[str, Any]], form: str, varied: Sequence[str] = ()) -> Iterator[str]:
    """The lines of a report in one of FORMS, as the rows come; `varied` are the columns that Markdown has besides."""
    match form:
        case "md":
            yield from _markdown(rows, varied)
        case "csv":
            yield from _csv(rows)
        case "jsonl":
            yield from map(json.dumps, rows)
        case "json":
            before = "["
            for one in rows:
                yield f"{before}\n{json.dumps(one, indent=2)}"
                before = ","
            yield "]"
        case _:
            raise ValueError(f"{form!r} is not a form of output; known are {', '.join(FORMS)}")


def _csv(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    for i, one in enumerate(rows):
        plain = {name: value for name, value in one.items() if not isinstance(value, list)}
        for values in ([] if i else [plain.keys()]) + [plain.values()]:
            line = io.StringIO()
            csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="").writerow(values)
            yield line.getvalue()


def _markdown(rows: Iterable[dict[str, Any]], varied: Sequence[str]) -> Iterator[str]:
    widths = {"model": -22, "size": 10, "params": 10, "backend": -7, **dict.fromkeys(varied, 8), "test": -15, "t/s": 18}

    def line(cells: Iterable[str]) -> str:
        aligned = (c.rjust(w) if w > 0 else c.ljust(-w) for c, w in zip(cells, widths.values(), strict=True))
        return f"| {' | '.join(aligned)} |"

    yield line(widths)
    yield f"| {' | '.join('-' * (abs(w) - (w > 0)) + ':' * (w > 0) for w in widths.values())} |"
    one = {}
    for one in rows:
        size, n = one["model_size"], one["model_n_params"]
        yield line(
            (
                one["model_type"],
                f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB",
                f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M",
                one["backend"],
                *(str(one[name]) for name in varied),
                one["test"],
                f"{one['avg_ts']:.2f} ± {one['stddev_ts']:.2f}",
            )
        )
    if one:
        yield f"\nbuild: jaxinfer {one['jaxinfer']}, jax {one['jax']}; device: {one['device']}"
