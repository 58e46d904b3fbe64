"""The memory of a run, from shapes alone: what it takes, whether it fits, and the longest context that does.

Weights and caches are exact. The workspace of the two programs is an estimate of what XLA lays out for them: of every
layer the buffers that are live together at its widest moment. The largest sum counts, as a layer's buffers are gone
when the next one begins. `tests/test_memory.py` holds it against the compiler's own `memory_analysis()`.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxinfer import engine
from jaxinfer.cache import KVCache, is_full, size_bytes
from jaxinfer.decoder import last_of
from jaxinfer.layers.attention import AttentionParams, AttentionSpec
from jaxinfer.layers.delta import DeltaParams, DeltaSpec, DeltaState
from jaxinfer.layers.linear import Linear
from jaxinfer.layers.mlp import MlpParams
from jaxinfer.layers.moe import MoeParams
from jaxinfer.loader import Model, Source
from jaxinfer.ops.attention import BLOCK, TILE, attention_ampere, attention_blocks, attention_hopper
from jaxinfer.ops.delta import CHUNK
from jaxinfer.ops.delta import FEW as FEW_STEPS
from jaxinfer.ops.experts import beyond as experts_beyond
from jaxinfer.ops.experts import experts_hopper, layout_tile, tile_of
from jaxinfer.ops.matmul import FEW, MOST, matmul_gpu, matmul_hopper
from jaxinfer.pallas.bounds import beyond
from jaxinfer.pallas.flash_mma import FEW as KEYS_IN_PARTS
from jaxinfer.pallas.flash_mma import blocks_for
from jaxinfer.quants import FORMATS, PLAIN, Packed
from jaxinfer.snapkv import Eviction
from jaxinfer.tree import Device

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
RESERVE = 2**29  # of a device's memory, for what is no array of ours: programs, libraries, gaps between buffers
PARTS = AttentionParams | DeltaParams | MlpParams | MoeParams


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The bytes of one run. Its programs run one after the other, so the larger of their workspaces counts."""

    context: int  # tokens of prompt and answer
    chunk: int
    weights: int
    caches: tuple[tuple[str, int], ...]  # by kind of layer and slots
    observed: int  # the recent queries that a press looks at
    prefill: int  # workspace
    decode: int  # workspace
    compacting: int = 0  # beside weights and caches while they are made smaller
    compacted: int | None = None  # caches from then on

    @property
    def cached(self) -> int:
        return sum(size for _, size in self.caches) + self.observed

    @property
    def total(self) -> int:
        """The peak: of prefill, compaction or decode."""
        after = self.cached if self.compacted is None else self.compacted
        return self.weights + max(self.cached + max(self.prefill, self.compacting), after + self.decode)

    @property
    def lines(self) -> tuple[tuple[str, int], ...]:
        found = [("weights", self.weights), *((f"cache, {kind}", size) for kind, size in self.caches)]
        found += [("recent queries", self.observed)] if self.observed else []
        found += [("workspace of prefill", self.prefill)]
        if self.compacted is not None:
            found += [("workspace of eviction", self.compacting), ("caches after eviction", self.compacted)]
        return (*found, ("workspace of decode", self.decode), (f"peak at {self.context} tokens", self.total))

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines)
        return "\n".join(f"{name:<{width}}  {show(size):>11}" for name, size in self.lines)


def show(size: int) -> str:
    unit = "GiB" if size >= 2**30 else "MiB"
    return f"{size / UNITS[unit]:.2f} {unit}"


