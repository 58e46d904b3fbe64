"""The command line: arguments, from there or from a run file, around the functions of the package."""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxinfer import (
    arguments,
    bench,
    bench_attention,
    bench_matmul,
    bench_moe,
    compiling,
    gguf,
    hub,
    memory,
    needle,
    presses,
    timing,
)
from jaxinfer.arguments import AUTO, Given
from jaxinfer.explain import explain, lines
from jaxinfer.generate import GPU_CHUNK, Prompt, Stats, default_chunk, device_of, encode, stream
from jaxinfer.info import info
from jaxinfer.layers.attention import AttentionSpec
from jaxinfer.layers.rope import Rope
from jaxinfer.loader import Loaded, Model, describe, load
from jaxinfer.ops import HOPPER
from jaxinfer.perplexity import perplexity
from jaxinfer.sample import Sampler
from jaxinfer.session import Session
from jaxinfer.snapkv import Eviction
from jaxinfer.terminal import Terminal
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.tree import Device

PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu"}  # JAX's names for the devices


def run_generate(given: Given, terminal: Terminal) -> None:
    text, options = _text(given), _options(given, terminal)
    loaded = _load(given, terminal)
    session = None
    if "session" in given or "save_session" in given:
        session = _session(given, terminal, loaded)
    else:
        options |= _caches(given, loaded)
    prompt, stats = _prompt(given, text, loaded.tokenizer, terminal), None
    if session and session.tokens[0] and not isinstance(prompt, str):
        assert loaded.tokenizer is not None
        prompt = loaded.tokenizer.next_turn(prompt, **_template_kwargs(given))
        options["chat_template_kwargs"] = {}
    with _saving(given, terminal, session):
        for piece in stream(*loaded, prompt, session=session, **options):
            print(piece.text, end="", flush=True)
            stats = piece.stats
        print(flush=True)
    if stats:
        _summary(stats, terminal)


def run_prefill(given: Given, terminal: Terminal) -> None:
    if "save_session" not in given:
        raise ValueError("prefill needs a file to save the session to: --save-session FILE")
    text = _text(given)
    loaded = _load(given, terminal)
    prompt = _prompt(given, text, loaded.tokenizer, terminal)
    kwargs = None if isinstance(prompt, str) else {"add_generation_prompt": False}
    ids = encode(loaded.tokenizer, prompt, loaded.model.config.vocab, kwargs)
    session = _session(given, terminal, loaded)
    with _saving(given, terminal, session):
        began = time.perf_counter()
        session.extend([ids], terminal.meter("prefilling", "tokens"))
        terminal.say(f"Prompt: {len(ids)} tokens, {len(ids) / (time.perf_counter() - began):.1f} tokens-per-sec")


def run_chat(given: Given, terminal: Terminal) -> None:
    messages, options = _system(given), _options(given, terminal)
    loaded = _load(given, terminal)
    session = _session(given, terminal, loaded)
    terminal.say("/exit or Ctrl-D ends the chat, Ctrl-C an answer")
    while (line := terminal.ask()) not in (None, "/exit"):
        question, answer = {"role": "user", "content": line}, ""
        try:
            for piece in stream(*loaded, [*messages, question], session=session, **options):
                print(piece.text, end="", flush=True)
                answer += piece.text
        except KeyboardInterrupt:
            terminal.clear()
        except ValueError as error:  # such as a conversation that has become too long
            terminal.say(f"error: {error}")
        if answer:
            print(flush=True)
            messages += [question, {"role": "assistant", "content": answer}]


