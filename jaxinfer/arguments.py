"""The command line's arguments: one table for flags and for the keys of run files."""

import argparse
import difflib
import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple, NoReturn

from jaxinfer import bench, bench_attention, bench_matmul, bench_moe, config, hub, needle
from jaxinfer.presses import PRESSES

DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "gpu")
SWITCH = ("on", "off")
AUTO = "auto"
# An argument on the command line takes its own place in a run file, and that of what belongs to it.
REPLACED = {"prompt": {"file"}, "file": {"prompt"}, "model": {"sha256"}}

type Given = dict[str, Any]  # the arguments that were given; what was not is left to the functions' own defaults


@dataclass(frozen=True)
class Option:
    """An argument: flags for argparse, the last one's name as the key in run files, and the type of its value there."""

    flags: str
    type: Any  # str, int, float, bool, dict, list, or a union; None: not in run files
    help: str
    more: dict[str, Any] = field(default_factory=dict)  # argparse's settings

    @property
    def flag(self) -> str:
        return self.flags.split()[-1]

    @property
    def name(self) -> str:
        return self.flag.lstrip("-").replace("-", "_")

    def add(self, parser: argparse.ArgumentParser) -> None:
        settings: dict[str, Any] = {"dest": self.name, "default": argparse.SUPPRESS, "help": self.help}
        if self.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif self.type is list and "type" not in self.more:
            settings["action"] = "append"
        elif self.type in (int, float):
            settings["type"] = self.type
        parser.add_argument(*self.flags.split(), **settings | self.more)

    def arguments(self, value: Any) -> list[str]:
        """A value of a run file as it would be on the command line."""
        if isinstance(value, bool):
            return [self.flag if value else self.flag.replace("--", "--no-", 1)]
        if isinstance(value, dict):
            return [f"{self.flag}={json.dumps(value, default=str)}"]
        if not isinstance(value, list):
            return [f"{self.flag}={value}"]
        if "type" in self.more:
            return [f"{self.flag}={','.join(map(str, value))}"]
        return [f"{self.flag}={one}" for one in value]


def _numbers(text: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 512,2048") from None


def _fractions(text: str) -> list[float]:
    try:
        return [float(n) for n in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.1,0.5") from None


def _names(text: str) -> list[str]:
    return text.split(",")


def _count(text: str) -> int | str:
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {AUTO}") from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object such as {{"reasoning_effort": "high"}}')
    return value


def _dtypes(text: str) -> list[str]:
    if wrong := set(text.split(",")) - set(DTYPES):
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)} is none of {', '.join(DTYPES)}")
    return text.split(",")


