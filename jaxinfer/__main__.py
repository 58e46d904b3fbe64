"""The command line: arguments, from there or from a run file, around the functions of the package."""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax

from jaxinfer import arguments, bench, gguf, hub
from jaxinfer.arguments import Given
from jaxinfer.generate import Prompt, Stats, stream
from jaxinfer.info import info
from jaxinfer.loader import Loaded, describe, load
from jaxinfer.perplexity import perplexity
from jaxinfer.sample import Sampler
from jaxinfer.terminal import Terminal
from jaxinfer.tokenizer import Tokenizer

PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu"}  # JAX's names for the devices


def run_generate(given: Given, terminal: Terminal) -> None:
    text, options = _text(given), _options(given, terminal)
    loaded = _load(given, terminal)
    stats = None
    for piece in stream(*loaded, _prompt(given, text, loaded.tokenizer, terminal), **options):
        print(piece.text, end="", flush=True)
        stats = piece.stats
    print(flush=True)
    if stats:
        _summary(stats, terminal)


def run_chat(given: Given, terminal: Terminal) -> None:
    messages, options = _system(given), _options(given, terminal)
    loaded = _load(given, terminal)
    terminal.say("/exit or Ctrl-D ends the chat, Ctrl-C an answer")
    while (line := terminal.ask()) not in (None, "/exit"):
        question, answer = {"role": "user", "content": line}, ""
        try:
            for piece in stream(*loaded, [*messages, question], **options):
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


def run_perplexity(given: Given, terminal: Terminal) -> None:
    text = _text(given)
    model, params, tokenizer = _load(given, terminal)
    if tokenizer is None:
        raise ValueError(f"{given['model']}: the file has no tokenizer, which perplexity needs")
    ids, bos = tokenizer.encode(text), tokenizer.bos_id if tokenizer.add_bos else None
    estimate = None
    for estimate in perplexity(model, params, ids, bos=bos, **_pick(given, "ctx", "chunk")):
        print(f"[{estimate.windows}]{estimate.perplexity:.4f},", end="", flush=True)
    if estimate:
        print(f"\nFinal estimate: PPL = {estimate.perplexity:.4f} +/- {estimate.error:.5f}", flush=True)


def run_info(given: Given, terminal: Terminal) -> None:
    with _notes(terminal):
        found = describe(_fetch(given, terminal), **_pick(given, "dtype", "expand"))
    for name, fact in info(found, given.get("ctx")).items():
        print(f"{name + ':':<14}{fact}")


RUN = {
    "generate": run_generate,
    "chat": run_chat,
    "bench": run_bench,
    "perplexity": run_perplexity,
    "info": run_info,
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 0, 2 for input that cannot be used, 130 after Ctrl-C, 141 after a broken pipe."""
    terminal = Terminal()
    try:
        command, given = arguments.read(sys.argv[1:] if argv is None else argv)
        cache = _configure(given)
        RUN[command](given, terminal)
        if command != "info":
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
    """For `stream`."""
    return {
        "sampler": Sampler(**_pick(given, *(f.name for f in fields(Sampler)))),
        "progress": terminal.meter("prefilling", "tokens"),
        "compiling": terminal.compiling,
        "chat_template_kwargs": _template_kwargs(given),
        **_pick(given, "max_tokens", "stop", "ignore_eos", "chunk", "ctx", "burst"),
    }


def _template_kwargs(given: Given) -> dict[str, Any]:
    thinking = {"enable_thinking": given["reasoning"] == "on"} if "reasoning" in given else {}
    return thinking | given.get("chat_template_kwargs", {})


def _summary(stats: Stats, terminal: Terminal) -> None:
    programs = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stats.compile_s.items())
    terminal.say(f"Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tokens / stats.prompt_s:.1f} tokens-per-sec")
    terminal.say(f"Generation: {stats.new_tokens} tokens, {stats.new_tokens / stats.decode_s:.1f} tokens-per-sec")
    terminal.say(f"Time to first token: {stats.first_token_s:.2f} s")
    terminal.say(f"Peak memory: {stats.peak_bytes / 1e9:.3f} GB")
    terminal.say(f"Compile: {sum(stats.compile_s.values()):.1f} s ({programs})")


if __name__ == "__main__":
    sys.exit(main())