def run_bench(given: Given, terminal: Terminal) -> None:
    tests = bench.tests(given.get("n_prompt", [512]), given.get("n_gen", [128]), given.get("n_depth", [0]))
    if given.get("compile"):
        _bench_compile(given, terminal, tests)
        return
    file = gguf.read(_fetch(given, terminal))

    def rows(dtype: str | None) -> Iterator[dict[str, Any]]:
        loaded = _load({**given, "dtype": dtype}, terminal)
        for chunk in given.get("chunk", [None]):
            for test in tests:
                terminal.busy(f"running {test}")
                options = {"chunk": chunk, **_pick(given, "burst", "repetitions")}
                first_s, seconds = bench.measure(loaded.model, loaded.params, test, **options)
                terminal.say(f"first run of {test}, compiling included: {first_s:.1f} s")
                yield bench.row(file, loaded.model, loaded.params, test, chunk, seconds)

    every = (one for dtype in given.get("dtype", [None]) for one in rows(dtype))
    varied = [name for name in ("chunk", "dtype") if len(given.get(name, [])) > 1]
    for line in bench.table(every, given.get("output", "md"), varied):
        print(line, flush=True)


def _bench_compile(given: Given, terminal: Terminal, tests: list[bench.Test]) -> None:
    def costs(dtype: str | None) -> Iterator[compiling.Cost]:
        with _notes(terminal):
            found = describe(_fetch(given, terminal), **_pick({**given, "dtype": dtype}, "dtype", "expand"))
        for chunk in given.get("chunk", [None]):
            for test in tests:
                terminal.busy(f"compiling {test}")
                yield from compiling.measure(found, test, chunk=chunk, **_pick(given, "burst"))

    every = (one for dtype in given.get("dtype", [None]) for one in costs(dtype))
    for line in compiling.table(every, given.get("output", "md")):
        print(line, flush=True)


def run_bench_attention(given: Given, terminal: Terminal) -> None:
    names = "shapes", "works", "lengths", "tokens", "batch", "chunk"
    rows = _time(bench_attention.BENCHMARK, given, terminal, *names)
    if "plot" in given:
        bench_attention.plot(rows, given["plot"])


def run_bench_matmul(given: Given, terminal: Terminal) -> None:
    _time(bench_matmul.BENCHMARK, given, terminal, "formats", "shapes", "rows")


def run_bench_moe(given: Given, terminal: Terminal) -> None:
    _time(bench_moe.BENCHMARK, given, terminal, "shapes", "works", "formats", "skews", "tokens")


def _time(benchmark: timing.Benchmark, given: Given, terminal: Terminal, *names: str) -> list[timing.Row]:
    """Prints what a benchmark finds in the cases that these arguments choose, as it comes, and returns it."""
    dtype = given.get("dtype", "bfloat16" if jax.devices()[0].platform == "gpu" else "float32")
    cases = benchmark.cases(dtype=dtype, **_pick(given, *names))
    backends = benchmark.choose(given.get("backends", list(benchmark.backends)))
    options = {"samples": given["repetitions"]} if "repetitions" in given else {}
    compiling = given.get("compile", False)
    terminal.busy("measuring ceilings")
    ceiling = timing.ceilings(dtype, **options)
    rows = timing.measure(benchmark, cases, backends, ceiling, busy=terminal.busy, compiling=compiling, **options)
    if "csv" in given:
        rows = timing.recorded(rows, given["csv"])
    found = []

    def kept() -> Iterator[timing.Row]:
        for one in rows:
            found.append(one)
            yield one

    for line in timing.table(benchmark, kept(), ceiling, compiling=compiling):
        print(line, flush=True)
    return found


def run_perplexity(given: Given, terminal: Terminal) -> None:
    text = _text(given)
    model, params, tokenizer = _load(given, terminal)
    if tokenizer is None:
        raise ValueError(f"{given['model']}: the file has no tokenizer, which perplexity needs")
    if given.get("ctx") == AUTO:
        raise ValueError("--ctx auto: the windows of perplexity have a length of their own, such as 512")
    ids, bos = tokenizer.encode(text), tokenizer.bos_id if tokenizer.add_bos else None
    options, estimate = {"eviction": _eviction(given, model), **_pick(given, "ctx", "chunk")}, None
    for estimate in perplexity(model, params, ids, bos=bos, **options):
        print(f"[{estimate.windows}]{estimate.perplexity:.4f},", end="", flush=True)
    if estimate:
        print(f"\nFinal estimate: PPL = {estimate.perplexity:.4f} +/- {estimate.error:.5f}", flush=True)


