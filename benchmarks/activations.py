"""Perplexity with activations of 15 and of 8 bits, of the model of a run file.

python benchmarks/activations.py configs/quickstart.toml --windows 24
"""

import argparse
import tomllib
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

from jaxinfer import HOPPER, HOPPER_INT8, load
from jaxinfer.perplexity import perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--windows", type=int, default=24, help="of --ctx tokens")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 8], help="of the kernel for many rows, for few")
    args = parser.parse_args()
    run = tomllib.loads(args.config.read_text())
    model, params, tokenizer = load(run["model"], sha256=run["sha256"], ops=HOPPER)
    assert tokenizer is not None
    text = "\n".join(text for _, text in sorted(topics.items()))  # Python's language reference, as help() has it
    ids = tokenizer.encode(text[: args.windows * args.ctx * 8])[: args.windows * args.ctx]
    print("| activations | chunk | perplexity |\n| --- | ---: | ---: |")
    for chunk in args.chunks:
        for bits, ops in ((15, HOPPER), (8, HOPPER_INT8)):
            some = replace(model, ops=ops)
            *_, last = perplexity(some, params, ids, ctx=args.ctx, chunk=chunk)
            print(f"| {bits} bits | {chunk} | {last.perplexity:.4f} ± {last.error:.2f} |", flush=True)


if __name__ == "__main__":
    main()
