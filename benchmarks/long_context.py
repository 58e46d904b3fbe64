"""Long prompts on a device: how long each way takes, and what memory it peaks at.

    python benchmarks/long_context.py context gemma4-31b.gguf -n 131072   # prefill and decode to the end of a context
    python benchmarks/long_context.py steps gemma4-e4b.gguf -n 5313       # in chunks, and token by token
    python benchmarks/long_context.py rings gemma4-e4b.gguf -n 16384      # windows as rings, and as full caches
    python benchmarks/long_context.py skipping gemma4-31b.gguf -n 16384   # attention_blocks over full caches alone
    python benchmarks/long_context.py eviction qwen3-8b.gguf -n 16384     # SnapKV to --keep tokens

Every time is that of a second run, so that nothing is compiled in it; tokens are random.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import Eviction, Model, Sampler, Session, engine, load, memory
from jaxinfer.cache import KVCache, size_bytes
from jaxinfer.generate import default_chunk, peak_bytes
from jaxinfer.layers.attention import AttentionSpec
from jaxinfer.ops.attention import attention_blocks
from jaxinfer.presses import SnapKV

NEW = 64  # tokens decoded


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def decode(session: Session, new: int = NEW) -> float:
    """Tokens a second of `new` tokens, after as many that do not count."""
    state = session.start(Sampler.greedy())
    for _ in range(2):
        began = time.perf_counter()
        out, state = session.decode(state, new, sampler=Sampler.greedy(), stops=np.array([-1], np.int32), burst=new)
        seconds = time.perf_counter() - began
    assert (out >= 0).all()
    assert np.isfinite(np.asarray(session.logits)).all()
    return new / seconds


def context(model: Model, params: Any, ids: list[int], args: argparse.Namespace) -> None:
    plan = memory.plan(model, params, context=len(ids), chunk=args.chunk)
    print(plan, flush=True)
    session = Session(model, params, ctx=len(ids), chunk=args.chunk)
    began = time.perf_counter()

    def progress(done: int, total: int) -> None:
        if done % (16 * args.chunk) == 0 or done == total:
            print(f"{done} tokens after {time.perf_counter() - began:.1f} s", flush=True)

    seconds = timed(lambda: session.extend([ids[: -2 * NEW]], progress))
    print(f"prefill of {len(ids) - 2 * NEW}: {(len(ids) - 2 * NEW) / seconds:.0f} tokens/s, compiling included")
    print(f"decode at the end: {decode(session):.1f} tokens/s")
    peak = peak_bytes(jax.devices()[0])
    print(f"peak {peak / 1e9:.3f} GB, planned {plan.total / 1e9:.3f} GB: {100 * (plan.total / peak - 1):+.1f} %")


def steps(model: Model, params: Any, ids: list[int], args: argparse.Namespace) -> None:
    rates, logits = {}, {}
    for name, chunk in (("chunks", args.chunk), ("token by token", 1)):
        tokens, pos = engine.left_pad([ids], chunk)
        for _ in range(2):
            cache, began, last = model.init_cache(params, 1, engine.slots_for(len(ids)), chunk=chunk), None, None
            began = time.perf_counter()
            for call in engine.calls(tokens, pos, chunk, 4 if chunk > 1 else len(ids)):  # no host between two tokens
                last, cache = engine.prefill(model, params, *call, cache, chunk=chunk)
            logits[name] = np.asarray(last)[0]
            rates[name] = len(ids) / (time.perf_counter() - began)
        print(f"{name}: {rates[name]:.1f} tokens/s", flush=True)
    one, other = logits.values()
    print(
        f"{rates['chunks'] / rates['token by token']:.1f} times; argmax {one.argmax()} and {other.argmax()}, ", end=""
    )
    print(f"logits differ by {np.linalg.norm(one - other) / np.linalg.norm(other):.2e} (relative L2)")


def unwindowed(cache: Any, slots: int) -> Any:
    """The cache with rings replaced by full caches: the window is then a mask."""

    def one(stack: Any) -> Any:
        if not isinstance(stack, KVCache) or stack.chunk is None:
            return stack
        shape = (*stack.k.shape[:3], slots, stack.k.shape[4])
        pos = jnp.full((*stack.pos.shape[:3], slots), -1, jnp.int32)
        return replace(stack, k=jnp.zeros(shape, stack.k.dtype), v=jnp.zeros(shape, stack.v.dtype), pos=pos)

    return tuple(map(one, cache))


def rings(model: Model, params: Any, ids: list[int], args: argparse.Namespace) -> None:
    for name in ("rings", "full caches with a mask"):
        for _ in range(2):
            session = Session(model, params, ctx=len(ids) + 2 * NEW, chunk=args.chunk)
            if name != "rings":
                session.cache = unwindowed(session.cache, engine.slots_for(session.ctx))
            seconds = timed(partial(session.extend, [ids]))
        size = size_bytes(session.cache) / 1e9
        print(f"{name}: prefill {len(ids) / seconds:.0f} tokens/s, decode {decode(session):.1f}, caches {size:.3f} GB")


def skipping(model: Model, params: Any, ids: list[int], args: argparse.Namespace) -> None:
    """One sliding layer's attention over all chunks of a prompt, in a cache that holds all of it."""
    spec = next(s for _, s in model.config.mixers if isinstance(s, AttentionSpec) and s.window)
    draw = partial(jax.random.normal, dtype=model.config.dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (draw(key, (1, 1, spec.kv_heads, len(ids), spec.width)) for key in keys[:2])
    cache = KVCache(k, v, jnp.arange(len(ids), dtype=jnp.int32)[None, None, None])
    q = draw(keys[2], (1, args.chunk, spec.kv_heads, spec.group, spec.width))
    attend = jax.jit(partial(attention_blocks, scale=spec.scale, window=spec.window), static_argnames="skip")
    took = {}
    for skip in (True, False):
        for _ in range(2):
            began = time.perf_counter()
            for start in range(0, len(ids), args.chunk):
                o = attend(q, cache, 0, start + jnp.arange(args.chunk)[None], skip=skip)
            jax.block_until_ready(o)
            took[skip] = time.perf_counter() - began
        print(f"skip={skip}: {took[skip] * 1e3:.1f} ms", flush=True)
    print(f"{took[False] / took[True]:.2f} times")


def eviction(model: Model, params: Any, ids: list[int], args: argparse.Namespace) -> None:
    for policy in (None, Eviction(press=SnapKV(), keep=args.keep)):
        for _ in range(2):
            session = Session(model, params, ctx=len(ids) + 2 * NEW, chunk=args.chunk, eviction=policy)
            seconds, before = timed(partial(session.extend, [ids])), size_bytes(session.cache)
            evicting = timed(lambda session=session: (session.evict(2 * NEW), session.cache)[1])
        print(
            f"{'SnapKV' if policy else 'full'}: prefill {len(ids) / seconds:.0f} tokens/s in {seconds:.3f} s, "
            f"eviction {evicting * 1e3:.1f} ms, caches {before / 1e6:.1f} to {size_bytes(session.cache) / 1e6:.1f} MB, "
            f"decode {decode(session):.1f} tokens/s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = {f.__name__: f for f in (context, steps, rings, skipping, eviction)}
    parser.add_argument("run", choices=runs)
    parser.add_argument("model")
    parser.add_argument("-n", "--tokens", type=int, required=True)
    parser.add_argument("-b", "--chunk", type=int, default=default_chunk(jax.devices()[0]))
    parser.add_argument("-k", "--keep", type=int, default=2048)
    parser.add_argument("--dtype")
    args = parser.parse_args()
    model, params, _ = load(args.model, dtype=args.dtype)
    ids = np.random.default_rng(0).integers(model.config.vocab, size=args.tokens).tolist()
    kind = jax.devices()[0].device_kind
    print(f"{args.run}: {args.model}, {args.tokens} tokens by {args.chunk}, {model.config.dtype}, {kind}", flush=True)
    runs[args.run](model, params, ids, args)


if __name__ == "__main__":
    main()