def run_needle(given: Given, terminal: Terminal) -> None:
    loaded = _load(given, terminal)
    most = int(loaded.model.config.context) - given.get("max_tokens", 16)
    names, keeps = given.get("press", ["snapkv"]), given.get("keep", [])
    options = _pick(given, "window", "kernel", "one_list", "interleaved")
    policies = needle.policies(names, keeps, _rope(loaded.model), **options)
    cases = {"lengths": [most], "depths": [0.1, 0.5, 0.9], **_pick(given, "lengths", "depths", "seeds", "batch")}
    found = []

    def answers() -> Iterator[needle.Answer]:
        for one in needle.answers(*loaded, policies, **cases, **_pick(given, "max_tokens", "chunk")):
            found.append(one)
            if len(found) % len(policies) == 0:
                terminal.busy(f"asked {len(found) // len(policies)} prompts")
            yield one

    for line in needle.table(answers(), given.get("output", "md")):
        print(line, flush=True)
    if "plot" in given:
        needle.plot(found, given["plot"])


def run_info(given: Given, terminal: Terminal) -> None:
    with _notes(terminal):
        found = describe(_fetch(given, terminal), **_pick(given, "dtype", "expand"))
    ctx = _context(given, found.model, found.params, found.device, expand=found.expand)
    fit = list(_fit(given, terminal)) if "fit" in given else []
    for name, fact in info(found, ctx).items():
        print(f"{name + ':':<14}{fact}")
    for line in fit:
        print(line)


def _fit(given: Given, terminal: Terminal) -> Iterator[str]:
    """The longest context that fits into the memory of a GPU, of this machine or not, and what takes it."""
    limit = memory.parse_size(given["fit"])
    with _notes(terminal):
        found = describe(
            _fetch(given, terminal), **{"dtype": "bfloat16", **_pick(given, "dtype")}, ops=HOPPER, expand=False
        )
    most, context = given.get("ctx", AUTO), int(found.model.config.context)
    planned = partial(memory.plan, found.model, found.params, chunk=GPU_CHUNK)
    memory.require(planned, 1, limit, 1)
    ctx = memory.largest_context(planned, limit, context if most == AUTO else most)
    yield f"\non a GPU with {memory.show(limit)} fit {ctx} tokens, in chunks of {GPU_CHUNK}:"
    yield str(planned(ctx))


def run_explain(given: Given, terminal: Terminal) -> None:
    with _notes(terminal):
        found = describe(_fetch(given, terminal), **_pick(given, "dtype", "expand"))
    ctx = _context(given, found.model, found.params, found.device, expand=found.expand)
    for line in lines(explain(found, ctx, **_pick(given, "chunk"))):
        print(line)


