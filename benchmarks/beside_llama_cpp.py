"""llama.cpp's speed on the same file and machine, through llama-cpp-python: rows to put beside `jaxinfer bench`.

pip install llama-cpp-python && python benchmarks/beside_llama_cpp.py model.gguf --threads 2
"""

import argparse
import random
import statistics
import time

import llama_cpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--new", type=int, default=128)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    args = parser.parse_args()
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    llm = llama_cpp.Llama(
        args.model, n_ctx=args.prompt + args.new, n_batch=2048, n_ubatch=512, verbose=False, **threads
    )
    tokens = random.Random(0).choices(range(llm.n_vocab()), k=max(args.prompt, args.new))

    def prompt() -> None:
        llm.eval(tokens[: args.prompt])

    def new() -> None:
        for token in tokens[: args.new]:
            llm.eval([token])

    print(f"llama-cpp-python {llama_cpp.__version__}, {args.threads} threads")
    for name, run, count in ((f"pp{args.prompt}", prompt, args.prompt), (f"tg{args.new}", new, args.new)):
        rates = []
        for _ in range(1 + args.repetitions):
            llm.reset()
            began = time.perf_counter()
            run()
            rates.append(count / (time.perf_counter() - began))
        print(f"| {name:<6} | {statistics.mean(rates[1:]):8.2f} ± {statistics.stdev(rates[1:]):.2f} |")


if __name__ == "__main__":
    main()