PROCESS = (
    Option("--device", str, "where to run; by default a GPU if there is one", {"choices": DEVICES}),
    Option("--compile-cache", str, "folder of the compilation cache; '' for none", {"metavar": "DIR"}),
    Option("--no-compile-cache", None, "none", {"action": "store_const", "const": "", "dest": "compile_cache"}),
)
LOAD = (
    Option("-m --model", str, f"what to run: {hub.FORMS}"),
    Option("--sha256", str, "checksum that the model's file must have"),
    Option("--expand", bool, "turn packed weights into float32 at load; by default on a CPU where memory allows"),
    *PROCESS,
)
DTYPE = Option("--dtype", str, "type of activations: float32 by default on a CPU, else bfloat16", {"choices": DTYPES})
CHUNK = Option("-b --chunk", int, "tokens prefilled at a time")
CTX = Option(
    "-c --ctx",
    int | str,
    "most tokens of prompt and answer, or auto for what fits; by default what the model was trained for",
    {"type": _count},
)
FIT = Option("--fit", str, "the longest context for a GPU of this memory, such as 12GiB, and what takes it")
CACHE = Option("-ct --cache-dtype", str, "type of keys and values; by default the activations'", {"choices": DTYPES})
EVICT = (
    Option(
        "--snapkv-keep --keep",
        int | str,
        "tokens of a prompt that a layer keeps for the answer; auto: a quarter of the context, from 1024 to 4096; "
        "0, the default: all",
        {"type": _count},
    ),
    Option("--press", str, "what is kept: by the scores of this press; snapkv by default", {"choices": list(PRESSES)}),
    Option("--snapkv-window --window", int, "last tokens of the prompt whose queries the press looks at"),
    Option("--kernel", int, "neighbours over which SnapKV and its kin pool their scores; odd"),
    Option("--one-list", bool, "keep the same tokens in all layers and heads"),
    Option("--interleaved", bool, "evict after every chunk of the prompt: less memory, another result"),
)
SAVE = Option("--save-session", str, "file to save what was read to, at the end or at Ctrl-C", {"metavar": "FILE"})
SESSION = (Option("--session", str, "file with a session to go on from", {"metavar": "FILE"}), SAVE)
TEXT = (
    Option("-p --prompt", str, "the prompt; - reads it from stdin"),
    Option("-f --file", str, "file with the prompt"),
)
ANSWER = (
    Option("-n --max-tokens", int, "most tokens of an answer"),
    Option("--burst", int, "tokens decoded between two looks at them; the text stays the same"),
    Option("--stop", list, "text that ends the answer; may be repeated"),
    Option("--ignore-eos", bool, "go on after an end token"),
    Option("-sys --system", str, "system message"),
    Option("-rea --reasoning", str, "think before answering, where the chat template can do both", {"choices": SWITCH}),
    Option("--chat-template-kwargs", dict, "JSON object of variables for the chat template", {"type": _object}),
    Option("-s --seed", int, "seed of the random numbers"),
    Option("--temp --temperature", float, "0 takes the most likely token always"),
    Option("--top-k", int, "candidates that are kept; 0 for all"),
    Option("--top-p", float, "probability of the candidates that are kept; 1 for all"),
    Option("--min-p", float, "least probability of a candidate against the best one; 0 for all"),
    Option("--repeat-penalty", float, "divides the logits of tokens seen; 1 is off"),
    Option("--presence-penalty", float, "taken from the logits of tokens seen; 0 is off"),
    Option("--frequency-penalty", float, "taken from them for each time seen; 0 is off"),
    Option("--repeat-last-n", int, "tokens that the penalties look back"),
)
TEMPLATE = Option("--chat-template", bool, "put the prompt into the file's chat template as a user's message")
BENCH = (
    Option("-p --n-prompt", list, "lengths of prompts: 512,2048", {"type": _numbers}),
    Option("-n --n-gen", list, "numbers of tokens to generate", {"type": _numbers}),
    Option("-d --n-depth", list, "numbers of tokens in the cache before", {"type": _numbers}),
    Option("-b --chunk", int, "tokens prefilled at a time; a list on the command line", {"type": _numbers}),
    Option("--dtype", str, "types of activations; a list on the command line", {"type": _dtypes}),
    Option("--burst", int, "tokens that one call decodes"),
    Option("-r --repetitions", int, "runs of each test, after one that does not count"),
    Option("-o --output", str, "form of the table", {"choices": bench.FORMS}),
    Option("--compile", bool, "shows what compiling these programs and their kernels takes, and no speeds"),
)
TIMED = (
    Option("-r --repetitions", int, "samples of each, after those that do not count"),
    Option("--compile", bool, "also time lowering and compiling, without the compilation cache"),
    Option("--csv", str, "file for all figures", {"metavar": "FILE"}),
)
ATTENTION = (
    Option(
        "--shapes",
        list,
        f"heads: {','.join(bench_attention.SHAPES)}, or heads/KV heads/width[/window] such as 32/8/128/1024",
        {"type": _names},
    ),
    Option("--works", list, f"what is computed: {','.join(bench_attention.WORKS)}", {"type": _names}),
    Option("--lengths", list, "tokens of texts: 512,1024", {"type": _numbers}),
    CHUNK,
    Option("--tokens", list, "tokens decoded at once: 1,4", {"type": _numbers}),
    Option("--batch", list, "texts at once: 1,8", {"type": _numbers}),
    Option("--backends", list, f"what computes it: {','.join(bench_attention.BACKENDS)}", {"type": _names}),
    *TIMED,
    Option("--plot", str, "file for a picture of speeds; needs jaxinfer[plot]", {"metavar": "FILE"}),
)
MATMUL = (
    Option("--formats", list, f"of weights: {','.join(bench_matmul.KINDS)}; by default all", {"type": _names}),
    Option(
        "--shapes",
        list,
        f"of weights: {','.join(bench_matmul.SHAPES)}, by default all, or OUTxIN such as 12288x4096",
        {"type": _names},
    ),
    Option("--rows", list, f"of activations; by default {','.join(map(str, bench_matmul.ROWS))}", {"type": _numbers}),
    Option("--backends", list, f"what computes it: {','.join(bench_matmul.BACKENDS)}", {"type": _names}),
    *TIMED,
)
MOE = (
    Option(
        "--shapes",
        list,
        f"experts, those of a token, its width and theirs: {','.join(bench_moe.SHAPES)}, by default all, or E/A/D/F "
        "such as 128/8/2048/768",
        {"type": _names},
    ),
    Option("--works", list, f"what is computed: {','.join(bench_moe.WORKS)}", {"type": _names}),
    Option("--formats", list, f"of weights: {','.join(bench_moe.KINDS)}; by default all", {"type": _names}),
    Option("--skews", list, f"how tokens choose: {','.join(bench_moe.SKEWS)}", {"type": _names}),
    Option("--tokens", list, f"by default {','.join(map(str, bench_moe.TOKENS))}", {"type": _numbers}),
    Option("--backends", list, f"what computes it: {','.join(bench_moe.BACKENDS)}", {"type": _names}),
    *TIMED,
)


RUN = (*LOAD, DTYPE, CHUNK, CTX, CACHE, *EVICT)


