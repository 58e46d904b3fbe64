"""Layers as segments: a short pattern of layers times a repeat count, so that a program holds each layer body once.

A layer's signature is the structure of its parameters with the type and shape of each: layers of one signature share a
body. The weights of a segment are stacked along the repeats and the loop indexes the stack, which reads it in place.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax import lax

from jaxinfer.tree import Index, pytree, static

LONGEST = 18  # layers of a pattern: published ones have at most 6, and a rhythm of 3 in their weight types


@pytree
class Segment:
    layers: tuple[Any, ...]  # the parameters of each layer of the pattern, every leaf stacked [R, ...]
    repeats: int = static()


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
    segments: Sequence[Segment],
    caches: Sequence[tuple[Any, ...]],
    x: X,
    step: Callable[[Any, Index, X, Any], tuple[X, Any]],
) -> tuple[X, tuple[tuple[Any, ...], ...]]:
    """Passes x through all layers in order: (x, cache) = step(layer's params, index in its stack, x, its cache).

    A layer's weights are decoded no earlier than x reaches it. They do not depend on x, so that XLA would decode those
    of a whole pattern at once, and unstacked ones before the loop over chunks or tokens that this is in, and keep them.
    """

    # Layers that are not stacked are traced once a signature all the same; the plain index leaves no slice behind.
    @jax.jit
    def alone(params: Any, x: X, one: Any) -> tuple[X, Any]:
        params, x = lax.optimization_barrier((params, x))
        return step(params, 0, x, one)

    done = []
    for number, (segment, cache) in enumerate(zip(segments, caches, strict=True)):

        def body(repeat: Index, carry: tuple[X, tuple[Any, ...]], number: int = number, segment: Segment = segment):
            x, held = carry
            new = []
            for params, one in zip(segment.layers, held, strict=True):
                with jax.named_scope(f"{'sharing' if one is None else 'layer'} {number}.{len(new)}"):
                    if segment.repeats == 1:
                        x, one = alone(params, x, one)
                    else:
                        if new:
                            repeat, x = lax.optimization_barrier((repeat, x))
                        x, one = step(params, repeat, x, one)
                new.append(one)
            return x, tuple(new)

        x, cache = body(0, (x, cache)) if segment.repeats == 1 else lax.fori_loop(0, segment.repeats, body, (x, cache))
        done.append(cache)
    return x, tuple(done)
