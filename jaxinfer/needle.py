"""Needle in a haystack: is one sentence of a long text still found after an eviction?

A made-up text hides a sentence with a number at some depth, and a question about it follows. Each prompt is read once;
then every policy evicts from its own copy of the caches and answers. Answers are greedy, so a table can be made again.
"""

import copy
import csv
import io
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import batched, groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxinfer import snapkv
from jaxinfer.cache import size_bytes
from jaxinfer.generate import default_chunk, device_of, encode
from jaxinfer.layers.rope import Rope
from jaxinfer.loader import Model
from jaxinfer.presses import PRESSES, Press, SnapKV, press
from jaxinfer.sample import Sampler
from jaxinfer.session import Session
from jaxinfer.snapkv import Eviction
from jaxinfer.tokenizer import Tokenizer

FORMS = ("md", "csv")

type Progress = Callable[[int, int], None]


class Policy(NamedTuple):
    name: str
    eviction: Eviction | None = None  # None: all tokens stay


class Case(NamedTuple):
    """A prompt with a needle at `depth` of its text; a seed has the same text and needle at all depths."""

    length: int  # tokens at most
    depth: float
    seed: int
    needle: str
    number: str  # that the answer must have
    tokens: list[int]


class Answer(NamedTuple):
    """What a model said to a case under a policy."""

    policy: str
    keep: int  # tokens that a layer keeps; 0: all
    length: int
    depth: float
    seed: int
    recovered: bool
    cache_bytes: int  # of one row of the caches that answered, with the slots for the answer
    text: str


def policies(
    names: Iterable[str],
    keeps: Iterable[int],
    rope: Rope | None,
    window: int | None = None,
    kernel: int | None = None,
    *,
    one_list: bool = False,
    interleaved: bool = False,
) -> list[Policy]:
    """The full cache, then each press of PRESSES that is named with each budget.

    rope: of the layers without a window. window, kernel: for the presses that have one to be set. Votes are always one
    list.
    """
    found = [Policy("full")]
    for name, keep in product(names, keeps):
        if name not in PRESSES:
            raise ValueError(f"{name!r} is no press; known are {', '.join(PRESSES)}")
        pools, looks = issubclass(PRESSES[name], SnapKV), PRESSES[name].window > 1
        one = press(name, rope, window if looks else None, kernel if pools else None)
        eviction = Eviction(press=one, keep=keep, one_list=one_list or name == "votes", interleaved=interleaved)
        kinds = [name, *["one list"] * one_list, *["interleaved"] * interleaved]
        found.append(Policy(", ".join(kinds), eviction))
    return found


