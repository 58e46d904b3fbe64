"""Layers as segments: a short pattern of layers times a repeat count, so that a program holds each layer body once.

A layer's signature is the structure of its parameters with the type and shape of each. All layers of one signature are
stacked, wherever they are in the model: the loops of segments index the stacks, which are read in place, and a kernel
that reads one is the same in all segments.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.tree import Index, pytree, static

LONGEST = 18  # layers of a pattern: published ones have at most 6, and a rhythm of 3 in their weight types


class Segment(NamedTuple):
    pattern: tuple[int, ...]  # the stack of each of its layers
    repeats: int


@pytree
class Layers:
    stacks: tuple[Any, ...]  # parameters of the layers of one signature in the model's order, every leaf [R, ...]
    segments: tuple[Segment, ...] = static()

    def places(self) -> Iterator[tuple[int, int]]:
        """Of each layer in order: its stack, and its index in it."""
        used = [0] * len(self.stacks)
        for pattern, repeats in self.segments:
            for k in pattern * repeats:
                yield k, used[k]
                used[k] += 1

    @property
    def repeats(self) -> tuple[int, ...]:
        """How many layers each stack has."""
        order = [k for k, _ in self.places()]
        return tuple(map(order.count, range(len(self.stacks))))


def arrange(signatures: Sequence[Hashable], *, unroll: bool = False) -> tuple[list[list[int]], tuple[Segment, ...]]:
    """Which layers each stack has, and the segments; unrolled, each layer has a stack of its own."""
    alike: dict[Hashable, list[int]] = {}
    for i, signature in enumerate(signatures):
        alike.setdefault(i if unroll else signature, []).append(i)
    kinds = {i: k for k, layers in enumerate(alike.values()) for i in layers}
    start, out = 0, []
    for length, repeats in [(len(signatures), 1)] if unroll else cut(signatures):
        out.append(Segment(tuple(kinds[i] for i in range(start, start + length)), repeats))
        start += length * repeats
    return list(alike.values()), tuple(out)


def cut(signatures: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Cuts a list of layers into (pattern length, repeats), in order, with the fewest layer bodies in total.

    A pattern has at most LONGEST layers. Among equal cuts the one with the fewest segments is taken.
    """
    numbers: dict[Hashable, int] = {}
    kinds = [numbers.setdefault(s, len(numbers)) for s in signatures]
    n = len(kinds)
    best: list[tuple[int, int]] = [(0, 0)]  # of the first i layers: (bodies, segments)
    last: list[tuple[int, int]] = [(0, 0)]  # the segment that ends there
    for end in range(1, n + 1):
        options = []
        for length in range(1, min(end, LONGEST) + 1):
            repeats = 1
            while True:
                bodies, segments = best[end - repeats * length]
                options.append(((bodies + length, segments + 1), (length, repeats)))
                start = end - (repeats + 1) * length
                if start < 0 or kinds[start : start + length] != kinds[end - length : end]:
                    break
                repeats += 1
        cost, segment = min(options)
        best.append(cost)
        last.append(segment)
    cuts = []
    end = n
    while end:
        cuts.append(last[end])
        end -= last[end][0] * last[end][1]
    return cuts[::-1]


def run[X](
    layers: Layers, caches: Sequence[Any], x: X, step: Callable[[Any, Index, X, Any], tuple[X, Any]]
) -> tuple[X, tuple[Any, ...]]:
    """Passes x through all layers in order: (x, cache) = step(stack's params, index in it, x, the stack's cache).

    A layer's weights are decoded no earlier than x reaches it. They do not depend on x, so that XLA would decode those
    of a whole pattern at once, and unstacked ones before the loop over chunks or tokens that this is in, and keep them.
    """
    if len(caches) != len(layers.stacks):
        raise ValueError(f"{len(caches)} caches for {len(layers.stacks)} stacks of layers")

    # What is not in a loop is traced once a signature all the same.
    @jax.jit
    def alone(params: Any, i: Index, x: X, one: Any) -> tuple[X, Any]:
        return step(params, i, x, one)

    @jax.jit
    def unstacked(params: Any, x: X, one: Any) -> tuple[X, Any]:
        params, x = lax.optimization_barrier((params, x))
        return step(params, 0, x, one)  # the plain index leaves no slice behind

    def body(segment: Segment, carry: tuple[X, dict[int, Any], list[Index]]) -> tuple[X, dict[int, Any], list[Index]]:
        x, own, at = carry
        for k, i in zip(segment.pattern, at, strict=True):
            params, one = layers.stacks[k], own[k]
            with jax.named_scope(f"{'sharing' if one is None else 'layer'} {k}"):
                if sizes[k] == 1:
                    x, one = unstacked(params, x, one)
                else:
                    i, x = lax.optimization_barrier((i, x))
                    x, one = (alone if segment.repeats == 1 else step)(params, i, x, one)
            own = own | {k: one}
        # Counted on from round to round: to compute each from the loop's own number is a launch for each on a GPU.
        return x, own, [i + segment.pattern.count(k) for k, i in zip(segment.pattern, at, strict=True)]

    sizes, used, held = layers.repeats, [0] * len(caches), list(caches)
    for segment in layers.segments:
        pattern, repeats = segment
        at = [jnp.int32(used[k] + pattern[:j].count(k)) for j, k in enumerate(pattern)]
        carry = x, {k: held[k] for k in pattern}, at
        if repeats == 1:
            x, own, _ = body(segment, carry)
        else:
            x, own, _ = lax.fori_loop(0, repeats, lambda _, carry, segment=segment: body(segment, carry), carry)
        for k, one in own.items():
            held[k] = one
            used[k] += repeats * pattern.count(k)
    return x, tuple(held)