WINDOW, KERNEL, ONE_LIST, INTERLEAVED = EVICT[2:]
NEEDLE = (
    Option("--lengths", list, "tokens of prompts: 512,1024", {"type": _numbers}),
    Option("--depths", list, "where the needle is, from 0 to 1: 0.1,0.5,0.9", {"type": _fractions}),
    Option("--seeds", int, "prompts of each length"),
    Option("--snapkv-keep --keep", list, "tokens that a layer keeps, beside all: 256,1024", {"type": _numbers}),
    Option("--press", list, f"presses, with commas: {','.join(PRESSES)}", {"type": _names}),
    WINDOW,
    KERNEL,
    ONE_LIST,
    INTERLEAVED,
    Option("-n --max-tokens", int, "most tokens of an answer"),
    Option("--batch", int, "prompts read together"),
    Option("-o --output", str, "form of the table", {"choices": needle.FORMS}),
    Option("--plot", str, "file for a picture of it; needs jaxinfer[plot]", {"metavar": "FILE"}),
)


class Command(NamedTuple):
    help: str
    options: tuple[Option, ...]


COMMANDS = {
    "generate": Command("answers one prompt", (*RUN, *TEXT, TEMPLATE, *SESSION, *ANSWER)),
    "chat": Command("answers line by line, and remembers", (*RUN, *ANSWER)),
    "prefill": Command("reads a prompt into a session's file, for questions to come", (*RUN, *TEXT, TEMPLATE, SAVE)),
    "bench": Command("measures speed, as llama-bench does", (*LOAD, *BENCH)),
    "bench attention": Command("measures attention alone, ours and others'", (*PROCESS, DTYPE, *ATTENTION)),
    "bench matmul": Command("measures products with packed weights alone", (*PROCESS, DTYPE, *MATMUL)),
    "bench moe": Command("measures experts alone: products, their sum, the choice", (*PROCESS, DTYPE, *MOE)),
    "perplexity": Command("scores a text, as llama-perplexity does", (*LOAD, DTYPE, CHUNK, CTX, *EVICT, *TEXT)),
    "eval needle": Command(
        "asks for a sentence hidden in long texts, by what is evicted", (*LOAD, DTYPE, CHUNK, *NEEDLE)
    ),
    "info": Command("shows what a file holds and how it will run", (*LOAD, DTYPE, CTX, FIT)),
    "explain": Command("shows what each layer keeps and how it is computed", (*LOAD, DTYPE, CHUNK, CTX)),
}
USAGE = "\n".join(
    [
        "usage: jaxinfer [generate] --model MODEL --prompt TEXT [--max-tokens N ...]",
        "       jaxinfer run CONFIG.toml [flags that override it]",
        "       jaxinfer COMMAND --help",
        "",
        *(f"  {name:<16}{command.help}" for name, command in COMMANDS.items()),
        f"  {'run':<16}runs the command of a TOML file whose keys are the names of its flags",
    ]
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see jaxinfer {self.prog.split()[-1]} --help)")


def read(argv: list[str]) -> tuple[str, Given]:
    """The command that a command line stands for, and its arguments; ValueError says what is wrong with it."""
    if not argv or argv[0] in ("-h", "--help") or argv[:2] in (["run", "-h"], ["run", "--help"]):
        print(USAGE)
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"jaxinfer {version('jaxinfer')}, jax {version('jax')}")
        sys.exit(0)
    if argv[0] == "run":
        return _run_file(argv[1:])
    if argv[0].startswith("-"):
        return "generate", _parse("generate", argv)
    words = 2 if argv[0] == "eval" or " ".join(argv[:2]) in COMMANDS else 1
    command = _command(" ".join(argv[:words]))
    return command, _parse(command, argv[words:])


def _command(name: str) -> str:
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, [*COMMANDS, "run"], n=1, cutoff=0)[0]
        raise ValueError(f"{name!r} is no command; the nearest one is {nearest!r}")
    return name


def _run_file(argv: list[str]) -> tuple[str, Given]:
    if not argv or argv[0].startswith("-"):
        raise ValueError("run needs the path of a TOML file first: jaxinfer run CONFIG.toml")
    allowed: dict[str, Any] = {"command": str}
    for option in (o for c in COMMANDS.values() for o in c.options if o.type):
        allowed[option.name] = allowed.get(option.name, option.type) | option.type
    command = _command(config.read(argv[0], allowed).get("command", "generate"))
    options = {o.name: o for o in COMMANDS[command].options}
    values = config.read(argv[0], {"command": str} | {name: o.type for name, o in options.items() if o.type})
    values.pop("command", None)
    try:
        written = _parse(command, [text for name, value in values.items() for text in options[name].arguments(value)])
    except ValueError as error:
        raise ValueError(f"{argv[0]}: {error}") from None
    given = _parse(command, argv[1:])
    replaced = {other for name in given for other in REPLACED.get(name, ())}
    return command, {name: value for name, value in written.items() if name not in replaced} | given


def _parse(command: str, argv: list[str]) -> Given:
    parser = _Parser(f"jaxinfer {command}", description=COMMANDS[command].help, allow_abbrev=False)
    for option in COMMANDS[command].options:
        option.add(parser)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [f for option in COMMANDS[command].options for f in option.flags.split()]
        nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0)[0]
        hint = f"; the nearest flag is {nearest}" if flag.startswith("-") else ""
        raise ValueError(f"{command} has no argument {flag!r}{hint}")
    return vars(given)