def answers(
    model: Model,
    params: Any,
    tokenizer: Tokenizer | None,
    policies: Sequence[Policy],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    seeds: int = 3,
    max_tokens: int = 16,
    chunk: int | None = None,
    batch: int = 1,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Iterator[Answer]:
    """Answers of every policy to every case: `lengths` in tokens, `depths` from 0 to 1, seeds from 0 on.

    `batch` cases of a length are read together, with as many caches. A policy that keeps all of a prompt is run as any
    other. `progress(done, total)` counts the tokens of a prompt while it is read. Raises ValueError for what cannot
    run, before anything does.
    """
    if tokenizer is None:
        raise ValueError("the file has no tokenizer, which a text with a needle needs")
    for name, value in (("seeds", seeds), ("max_tokens", max_tokens), ("batch", batch), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    for name, values in (("policies", policies), ("lengths", lengths), ("depths", depths)):
        if not values:
            raise ValueError(f"{name} is empty: there is nothing to ask")
    most = int(model.config.context) - max_tokens
    if wrong := [n for n in lengths if n > most]:
        raise ValueError(f"lengths {wrong} and {max_tokens=} exceed the context: prompts can have {most} tokens")
    each = product(lengths, range(seeds), depths)
    cases = [make(tokenizer, n, depth, seed, chat_template_kwargs) for n, seed, depth in each]
    chunk = chunk or default_chunk(device_of(params))
    return _answers(model, params, tokenizer, policies, cases, max_tokens, chunk, batch, progress)


def make(
    tokenizer: Tokenizer, length: int, depth: float, seed: int, chat_template_kwargs: dict[str, Any] | None = None
) -> Case:
    """The case of a seed: a prompt of at most `length` tokens, and less by no more than a sentence."""
    if not 0 <= depth <= 1:
        raise ValueError(f"{depth=} must be from 0 to 1")
    random = np.random.default_rng(seed)
    name, number = f"{_one(random, COLOURS)} {_one(random, PLACES)}", str(random.integers(10_000, 100_000))
    needle = f"The secret number of the {name} is {number}."
    filler = sentences(random, length // 8 + 1)  # each has more words than that

    def tokens(*sentences: str) -> int:
        return len(tokenizer.encode(" ".join(sentences), add_special=False))

    def prompt(*sentences: str) -> list[int]:
        text = f"{' '.join(sentences)}\n\nWhat is the secret number of the {name}?"
        if tokenizer.chat_template is None:
            return encode(tokenizer, f"{text} The secret number of the {name} is", tokenizer.vocab_size)
        message = [{"role": "user", "content": text}]
        return encode(tokenizer, message, tokenizer.vocab_size, chat_template_kwargs)

    frame = len(prompt(needle)) - tokens(needle)
    count = bisect_right(range(len(filler)), length - frame, key=lambda n: tokens(needle, *filler[:n])) - 1
    if count < 0:
        raise ValueError(f"{length=} is less than the {len(prompt(needle))} tokens of needle and question alone")
    filler = filler[:count]
    at = bisect_left(range(count), depth * tokens(*filler), key=lambda n: tokens(*filler[:n]))
    return Case(length, depth, seed, needle, number, prompt(*filler[:at], needle, *filler[at:]))


def recovered(number: str, text: str) -> bool:
    """Whether a text has the number as one of its own, commas between its digits or none."""
    return re.search(rf"(?<!\d){number}(?!\d)", text.replace(",", "")) is not None


def _answers(
    model: Model,
    params: Any,
    tokenizer: Tokenizer,
    policies: Sequence[Policy],
    cases: Sequence[Case],
    max_tokens: int,
    chunk: int,
    batch: int,
    progress: Progress | None,
) -> Iterator[Answer]:
    window = max((one.eviction.press.window for one in policies if one.eviction), default=0)
    observing = Eviction(press=Press(window=window), keep=max(window, 1))  # it is never asked for scores
    greedy, stops = Sampler.greedy(), np.array(tokenizer.eog_ids or [-1], np.int32)

    def read(group: Sequence[Case], eviction: Eviction) -> Session:
        ctx = group[0].length + max_tokens
        session = Session(model, params, ctx=ctx, chunk=chunk, batch=len(group), eviction=eviction)
        session.extend([case.tokens for case in group], progress)
        return session

    for group in (part for _, same in groupby(cases, lambda case: case.length) for part in batched(same, batch)):
        whole = read(group, observing)
        for name, eviction in policies:
            session = _under(whole, eviction)
            if eviction and eviction.interleaved and session.evicting:
                session = read(group, eviction)
            session = session.evicted(max_tokens)
            out, _ = session.decode(session.start(greedy), max_tokens, sampler=greedy, stops=stops, burst=max_tokens)
            size = size_bytes(session.cache) // len(group)
            for case, ids in zip(group, out, strict=True):
                text = tokenizer.decode(ids[ids >= 0].tolist()).strip()
                found = recovered(case.number, text)
                yield Answer(name, session.keep, case.length, case.depth, case.seed, found, size, text)


def _under(session: Session, eviction: Eviction | None) -> Session:
    """The session, with its very arrays, as if it had been read for this eviction."""
    out = copy.copy(session)
    out.eviction = eviction
    out.keep = eviction.budget(session.ctx, size_bytes(snapkv.unobserved(session.cache))) if eviction else 0
    return out


def table(answers: Iterable[Answer], form: str = "md") -> Iterator[str]:
    """The lines of a report in one of FORMS: "md" counts the seeds recovered at each depth, "csv" has every answer."""
    match form:
        case "md":
            yield from _markdown(list(answers))
        case "csv":
            for row in (Answer._fields, *answers):
                line = io.StringIO()
                csv.writer(line, lineterminator="").writerow(row)
                yield line.getvalue()
        case _:
            raise ValueError(f"{form!r} is not a form of output; known are {', '.join(FORMS)}")


def _markdown(answers: Sequence[Answer]) -> Iterator[str]:
    depths = sorted({one.depth for one in answers})
    yield f"| policy | keep | tokens | cache | {' | '.join(f'{depth:g}' for depth in depths)} | all |"
    yield f"| --- | ---: | ---: | ---: |{' ---: |' * (len(depths) + 1)}"
    for (policy, keep, length), rows in _grouped(answers, "policy", "keep", "length").items():
        at = [[one for one in rows if one.depth == depth] for depth in depths]
        size = f"{rows[0].cache_bytes / 1e6:.1f} MB"
        found = " | ".join(f"{sum(one.recovered for one in some)}/{len(some)}" for some in [*at, rows])
        yield f"| {policy} | {keep or 'all'} | {length} | {size} | {found} |"


def plot(answers: Iterable[Answer], path: str | Path) -> None:
    """Draws the share recovered by budget, a line for each press, and a map of depth and length for each policy.

    The file's type is that of its name, such as .png. Needs matplotlib, which `jaxinfer[plot]` installs.
    """
    try:
        from matplotlib import colormaps  # pyright: ignore[reportMissingImports] (optional)
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"{path}: a plot needs matplotlib: pip install 'jaxinfer[plot]'") from None
    answers = list(answers)
    maps, columns = _grouped(answers, "policy", "keep"), 5
    lengths, depths = sorted({one.length for one in answers}), sorted({one.depth for one in answers})
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(12, 4 + 2 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[4] + [2] * rows)

    lines = figure.add_subplot(grid[0, :])
    lines.set(xlabel="tokens kept", ylabel="needles found", ylim=(-0.05, 1.05), xscale="log")
    lines.set_prop_cycle(color=colormaps["tab20"](range(20)))
    for (policy,), some in _grouped(answers, "policy").items():
        share = {keep: _share(rows) for (keep,), rows in sorted(_grouped(some, "keep").items())}
        if 0 in share:
            lines.axhline(share[0], label=policy, color="black", linestyle="--")
        else:
            lines.plot([*share], [*share.values()], label=policy, marker="o")
    keeps = sorted({one.keep for one in answers} - {0})
    lines.set_xticks(keeps, map(str, keeps))
    lines.minorticks_off()
    lines.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    for i, ((policy, keep), some) in enumerate(maps.items()):
        axes = figure.add_subplot(grid[1 + i // columns, i % columns])
        share = {at: _share(rows) for at, rows in _grouped(some, "depth", "length").items()}
        image = [[share.get((depth, length), np.nan) for length in lengths] for depth in depths]
        axes.imshow(image, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{policy} {keep or ''}", fontsize="small")
        axes.set_xticks(range(len(lengths)), map(str, lengths), fontsize="small")
        axes.set_yticks(range(len(depths)), map(str, depths), fontsize="small")
    figure.savefig(path)


def _grouped(answers: Iterable[Answer], *fields: str) -> dict[tuple[Any, ...], list[Answer]]:
    found: dict[tuple[Any, ...], list[Answer]] = {}
    for one in answers:
        found.setdefault(tuple(getattr(one, field) for field in fields), []).append(one)
    return found


def _share(answers: Sequence[Answer]) -> float:
    return sum(one.recovered for one in answers) / len(answers)


def sentences(random: np.random.Generator, count: int) -> list[str]:
    """So many sentences without digits, no two alike."""
    found: dict[str, None] = {}
    while len(found) < count:
        when, who, did, what, where, why = (_one(random, words) for words in (WHEN, WHO, DID, WHAT, WHERE, WHY))
        match random.integers(3):
            case 0:
                text = f"{when} {who} {did} {what} {where}."
            case 1:
                text = f"{who} {did} {what} {where}, {why}."
            case _:
                text = f"{where} {who} {did} {what}, and {when} everybody talked about it."
        found[text[0].upper() + text[1:]] = None
    return list(found)


def _one(random: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(random.integers(len(words)))]


COLOURS = ("blue", "green", "silver", "red", "golden", "white", "grey", "purple")
PLACES = ("harbour", "lighthouse", "orchard", "library", "station", "tower", "bridge", "garden")
WHEN = (
    "on a rainy morning",
    "shortly before noon",
    "in the last week of spring",
    "when the market had closed",
    "after a long winter",
    "on the evening of the fair",
    "at the first light of day",
    "during the summer holidays",
    "once the snow had melted",
    "on the way back from school",
    "in the quiet hours after lunch",
    "long before the road was built",
)
WHO = (
    "the younger carpenter",
    "a teacher from the next valley",
    "our neighbour's aunt",
    "the oldest of the fishermen",
    "a student of botany",
    "the keeper of the inn",
    "two travelling musicians",
    "the baker's apprentice",
    "a retired captain",
    "the woman with the bicycle",
    "a family of potters",
    "the doctor's brother",
)
DID = (
    "repaired",
    "painted",
    "borrowed",
    "carried away",
    "measured",
    "forgot",
    "sold",
    "photographed",
    "described",
    "cleaned",
    "hid",
    "searched for",
)
WHAT = (
    "a wooden gate",
    "an old map of the coast",
    "three baskets of apples",
    "a violin without strings",
    "the heavy kitchen table",
    "a jar of dark honey",
    "the broken weather vane",
    "a pair of leather boots",
    "several pages of a diary",
    "the smallest of the boats",
    "a box of coloured glass",
    "the curtains of the theatre",
)
WHERE = (
    "behind the mill",
    "near the edge of the forest",
    "in a narrow street",
    "under the roof of the barn",
    "beside the slow river",
    "at the top of the hill",
    "in the hall of the old school",
    "between the two wells",
    "on the far side of the meadow",
    "in front of the post office",
    "along the stone wall",
    "next to the empty stable",
)
WHY = (
    "because nobody else had asked",
    "although the weather was turning",
    "which pleased the children",
    "hoping to be home by dark",
    "and the dogs slept through it all",
    "as the letter had promised",
    "without a word to the others",
    "since the price had fallen again",
    "while the kettle was still warm",
    "so that the guests would notice",
    "as if it were the simplest thing",
    "and was thanked for it later",
)