RUN = {
    "generate": run_generate,
    "prefill": run_prefill,
    "chat": run_chat,
    "bench": run_bench,
    "bench attention": run_bench_attention,
    "bench matmul": run_bench_matmul,
    "bench moe": run_bench_moe,
    "perplexity": run_perplexity,
    "eval needle": run_needle,
    "info": run_info,
    "explain": run_explain,
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 0, 2 for input that cannot be used, 130 after Ctrl-C, 141 after a broken pipe."""
    terminal = Terminal()
    try:
        command, given = arguments.read(sys.argv[1:] if argv is None else argv)
        cache = _configure(given)
        RUN[command](given, terminal)
        if command not in ("info", "explain"):
            terminal.say(f"Compilation cache: {cache or 'off'}")
    except ValueError as error:
        terminal.say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        terminal.say("\nstopped by Ctrl-C")
        return 130
    except BrokenPipeError:  # whoever read the text has left; the interpreter would complain when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        terminal.clear()
    return 0


def _configure(given: Given) -> str:
    """Settings of JAX that hold for the whole process; returns the folder of the compilation cache, '' for none."""
    if device := given.get("device"):
        jax.config.update("jax_platforms", PLATFORMS[device])
        try:
            found = jax.devices()[0].platform
        except RuntimeError as error:
            raise ValueError(f"--device {device}: {error}") from None
        if found != device:
            raise ValueError(f"--device {device}: JAX runs on the {found}; a GPU needs jaxinfer[cuda12] or [cuda13]")
    cache = given.get("compile_cache", str(Path.home() / ".cache" / "jaxinfer" / "xla"))
    if given.get("compile"):  # is timed, and would be a look into the cache, which the environment may set as well
        jax.config.update("jax_enable_compilation_cache", False)
        cache = ""
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return cache


def _pick(given: Given, *names: str) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def _fetch(given: Given, terminal: Terminal) -> str:
    if "model" not in given:
        raise ValueError(f"a model is missing: --model with {hub.FORMS}")
    name = given["model"]
    return str(hub.fetch(name, sha256=given.get("sha256"), progress=terminal.meter(f"downloading {name}", "B")))


def _load(given: Given, terminal: Terminal) -> Loaded:
    path = _fetch(given, terminal)
    began = time.perf_counter()
    with _notes(terminal):
        loaded = load(path, progress=terminal.meter(f"loading {path}", "B"), **_pick(given, "dtype", "expand"))
    terminal.say(f"loaded {path} in {time.perf_counter() - began:.1f} s")
    return loaded


@contextmanager
def _notes(terminal: Terminal) -> Iterator[None]:
    """Says warnings as lines."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for one in caught:
        terminal.say(f"warning: {one.message}")


def _text(given: Given) -> str:
    """The prompt; of a file or stdin without one newline at the end, as llama.cpp reads files."""
    if ("prompt" in given) == ("file" in given):
        raise ValueError("one prompt is needed: --prompt TEXT, --prompt - to read stdin, or --file FILE")
    if given.get("prompt", "-") != "-":
        return given["prompt"]
    name = given.get("file", "stdin")
    try:
        data = Path(name).read_bytes() if "file" in given else sys.stdin.buffer.read()
        return data.decode().removesuffix("\n")
    except (OSError, ValueError) as error:  # not UTF-8, or a name that no file can have
        raise ValueError(f"{name}: the prompt cannot be read: {error}") from None


def _system(given: Given) -> list[dict[str, Any]]:
    return [{"role": "system", "content": given["system"]}] if "system" in given else []


def _prompt(given: Given, text: str, tokenizer: Tokenizer | None, terminal: Terminal) -> Prompt:
    """The text as a user's message where the file has a chat template, else as it is."""
    wanted = given.get("chat_template", True)
    if wanted and tokenizer and tokenizer.chat_template:
        return [*_system(given), {"role": "user", "content": text}]
    for name in ("system", "reasoning", "chat_template_kwargs"):
        if name in given:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} needs the chat template of the file, which it does not have or which is off")
    if wanted:
        terminal.say("note: the file has no chat template; the prompt is taken as it is")
    return text


def _options(given: Given, terminal: Terminal) -> dict[str, Any]:
    """For `stream`, but for what a session has of its own."""
    return {
        "sampler": Sampler(**_pick(given, *(f.name for f in fields(Sampler)))),
        "progress": terminal.meter("prefilling", "tokens"),
        "compiling": terminal.compiling,
        "chat_template_kwargs": _template_kwargs(given),
        **_pick(given, "max_tokens", "stop", "ignore_eos", "burst"),
    }


def _caches(given: Given, loaded: Loaded) -> dict[str, Any]:
    """For `stream` without a session: what shapes the caches."""
    return {
        "eviction": _eviction(given, loaded.model),
        "ctx": _context(given, loaded.model, loaded.params, device_of(loaded.params)),
        **_pick(given, "chunk", "cache_dtype"),
    }


ROOM = 16384  # tokens of a session, unless told: its caches are there from the start


