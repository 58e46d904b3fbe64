"""Speed of prompts and of decoding after them, and which kernels take that time.

python benchmarks/kernels.py model.gguf --depths 512,8192
"""

import argparse
import gzip
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

import jaxinfer
from jaxinfer import Ops, Sampler, engine, load
from jaxinfer.generate import default_chunk, device_of

NAMED = {name: ops for name, ops in vars(jaxinfer).items() if isinstance(ops, Ops)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-d", "--depths", default="512", help="tokens of the prompts, with commas")
    parser.add_argument("-n", "--new", type=int, default=64, help="tokens that are decoded; 0: prompts only")
    parser.add_argument("-b", "--batch", type=int, default=1, help="rows of each, whose tokens are counted together")
    parser.add_argument("-c", "--chunk", type=int, help="tokens prefilled at a time")
    parser.add_argument("-o", "--ops", choices=list(NAMED), help="operations other than the device's own")
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("-k", "--kernels", type=int, default=0, help="of each program that are listed")
    parser.add_argument("--no-skip", action="store_true", help="attention visits masked blocks of keys too")
    args = parser.parse_args()
    model, params, _ = load(args.model, ops=NAMED.get(args.ops))
    chunk = args.chunk or default_chunk(device_of(params))
    if args.no_skip:
        model = replace(model, ops=model.ops._replace(attention=partial(model.ops.attention, skip=False)))
    for depth in map(int, args.depths.split(",")):
        times, rows = args.repetitions + 2, "" if args.batch == 1 else f"{args.batch} times "
        prefill, decode, held = runs(model, params, args.batch, depth, args.new, times, min(chunk, depth))
        held = report(f"prefill of {rows}{depth}", args.batch * depth, prefill, held, args)
        if args.new:
            report(f"{rows}{args.new} tokens decoded after {depth}", args.batch * args.new, decode, held, args)


type Run = Callable[[engine.State], engine.State]  # from a state that it donates to one for the next run


def runs(
    model: Any, params: Any, batch: int, depth: int, new: int, times: int, chunk: int
) -> tuple[Run, Run, engine.State]:
    """The prefill of prompts, some tokens after them, and what to begin with.

    Prefills write the same positions again, see jaxinfer.bench; decoding goes on from token to token.
    """
    prompts = np.random.default_rng(0).integers(model.config.vocab, size=(batch, depth)).tolist()
    padded, sampler = engine.left_pad(prompts, chunk), Sampler.greedy()
    keys, stops = jax.random.split(jax.random.key(0), batch), np.array([-1], np.int32)

    def prefill(state: engine.State) -> engine.State:
        logits, cache = state.logits, state.cache
        for tokens, pos in engine.calls(*padded, chunk):
            logits, cache = engine.prefill(model, params, tokens, pos, cache, chunk=chunk)
        return engine.start(logits, prompts, cache, sampler)

    def decode(state: engine.State) -> engine.State:
        return engine.decode(model, params, state, keys, stops, np.int32(new), sampler=sampler, room=new)[1]

    cache = model.init_cache(params, batch, engine.slots_for(depth + new * times), chunk=chunk)
    logits = np.zeros((batch, model.config.vocab), np.float32)
    return prefill, decode, engine.start(logits, prompts, cache, sampler)


def report(what: str, tokens: int, run: Run, held: engine.State, args: argparse.Namespace) -> engine.State:
    """Prints how fast a run is, and its kernels if they are wanted; the state that it ends in."""
    took = []
    for _ in range(1 + args.repetitions):
        began = time.perf_counter()
        held = jax.block_until_ready(run(held))
        took.append(time.perf_counter() - began)
    first, *took = took  # which compiles
    rates = ", ".join(f"{tokens / s:.1f}" for s in (median(took), max(took), min(took)))
    print(f"{what}: {rates} tokens/s in the median, at least, at most; the first run took {first:.1f} s", flush=True)
    if args.kernels:
        with tempfile.TemporaryDirectory() as place:
            with jax.profiler.trace(place, create_perfetto_trace=True):
                held = jax.block_until_ready(run(held))
            (path,) = Path(place).rglob("*perfetto*.json.gz")
            with gzip.open(path) as file:
                found = json.load(file)
        events = found if isinstance(found, list) else found["traceEvents"]
        print("\n".join(shares(launches(events), tokens, args.kernels)), flush=True)
    return held


def shares(found: Sequence[tuple[str, float]], tokens: int, most: int) -> list[str]:
    """Lines that say which kernels were launched, how often a token, and what share of the time each took."""
    took = defaultdict(list)
    for name, us in found:
        took[name].append(us)
    total = sum(map(sum, took.values()))
    lines = [f"  {len(found) / tokens:.2f} launches and {total / tokens:.2f} us of kernels a token"]
    for name in sorted(took, key=lambda name: -sum(took[name]))[:most]:
        share, each = sum(took[name]) / total, len(took[name]) / tokens
        lines.append(f"  {share:6.1%} {each:9.3f} a token, {median(took[name]):9.2f} us each: {name}")
    return lines


def launches(events: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """What ran on a GPU: (name, microseconds)."""
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("name") in ("process_name", "thread_name")
    }
    on_gpu = {pid for (kind, pid, _), name in names.items() if kind == "process_name" and "GPU" in name}
    streams = {(pid, tid) for (kind, pid, tid), name in names.items() if kind == "thread_name" and "Stream" in name}
    return [
        (event["name"], event["dur"])
        for event in events
        if event.get("ph") == "X" and event["pid"] in on_gpu and (event["pid"], event["tid"]) in streams
    ]


if __name__ == "__main__":
    main()
