"""Where the time of a start goes: import, load, compile, first token; run it twice to see what the caches are worth.

python benchmarks/start.py model.gguf --prompt 2048 --compile-cache /tmp/cache
"""

import argparse
import time

BEGAN = time.perf_counter()

import jax  # noqa: E402

from jaxinfer import Sampler, load  # noqa: E402
from jaxinfer.generate import plan  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-p", "--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--compile-cache", default="")
    args = parser.parse_args()
    if args.compile_cache:
        jax.config.update("jax_compilation_cache_dir", args.compile_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    last = BEGAN

    def tell(what: str) -> None:
        nonlocal last
        now = time.perf_counter()
        print(f"{what:<40}{now - last:7.2f} s{now - BEGAN:9.2f} s since the start", flush=True)
        last = now

    device = jax.devices()[0]
    tell(f"import, {device.device_kind}")
    model, params, _ = load(args.model)
    tell("load")
    run = plan(model, params, None, [[0] * args.prompt], max_tokens=128, sampler=Sampler.greedy())
    run.compile(lambda program, seconds: tell(f"compile {program}") if seconds is not None else None)
    run.decode(run.prefill(), 1)
    tell("first token")
    run.decode(run.prefill(), 1)
    tell("first token of a second prompt")


if __name__ == "__main__":
    main()