def parse_size(text: str) -> int:
    """Bytes: `12GiB`, `24 GB`, `900MiB` or a plain number. Raises ValueError for anything else, and for nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    units = {name.lower(): size for name, size in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is no size in memory: give a number with {', '.join(filter(None, UNITS))} or alone")
    size = int(float(match[1]) * units[match[2].lower()])
    if size < 1:
        raise ValueError(f"{text!r} is less than one byte")
    return size


def plan(
    model: Model,
    params: Any,
    context: int,
    *,
    chunk: int,
    batch: int = 1,
    expand: bool = False,
    dtype: DTypeLike | None = None,
    observe: int = 0,
    keep: int = 0,
    room: int = 0,
    interleaved: bool = False,
) -> Plan:
    """What `batch` rows of up to `context` tokens take, read `chunk` tokens at a time.

    `params` are arrays, or what `describe` gives, and then `expand` is as there. `dtype` is that of the caches. With
    `keep`, layers without a window are compacted to so many slots after the prompt, and `room` for new tokens; with
    `interleaved` after every chunk, so that they never hold more than both and a chunk.
    """
    for name, value, least in (("context", context, 1), ("chunk", chunk, 1), ("batch", batch, 1), ("keep", keep, 0)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    params = placed(params, expand)
    slots = engine.slots_for(context)
    if keep and interleaved:
        slots = min(slots, engine.slots_for(keep + max(chunk, room)))
    cache = jax.eval_shape(lambda: model.init_cache(params, batch, slots, chunk=chunk, dtype=dtype, observe=observe))
    kinds: Counter[str] = Counter()
    for layer, stack in zip(params.layers.stacks, cache, strict=True):
        kinds[_kind(layer.kind, stack, slots)] += size_bytes(stack) - _observed(stack)
    full = list(filter(is_full, cache))
    shrinks = 0 < keep + room < slots and not interleaved
    new = [_compacted(one, keep + room) if shrinks else size_bytes(one) for one in full]
    return Plan(
        context=context,
        chunk=chunk,
        weights=size_bytes(params),
        caches=tuple(kinds.items()),
        observed=sum(map(_observed, full)),
        prefill=_workspace(model, params, cache, batch, chunk),
        decode=_workspace(model, params, cache, batch, 1),
        compacting=_compacting(full, new) if shrinks else 0,
        compacted=size_bytes(cache) - size_bytes(full) + sum(new) if shrinks else None,
    )


def largest_context(plan_of: Callable[[int], Plan], limit: int, most: int) -> int:
    """The longest context, in whole steps of a cache's slots or `most`, whose plan fits into `limit` bytes; 0: none.

    Every part of a plan grows with the context or stays, so that halving finds it.
    """
    low, high = 0, -(-most // engine.SLOTS)  # in steps: `low` fits, what is over `high` need not be looked at
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan_of(middle * engine.SLOTS).total <= limit else (low, middle - 1)
    return min(low * engine.SLOTS, most)


def available_bytes(device: Device) -> int:
    """What a device can give to a run, its weights included; on a CPU, before they are loaded."""
    if stats := device.memory_stats():
        return stats["bytes_limit"] - RESERVE
    try:
        with open("/proc/meminfo") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable"))
        return int(found.split()[1]) * 2**10
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check(found: Plan, limit: int, largest: int) -> None:
    """Raises ValueError with the arithmetic where a plan needs more than `limit` bytes.

    `largest` is the context that would fit, see `largest_context`.
    """
    if found.total <= limit:
        return
    need = {"weights": found.weights, "caches": found.cached, "workspace": found.total - found.weights - found.cached}
    words = " + ".join(f"{name} {show(size)}" for name, size in need.items())
    fits = f"the largest context that fits is {largest:,} tokens" if largest else "not even the shortest context fits"
    raise ValueError(
        f"{words} = {show(found.total)} for {found.context:,} tokens, but there are {show(limit)}: {fits}. A chunk "
        f"below {found.chunk:,} lowers the workspace; eviction lowers the caches before the prompt's end only if it is "
        "interleaved"
    )


def require(plan_of: Callable[[int], Plan], context: int, limit: int, most: int) -> None:
    """Raises ValueError where a context does not fit, see `check`; `most` is the longest one to propose."""
    found = plan_of(context)
    if found.total > limit:
        check(found, limit, largest_context(plan_of, limit, most))


def limit_bytes(params: Any, device: Device) -> int:
    """What a device can give to a run whose weights are on it already."""
    return available_bytes(device) + (0 if device.memory_stats() else size_bytes(params))


def of_eviction(eviction: Eviction | None) -> dict[str, Any]:
    """The arguments of `plan` that an eviction stands for; an automatic one as at its largest."""
    if eviction is None or eviction.keep == 0:
        return {}
    keep = 4096 if eviction.keep is None else eviction.keep
    return {"observe": eviction.press.window, "keep": keep, "interleaved": eviction.interleaved}


def placed(params: Any, expand: bool = False) -> Any:
    """The shapes of what `load` makes of Sources; of arrays their own."""

    def one(x: Any) -> Any:
        if not isinstance(x, Source):
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        first = x.tensors[0]
        lead = (len(x.tensors),) if x.stacked else ()
        if first.type in PLAIN or (expand and not x.keep):
            wide = jnp.float32 if expand and not x.keep else PLAIN[first.type]
            return jax.ShapeDtypeStruct((*lead, *first.shape), wide)
        form = FORMATS[first.type]
        blocks = (*lead, *first.shape[:-1], first.shape[-1] // form.block)
        kinds = {name: form.fields[name] for name in form.fields.names or ()}
        return Packed({n: jax.ShapeDtypeStruct((*blocks, *kind.shape), kind.base) for n, kind in kinds.items()}, form)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Source))


def _kind(kind: str, stack: Any, slots: int) -> str:
    if not isinstance(stack, KVCache):
        return f"{kind}: state"
    return f"{kind}: {'ring of ' if stack.k.shape[3] < slots else ''}{stack.k.shape[3]} slots"


def _observed(stack: Any) -> int:
    return size_bytes(stack.recent_q) if isinstance(stack, KVCache) else 0


def _compacted(stack: KVCache, slots: int) -> int:
    """Bytes of a stack with so many slots, whose heads may have positions of their own, and its shift."""
    repeats, batch, heads, _, width = stack.k.shape
    return repeats * batch * heads * slots * (2 * width * stack.k.dtype.itemsize + 4) + 4 * batch


def _compacting(full: list[KVCache], new: list[int]) -> int:
    """Beside the old caches, of which each stack goes when it is there in its new size, and what scoring it takes.

    That is one layer's attention from the recent queries, f32 before and after its softmax, with f32 keys, and the
    scores of all keys of the stack, with what selecting by them takes.
    """
    most, held = 0, 0
    for stack, size in zip(full, new, strict=True):
        repeats, batch, heads, slots, width = stack.k.shape
        queries = 0 if stack.recent_q is None else math.prod(stack.recent_q.shape[1:-1])
        scoring = 8 * queries * slots + 4 * batch * heads * slots * width + 16 * repeats * batch * heads * slots
        most = max(most, held + size + scoring)
        held += size - size_bytes(stack)
    return most


def _workspace(model: Model, params: Any, cache: Any, batch: int, tokens: int) -> int:
    """An estimate of the temporary buffers of a call of `tokens` tokens a row."""
    call, widest, kept = _Call(model, batch, tokens), 0, 0
    own = params.layers
    for layers, segment in [(among, one) for among in (own, params.sharing) for one in among.segments]:
        within, most = [layers.stacks[k] for k in segment.pattern], 0
        for k, p in zip(segment.pattern, within, strict=True):
            source = k if layers is own else last_of(own, p.kind)
            most = max(most, *call.layer(p, layers.repeats[k], cache[source], own.repeats[source]))
        # A delta net's inputs stay until the end of the loop's body, where XLA puts the new tail of the convolution.
        tails = call.out(*(p.mixer.qkv for p in within if isinstance(p.mixer, DeltaParams)))
        widest = max(widest, most + (tails if segment.repeats > 1 else 0))
        kept += tails if segment.repeats == 1 else 0
    # And the states of all delta nets have another order during the whole program.
    states = sum(size_bytes(one.state) for one in cache if isinstance(one, DeltaState))
    return states + kept + call.inputs(params) + max(widest, call.head(params))


@dataclass(frozen=True)
class _Call:
    """Buffers of a call of `tokens` tokens a row. A GPU's products decode few rows' weights as they multiply."""

    model: Model
    batch: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def item(self) -> int:
        return self.model.config.dtype.itemsize

    @property
    def x(self) -> int:
        return self.rows * self.model.config.width * self.item

    def out(self, *linears: Linear | None) -> int:
        return sum(self.rows * p.weight.shape[-2] * self.item for p in linears if p is not None)

    def decoded(self, *weights: Any, repeats: int) -> int:
        """One layer's weights as a product takes them: decoded, or copied out of the stack where it must be."""
        gpu = self.model.ops.matmul in (matmul_gpu, matmul_hopper)
        if gpu and self.rows <= FEW:
            return 0
        total = 0
        for w in weights:
            plain = not isinstance(w, Packed) and w.dtype == self.model.config.dtype
            if not plain or (repeats > 1 and not gpu):
                # XLA's CPU code unpacks a weight in steps, and keeps two of them.
                total += math.prod(w.shape[-2:]) * self.item * (1 if gpu or plain else 2)
        return total

    def layer(self, layer: Any, repeats: int, stack: Any, layers: int) -> Iterator[int]:
        """The stages of one of `repeats` layers, whose cache is one of a stack of `layers`.

        Beside each there are what enters the layer, what the mixer makes of it, and its norm.
        """
        for p in jax.tree.leaves(layer, is_leaf=lambda x: isinstance(x, PARTS)):
            match p:
                case AttentionParams():
                    spec = self.model.config.mixer(layer.kind)
                    stages = self.attention(p, spec, repeats, stack, layers)
                case DeltaParams():
                    stages = (self.delta(p, self.model.config.mixer(layer.kind), repeats),)
                case MlpParams():
                    stages = (self.mlp(p, repeats),)
                case MoeParams():
                    stages = (self.moe(p, repeats),)
                case _:
                    continue
            yield from (3 * self.x + stage for stage in stages)

    def attention(
        self, p: AttentionParams, spec: AttentionSpec, repeats: int, stack: KVCache, layers: int
    ) -> Iterator[int]:
        weights = [one.weight for one in (p.q, p.k, p.v) if one is not None]
        heads = self.rows * spec.heads * spec.width
        yield self.out(p.q, p.k, p.v) + self.decoded(*weights, repeats=repeats) + 4 * heads  # rotated in f32
        attend = self.attend(p, spec, stack, layers)
        yield self.out(p.q) + heads * self.item + self.decoded(p.o.weight, repeats=repeats) + attend
        yield size_bytes(stack.pos) // layers * 7  # which blocks are alive, and their order: few numbers of every slot

    def attend(self, p: AttentionParams, spec: AttentionSpec, stack: KVCache, layers: int) -> int:
        """Beside q and the output."""
        op, (_, _, kv_heads, slots, width) = self.model.ops.attention, stack.k.shape
        copy = self.batch * kv_heads * slots * width * self.item
        if op in (attention_ampere, attention_hopper) and not beyond(stack, self.model.config.dtype):
            rows, hopper = self.tokens * spec.group, op is attention_hopper
            blocks = blocks_for(width, rows, slots, kv_heads, split=self.tokens <= KEYS_IN_PARTS, hopper=hopper)
            if blocks.splits == 1:  # the queries, padded, and the outputs
                return 2 * self.rows * spec.heads * width * self.item
            rows = -(-rows // blocks.rows) * blocks.rows
            return self.batch * kv_heads * rows * (blocks.splits * 4 * (width + 1) + width * self.item)
        tile = self.batch * spec.heads * min(self.tokens, TILE)
        if op is attention_blocks:
            block = min(BLOCK, slots)
            return 4 * (tile * (2 * block + 4 * width) + 2 * self.batch * kv_heads * block * width)
        tiled = 2 * self.rows * spec.heads * width * self.item if self.tokens > TILE else 0
        # Scores and weights of all slots. Keys and values are copied out of a stack: for a tile's time one of them, and
        # for few queries both, as XLA may then copy ahead.
        copies = copy * (2 if self.tokens <= FEW else 1) if layers > 1 else 0
        return tile * slots * (4 + self.item) + tiled + copies

    def delta(self, p: DeltaParams, spec: DeltaSpec, repeats: int) -> int:
        """Counted in the program for Qwen3.6-27B: f32 arrays of the convolution, of heads, and of pairs of a chunk."""
        weights = self.decoded(p.qkv.weight, p.z.weight, p.out.weight, repeats=repeats)
        channels = 2 * spec.keys + spec.values
        if self.tokens <= FEW_STEPS:
            return weights + 4 * self.rows * (4 * channels + 4 * spec.values)
        rows = self.batch * -(-self.tokens // CHUNK) * CHUNK
        return 6 * rows * channels + 4 * rows * (8 * spec.values + 12 * spec.value_heads * CHUNK)

    def mlp(self, p: MlpParams, repeats: int) -> int:
        weights = self.decoded(p.gate.weight, p.up.weight, p.down.weight, repeats=repeats)
        # A library reads plain weights where they lie, but the activation's result has a buffer of its own.
        return weights + self.out(p.gate, p.up)

    def moe(self, p: MoeParams, repeats: int) -> int:
        spec = self.model.config.moe
        assert spec is not None
        experts, d, ffn = p.experts.down.shape[-3:]
        routed = self.rows * d * 4 + self.rows * experts * 4
        if self.rows <= FEW:
            routed += self.rows * spec.used * (3 * ffn + d) * 4
        elif self.model.ops.experts is experts_hopper and not experts_beyond(
            p.experts, self.rows <= MOST, self.model.config.dtype
        ):
            # Rows as they are laid out, hidden ones twice, and outputs; tiles are not full.
            tile = layout_tile(self.rows * spec.used, experts)
            laid_out = self.rows * spec.used + tile * min(experts, self.rows * spec.used)
            routed += 2 * laid_out * (d + ffn) * self.item
        else:
            # Every choice's output, with another order of them; and an expert's weights.
            tile = tile_of(self.rows * spec.used, experts)
            routed += 2 * (self.rows * spec.used + tile) * d * self.item + 3 * d * ffn * self.item + tile * 3 * ffn * 4
        return routed + (0 if p.shared is None else self.mlp(p.shared, repeats))

    def inputs(self, params: Any) -> int:
        """Every layer's own embedding of the tokens, where a model has them, is there throughout."""
        table = getattr(params, "inputs", None)
        return 0 if table is None else self.rows * table.table.shape[-1] * self.item

    def head(self, params: Any) -> int:
        """The last token's logits, f32, and the weights for them."""
        head = params.embedding if params.head is None else params.head
        vocab, _ = head.shape
        last = _Call(self.model, self.batch, 1)
        return 2 * self.batch * vocab * 4 + last.decoded(head, repeats=1)