def _context(given: Given, model: Model, params: Any, device: Device, *, expand: bool = False) -> int | None:
    """The context asked for; what fits where that is auto. The weights of a file are still to be loaded."""
    if given.get("ctx") != AUTO:
        return given.get("ctx")
    loaded = isinstance(jax.tree.leaves(params)[0], jax.Array)
    limit = memory.limit_bytes(params, device) if loaded else memory.available_bytes(device)
    chunk = given.get("chunk", default_chunk(device))
    planned = partial(memory.plan, model, params, chunk=chunk, expand=expand, dtype=given.get("cache_dtype"))
    memory.require(planned, 1, limit, 1)
    return memory.largest_context(planned, limit, int(model.config.context))


def _eviction(given: Given, model: Model) -> Eviction | None:
    keep, others = given.get("keep", 0), _pick(given, "press", "window", "kernel", "one_list", "interleaved")
    if keep == 0:
        if others:
            raise ValueError(f"--{next(iter(others)).replace('_', '-')} needs --keep: how many tokens stay, or auto")
        return None
    press = presses.press(given.get("press", "snapkv"), _rope(model), given.get("window"), given.get("kernel"))
    return Eviction(press=press, keep=None if keep == AUTO else keep, **_pick(given, "one_list", "interleaved"))


def _rope(model: Model) -> Rope | None:
    """Of the layers that can be evicted from."""
    full = [spec for _, spec in model.config.mixers if isinstance(spec, AttentionSpec) and spec.window is None]
    return full[0].rope if full else None


def _session(given: Given, terminal: Terminal, loaded: Loaded) -> Session:
    """The session of a file, or a new one for as many tokens as are asked for, or else as fit."""
    model, params, _ = loaded
    eviction = _eviction(given, model)
    if "session" in given:
        for name in ("ctx", "chunk", "cache_dtype"):
            if name in given:
                raise ValueError(f"--{name.replace('_', '-')} is fixed in a session: {given['session']} has its own")
        session = Session.load(given["session"], model, params, eviction=eviction)
        terminal.say(f"session of {len(session.tokens[0])} tokens, room for {session.ctx}")
        return session
    chunk = given.get("chunk", default_chunk(device_of(params)))
    ctx = _context({"ctx": AUTO, **given}, model, params, device_of(params))
    assert ctx is not None
    if "ctx" not in given:
        ctx = min(ctx, ROOM)
    return Session(model, params, ctx=ctx, chunk=chunk, eviction=eviction, dtype=given.get("cache_dtype"))


@contextmanager
def _saving(given: Given, terminal: Terminal, session: Session | None) -> Iterator[None]:
    """Saves the session at the end, and as far as it has come at Ctrl-C."""
    try:
        yield
    finally:
        if "save_session" in given and session and session.tokens[0]:
            session.save(given["save_session"])
            terminal.say(f"saved {len(session.tokens[0])} tokens to {given['save_session']}")


def _template_kwargs(given: Given) -> dict[str, Any]:
    thinking = {"enable_thinking": given["reasoning"] == "on"} if "reasoning" in given else {}
    return thinking | given.get("chat_template_kwargs", {})


def _summary(stats: Stats, terminal: Terminal) -> None:
    programs = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stats.compile_s.items())
    read = stats.prompt_tokens - stats.reused_tokens
    reused = f" ({stats.reused_tokens} of them read before)" if stats.reused_tokens else ""
    terminal.say(f"Prompt: {stats.prompt_tokens} tokens{reused}, {read / stats.prompt_s:.1f} tokens-per-sec")
    if stats.kept_bytes < stats.cache_bytes:
        sizes = f"{stats.cache_bytes / 1e6:.1f} to {stats.kept_bytes / 1e6:.1f} MB"
        terminal.say(f"Eviction: caches from {sizes} in {stats.evict_s:.2f} s")
    terminal.say(f"Generation: {stats.new_tokens} tokens, {stats.new_tokens / stats.decode_s:.1f} tokens-per-sec")
    terminal.say(f"Time to first token: {stats.first_token_s:.2f} s")
    terminal.say(f"Peak memory: {stats.peak_bytes / 1e9:.3f} GB")
    terminal.say(f"Compile: {sum(stats.compile_s.values()):.1f} s ({programs})")


if __name__ == "__main__":
    sys.exit(main())
