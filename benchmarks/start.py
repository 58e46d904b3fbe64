"""Where time and memory of a run go: import, load, compile, prefill, decode; twice, to see what caches are worth.

python benchmarks/start.py model.gguf --prompt 2048 --compile-cache /tmp/cache
"""

import argparse
import time

BEGAN = time.perf_counter()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxinfer import Sampler, load  # noqa: E402
from jaxinfer.cache import size_bytes  # noqa: E402
from jaxinfer.generate import peak_bytes, plan  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-p", "--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("-n", "--new", type=int, default=128, help="tokens")
    parser.add_argument("-c", "--chunk", type=int, help="tokens prefilled at a time")
    parser.add_argument("--compile-cache", default="")
    args = parser.parse_args()
    if args.compile_cache:
        jax.config.update("jax_compilation_cache_dir", args.compile_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    last = BEGAN

    def tell(what: str) -> float:
        nonlocal last
        now = time.perf_counter()
        took, last = now - last, now
        print(f"{what:<40}{took:7.2f} s{now - BEGAN:9.2f} s since the start", flush=True)
        return took

    device = jax.devices()[0]
    tell(f"import, {device.device_kind}")
    model, params, _ = load(args.model)
    tell("load")
    prompt = np.random.default_rng(0).integers(model.config.vocab, size=args.prompt).tolist()
    options = {"chunk": args.chunk, "burst": args.new, "sampler": Sampler.greedy(), "ignore_eos": True}
    run = plan(model, params, None, [prompt], max_tokens=args.new + 1, **options)
    run.compile(lambda program, seconds: tell(f"compile {program}") if seconds is not None else None)
    run.prefill()
    run.decode(run.session, None, 1)
    tell("first token")
    run = plan(model, params, None, [prompt], max_tokens=args.new + 1, **options)
    last = time.perf_counter()
    run.prefill()
    seconds = tell("second prompt")
    print(f"prefill of {args.prompt}: {args.prompt / seconds:.1f} tokens/s")
    _, state = run.decode(run.session, None, 1)
    tell("its first token")
    jax.block_until_ready(run.decode(run.session, state, args.new))
    seconds = tell(f"{args.new} tokens more")
    print(f"decode at {args.prompt}: {args.new / seconds:.1f} tokens/s")
    held, caches = map(size_bytes, (params, run.session.cache))
    most = peak_bytes(device)
    print(
        f"weights {held / 1e9:.2f} GB, caches {caches / 1e9:.3f} GB, peak {most / 1e9:.2f} GB: "
        f"{most / (held + caches):.2f} times both"
    )


if __name__ == "__main__":
    main()
