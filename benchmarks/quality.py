"""What evictions cost: needles found and perplexity of the model of a run file, with each press.

python benchmarks/quality.py configs/quickstart.toml --csv needles.csv --plot needles.png
"""

import argparse
import csv
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import jax

from jaxinfer import load
from jaxinfer.needle import Answer, Policy, answers, plot, policies, table
from jaxinfer.perplexity import perplexity
from jaxinfer.presses import PRESSES, ExpectedAttention, PyramidKV, SnapKV
from jaxinfer.snapkv import Eviction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 1900], help="of prompts")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.05, 0.25, 0.5, 0.75, 0.95])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--presses", nargs="*", default=[name for name in PRESSES if name != "snapkv"], help="others")
    parser.add_argument("--keeps", type=int, nargs="+", default=[128, 256, 512, 1024], help="budgets of SnapKV")
    parser.add_argument("--others", type=int, nargs="+", default=[256, 512], help="budgets of the other presses")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--batch", type=int, default=15, help="prompts that are read together")
    parser.add_argument("--windows", type=int, default=6, help="of 1024 tokens, for perplexity; 0: none")
    parser.add_argument("--csv", type=Path, help="where the answers go")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--compile-cache")
    args = parser.parse_args()
    if args.compile_cache:
        jax.config.update("jax_compilation_cache_dir", args.compile_cache)
    run = tomllib.loads(args.config.read_text())
    model, params, tokenizer = load(run["model"], sha256=run["sha256"])
    assert tokenizer is not None
    rope = dict(model.config.mixers)["full"].rope

    def kinds(keeps: Sequence[int], others: Sequence[int], most: int) -> list[Policy]:
        """Those that keep fewer than `most` tokens: others are the full cache."""
        found = policies(["snapkv"], keeps, rope, args.window)
        for keep in others:
            wide = Eviction(press=SnapKV(window=args.window, kernel=13), keep=keep)
            found.append(Policy("snapkv, kernel 13", wide))
        for one in policies(args.presses, others, rope, args.window):
            if one.eviction and isinstance(one.eviction.press, ExpectedAttention):
                press = replace(one.eviction.press, window=128)  # a mean and a covariance take more queries
                one = one._replace(eviction=replace(one.eviction, press=press))
            if one.eviction and isinstance(one.eviction.press, PyramidKV):
                budgets = one.eviction.press.budgets(one.eviction.keep or 0, most, model.config.layers)
                one = one if len(set(budgets)) > 1 else Policy("full")  # it would be SnapKV
            found.append(one)
        found += policies(["snapkv"], others[:1], rope, args.window, interleaved=True)
        return [Policy("full"), *(one for one in found if one.eviction and (one.eviction.keep or 0) < most)]

    def needles() -> Iterator[Answer]:
        for length in args.lengths:
            options = {"depths": args.depths, "seeds": args.seeds, "chunk": args.chunk, "batch": args.batch}
            some = kinds(args.keeps, args.others, length)
            yield from answers(model, params, tokenizer, some, lengths=[length], **options)

    found = []
    with open(args.csv or "/dev/null", "w") as file:
        rows = csv.writer(file)
        rows.writerow(Answer._fields)
        for one in needles():
            found.append(one)
            rows.writerow(one)
            file.flush()
    if found:
        print("\n".join(table(found)), flush=True)
    if args.plot and found:
        plot(found, args.plot)

    if args.windows:
        text = "\n".join(text for _, text in sorted(topics.items()))  # Python's language reference, as help() has it
        ids = tokenizer.encode(text[: args.windows * 8192])[: args.windows * 1024]
        print("\n| policy | keep | perplexity |\n| --- | ---: | ---: |")
        for name, eviction in kinds([64, 128, 256], [128], 512):
            *_, last = perplexity(model, params, ids, ctx=1024, chunk=args.chunk, eviction=eviction)
            print(
                f"| {name} | {eviction.keep if eviction else 'all'} | {last.perplexity:.2f} ± {last.error:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
