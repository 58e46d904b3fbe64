"""Which blocks a tile of queries visits, against what is stored; how splits share them and how their parts join."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas.bounds import Visit, part, visit

EMPTY, BLOCK = -1, 4
Tile = tuple[list[int], list[int], int]  # positions of its queries, those in the slots, the shift


def stored(slots: int, end: int) -> list[int]:
    """The positions in a ring, which may never wrap, after so many tokens."""
    held = [EMPTY] * slots
    for p in range(max(end - slots, 0), end):
        held[p % slots] = p
    return held


def tiles(slots: int, chunk: int, ends: range) -> list[Tile]:
    """All tiles of up to `chunk` consecutive queries, and some with padding before them, of the last chunk."""
    found: list[Tile] = []
    for end in ends:
        held = stored(slots, end)
        for stop in range(max(end - chunk, 0) + 1, end + 1):
            for start in range(max(end - chunk, 0), stop):
                found.append(([*range(start, stop)], held, 0))
            found.append(([EMPTY, *range(max(end - chunk, 0), stop)], held, 0))
    return [*found, ([EMPTY] * 3, stored(slots, 1), 0)]


def evicted() -> list[Tile]:
    """Slots 0 to 8 hold what was kept of 20 tokens, in order, with empty ones among them; new ones follow."""
    kept = [0, 3, 4, EMPTY, 9, 11, EMPTY, EMPTY, 19]
    found: list[Tile] = []
    for new in range(1, 12):
        held = [*kept, *range(20, 20 + new), *[EMPTY] * (11 - new)]
        found += [([*range(start, 20 + new)], held, 11) for start in range(20, 20 + new)]
        found += [([EMPTY, *range(20, 20 + new)], held, 11)]
    return found


def sees(query: int, key: int, window: int | None, aligned: bool) -> bool:
    """Which keys a query sees, by the definition of `attention_reference`."""
    least = 0 if window is None else query // window * window if aligned else query - window + 1
    return query >= 0 and key >= 0 and least <= key <= query


def visits(cases: list[Tile], gaps: bool, **options: Any) -> list[Visit]:
    """Of all tiles, computed at once."""
    at = jnp.array([(queries[0], queries[-1], shift) for queries, _, shift in cases]).T
    found = jax.jit(jax.vmap(lambda a, b, c: visit(a, b, c if gaps else None, block=BLOCK, **options)))(*at)
    columns = (np.broadcast_to(np.asarray(a), len(cases)).tolist() for a in found)
    return [Visit(*one) for one in zip(*columns, strict=True)]


CASES = {  # tiles, whether the shift is passed, window, aligned
    "full": (tiles(32, 9, range(1, 33)), False, None, False),
    "full, window": (tiles(32, 9, range(1, 33)), False, 10, False),
    "full, wide window": (tiles(32, 9, range(1, 33)), False, 30, False),
    "full, aligned": (tiles(32, 9, range(1, 33)), False, 6, True),
    "ring": (tiles(20, 7, range(1, 45)), False, 10, False),  # window + chunk - 1 in whole blocks, and one to spare
    "ring, window of a block": (tiles(16, 8, range(1, 37)), False, 4, False),
    "ring, aligned": (tiles(20, 7, range(1, 45)), False, 10, True),
    "ring, empty slots": (tiles(20, 7, range(1, 45)), True, 10, False),
    "evicted": (evicted(), True, None, False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_visits_all_blocks_with_a_visible_key_in_the_order_of_positions(case):
    cases, gaps, window, aligned = case
    slots, plain_blocks = len(cases[0][1]), 0
    blocks = slots // BLOCK
    found = visits(cases, gaps, slots=slots, window=window, aligned=aligned)
    for (queries, held, _), seen in zip(cases, found, strict=True):
        order = [(seen.first + i) % blocks for i in range(seen.count)]
        assert len(set(order)) == len(order)
        keys = [held[n * BLOCK : (n + 1) * BLOCK] for n in range(blocks)]
        visible = [[k for k in block if any(sees(q, k, window, aligned) for q in queries)] for block in keys]
        assert {n for n in range(blocks) if visible[n]} <= set(order)
        ordered = [key for n in order for key in sorted(visible[n])]
        assert ordered == sorted(ordered)
        # And no more: the first and the last have a key that is seen. Padding hides where a tile's queries begin, and
        # what eviction left empty is only known to whoever reads it.
        if not gaps and queries[0] >= 0:
            assert all(visible[n] for n in order[:1] + order[-1:])
        assert 0 <= seen.plain <= seen.edge <= seen.count
        for n in order[seen.plain : seen.edge]:
            assert all(sees(q, k, window, aligned) for q in queries for k in keys[n])
        plain_blocks += seen.edge - seen.plain
    assert bool(plain_blocks) == (not gaps)  # where slots may be empty, all need the mask


def test_most_blocks_need_no_mask():
    """A block at each end of a sliding window is one that only some queries see, or two where the ends cut blocks."""
    (seen,) = visits([([*range(60, 64)], stored(64, 64), 0)], False, slots=64, window=None)
    assert seen == (0, 16, 0, 15)
    (seen,) = visits([([*range(60, 64)], stored(64, 64), 0)], False, slots=64, window=32)
    assert seen == (7, 9, 1, 8)  # from position 29 on; all queries see those from 32 to 60
    (seen,) = visits([([*range(60, 64)], stored(64, 64), 0)], False, slots=64, window=20, aligned=True)
    assert seen == (15, 1, 0, 0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_skipping_all_blocks_are_visited_under_the_mask(case):
    cases, gaps, window, aligned = case
    slots = len(cases[0][1])
    for (queries, *_), seen in zip(
        cases, visits(cases, gaps, slots=slots, window=window, aligned=aligned, skip=False), strict=True
    ):
        assert seen[1:] == (0 if queries[-1] < 0 else slots // BLOCK, 0, 0)
        assert window is not None or seen.first == 0


@pytest.mark.parametrize(("splits", "least"), [(1, 1), (4, 1), (8, 4), (128, 2)])
def test_splits_share_the_blocks(splits, least):
    shares = jax.jit(
        jax.vmap(lambda count: jax.vmap(lambda split: part(count, split, splits, least))(jnp.arange(splits)))
    )
    starts, stops = (np.asarray(a).tolist() for a in shares(jnp.arange(80)))
    for count in range(80):
        used = [(start, stop) for start, stop in zip(starts[count], stops[count], strict=True) if start < stop]
        assert [i for start, stop in used for i in range(start, stop)] == [*range(count)]
        sizes = [stop - start for start, stop in used]
        assert max(sizes, default=0) - min(sizes, default=0) <= 1
        assert len(used) <= 1 or min(sizes) >= least
        assert len(used) == min(splits, max(count // least, min(count, 1)))  # as many as there is work for
