"""What `info` says of a file of every architecture, against figures worked out by hand from the file's numbers."""

import math
from typing import NamedTuple

import pytest
from goldens import model_path
from models import Spec, keys, save, weights

from jaxinfer import loader
from jaxinfer.info import info

TOKENS, SLOTS = 100_000, 100_096  # of a cache: slots come in 256s
CHUNK = 512  # on a CPU
RING = 768  # a window of 16 and a chunk less one are 527, which is 640 in blocks of 128, and a block to spare


def kv(layers: int, slots: int, heads: int, width: int) -> int:
    """Bytes of f32 keys and values, and of an int32 position for each slot."""
    return layers * slots * (2 * heads * width * 4 + 4)


def state(layers: int) -> int:
    """Bytes, f32, of 4 states of 16 x 16, and of 3 tokens' projections to 2 heads of q, 2 of k and 4 of v."""
    return layers * 4 * (4 * 16 * 16 + 3 * (2 + 2 + 4) * 16)


def size(n: int) -> str:
    return f"{n / 2**20:.2f} MiB" if n >= 2**20 else f"{n / 2**10:.2f} KiB"


def turn(width: int, base: float, factor: float = 1.0, pairs: str = "halves") -> str:
    slowest = base ** (-(width - 2) / width)
    return f"{width // 2} pairs of {pairs}, {1 / factor:.3g} to {slowest / factor:.3g} radians a token"


class Facts(NamedTuple):
    layers: str
    attention: dict[str, str]
    rope: dict[str, str]
    cache: dict[str, int]
    segments: str
    width: str
    experts: str | None = None


FULL, SLIDING, STATE = f"full: {SLOTS} slots", f"sliding: ring of {RING} slots", "delta: state"
HEADS = "4 heads of 32, 2 of keys and values"
DELTA = "4 heads of 16, 2 of keys, convolution over 4 tokens"
ONE = "(layer bodies compiled: 1, distinct: 1)"
TWO = "(layer bodies compiled: 2, distinct: 2)"
GEMMA4 = {  # the last 24 of 32 pairs of full attention are divided by 1e30
    "full": f"8 pairs of halves (24 more stand still), 1 to {1e6 ** (-14 / 64):.3g} radians a token",
    "sliding": turn(32, 1e4),
}
YARN = (
    f"16 pairs of halves, 1 to {150000 ** (-30 / 32) / 32:.3g} radians a token, magnitude {1 + math.log(32) / 10:.4g}"
)

GOLDENS = {
    "llama": Facts(
        "3: 3 full",
        {"full": "6 heads of 32, 2 of keys and values"},
        # the file divides the slowest pairs by 8, as Llama 3 does
        {"full": f"16 pairs of neighbours, 1 to {5e5 ** (-30 / 32) / 8:.3g} radians a token"},
        {FULL: kv(3, SLOTS, 2, 32)},
        f"1 x 3 {ONE}",
        "64, feed-forward 64",
    ),
    "llama-moe": Facts(
        "2: 2 full",
        {"full": HEADS},
        {"full": turn(32, 1e4, pairs="neighbours")},
        {FULL: kv(2, SLOTS, 2, 32)},
        f"1 x 2 {ONE}",
        "32",
        "4 of width 64, 2 a token by softmax_renormalised, in 2 layers of 2",
    ),
    "llama4": Facts(
        "4: 3 block, 1 full",
        {"full": HEADS, "block": f"{HEADS}, blocks of 8192"},
        {"full": "none", "block": turn(32, 5e5, pairs="neighbours")},
        # 8192 + 511 slots are 68 blocks of 128, and one to spare
        {"block: ring of 8832 slots": kv(3, 8832, 2, 32), FULL: kv(1, SLOTS, 2, 32)},
        "4 x 1 (layer bodies compiled: 4, distinct: 3)",
        "32, feed-forward 96",
        "4 of width 32, 1 a token by sigmoid_of_chosen, a shared one of width 32, in 2 layers of 4",
    ),
    "olmoe": Facts(
        "2: 2 full",
        {"full": "4 heads of 16, 4 of keys and values"},
        {"full": turn(16, 1e4)},
        {FULL: kv(2, SLOTS, 4, 16)},
        f"1 x 2 {ONE}",
        "64",
        "6 of width 32, 3 a token by softmax_of_all, in 2 layers of 2",
    ),
    "qwen2": Facts(
        "3: 3 full",
        {"full": "4 heads of 16, 2 of keys and values"},
        {"full": turn(16, 1e6)},
        {FULL: kv(3, SLOTS, 2, 16)},
        f"1 x 3 {ONE}",
        "64, feed-forward 64",
    ),
    "qwen3": Facts(
        "3: 3 full",
        {"full": HEADS},
        {"full": turn(32, 1e6)},
        {FULL: kv(3, SLOTS, 2, 32)},
        f"1 x 3 {ONE}",
        "64, feed-forward 96",
    ),
    "qwen3moe": Facts(
        "3: 3 full",
        {"full": HEADS},
        {"full": turn(32, 1e6)},
        {FULL: kv(3, SLOTS, 2, 32)},
        f"1 x 3 {ONE}",
        "32",
        "8 of width 32, 2 a token by softmax_renormalised, in 3 layers of 3",
    ),
    "qwen35": Facts(
        "5: 4 delta, 1 full",
        {"delta": DELTA, "full": f"{HEADS}, gated"},
        {"full": turn(16, 1e7)},
        {STATE: state(4), FULL: kv(1, SLOTS, 2, 32)},
        "1 x 3, 2 x 1 (layer bodies compiled: 3, distinct: 2)",
        "64, feed-forward 64",
    ),
    "qwen35-mtp": Facts(
        "4: 3 delta, 1 full; and one that drafts a second token",
        {"delta": DELTA, "full": "4 heads of 32, 1 of keys and values, gated"},
        {"full": turn(8, 1e7)},
        {STATE: state(3), FULL: kv(1, SLOTS, 1, 32)},
        f"1 x 3, 1 x 1 {TWO}",
        "32, feed-forward 32",
    ),
    "qwen35moe-mtp": Facts(
        "4: 3 delta, 1 full; and one that drafts a second token",
        {"delta": DELTA, "full": f"{HEADS}, gated"},
        {"full": turn(16, 1e7)},
        {STATE: state(3), FULL: kv(1, SLOTS, 2, 32)},
        f"1 x 3, 1 x 1 {TWO}",
        "32",
        "4 of width 32, 2 a token by softmax_renormalised, a shared one of width 32, in 4 layers of 4",
    ),
    "qwen3next": Facts(
        "4: 3 delta, 1 full",
        {"delta": DELTA, "full": f"{HEADS}, gated"},
        {"full": turn(16, 1e7)},
        {STATE: state(3), FULL: kv(1, SLOTS, 2, 32)},
        f"1 x 3, 1 x 1 {TWO}",
        "32",
        "6 of width 32, 2 a token by softmax_renormalised, a shared one of width 32, in 4 layers of 4",
    ),
    "gemma3": Facts(
        "7: 6 sliding, 1 full",
        {"full": "2 heads of 32, 1 of keys and values", "sliding": "2 heads of 32, 1 of keys and values, window 16"},
        {"full": turn(32, 1e6, 8.0), "sliding": turn(32, 1e4)},
        {SLIDING: kv(6, RING, 1, 32), FULL: kv(1, SLOTS, 1, 32)},
        "1 x 5, 2 x 1 (layer bodies compiled: 3, distinct: 2)",
        "64, feed-forward 32",
    ),
    "gemma4-dense": Facts(
        "6: 5 sliding, 1 full",
        {"full": "4 heads of 64, 1 of keys and values, scale 1", "sliding": f"{HEADS}, window 16, scale 1"},
        GEMMA4,
        {SLIDING: kv(5, RING, 2, 32), FULL: kv(1, SLOTS, 1, 64)},
        f"1 x 5, 1 x 1 {TWO}",
        "32, feed-forward 64",
    ),
    "gemma4-e": Facts(
        "8: 3 sliding, 1 full; 3 sliding, 1 full that share keys and values",
        {"full": "4 heads of 64, 2 of keys and values, scale 1", "sliding": f"{HEADS}, window 16, scale 1"},
        GEMMA4,
        {SLIDING: kv(3, RING, 2, 32), FULL: kv(1, SLOTS, 2, 64)},
        "1 x 3, 1 x 1, 1 x 3, 1 x 1 (layer bodies compiled: 4, distinct: 4)",
        "32, feed-forward 32 or 64",
    ),
    "gemma4-moe": Facts(
        "6: 5 sliding, 1 full",
        {
            "full": "2 heads of 64, 1 of keys and values, scale 1",
            "sliding": "2 heads of 32, 2 of keys and values, window 16, scale 1",
        },
        GEMMA4,
        {SLIDING: kv(5, RING, 2, 32), FULL: kv(1, SLOTS, 1, 64)},
        f"1 x 5, 1 x 1 {TWO}",
        "32, feed-forward 32",
        "5 of width 32, 2 a token by softmax_renormalised, in 6 layers of 6",
    ),
    "gpt-oss": Facts(
        "4: 2 sliding, 2 full",
        {"full": HEADS, "sliding": f"{HEADS}, window 16"},
        {"full": YARN, "sliding": YARN},
        {SLIDING: kv(2, RING, 2, 32), FULL: kv(2, SLOTS, 2, 32)},
        f"2 x 2 {TWO}",
        "32",
        "6 of width 32, 2 a token by softmax_of_chosen, in 4 layers of 4",
    ),
}


def check(facts: dict[str, str], want: Facts) -> None:
    def joined(parts: dict[str, str]) -> str:
        return "; ".join(f"{kind}: {fact}" for kind, fact in parts.items())

    assert facts["layers"] == want.layers
    assert facts["attention"] == joined(want.attention)
    assert facts["rope"] == joined(want.rope)
    kept = "".join(f"{what}, {size(n)}; " for what, n in want.cache.items())
    assert facts["cache"] == f"{kept}in all {size(sum(want.cache.values()))} for {TOKENS} tokens in chunks of {CHUNK}"
    assert facts["segments"] == want.segments
    assert facts["width"] == want.width
    assert facts.get("experts") == want.experts


@pytest.mark.parametrize("name", GOLDENS)
def test_the_facts_of_every_architecture(name):
    check(info(loader.describe(model_path(name), expand=False), TOKENS), GOLDENS[name])


def test_layers_without_rope(tmp_path):
    path, spec = tmp_path / "smollm3.gguf", Spec(arch="smollm3", layers=5, heads=4, kv_heads=2, head=32)
    save(path, keys(spec), weights(spec))
    want = Facts(
        "5: 4 full, 1 unrotated",
        {"full": HEADS, "unrotated": HEADS},
        {"full": turn(32, 1e4, pairs="neighbours"), "unrotated": "none"},
        {FULL: kv(4, SLOTS, 2, 32), f"unrotated: {SLOTS} slots": kv(1, SLOTS, 2, 32)},
        "1 x 3, 2 x 1 (layer bodies compiled: 3, distinct: 2)",
        "40, feed-forward 36",
    )
    check(info(loader.describe(path, expand=False), TOKENS), want)


def test_unrolled_layers_of_one_signature_are_counted_once():
    facts = info(loader.describe(model_path("gemma3"), expand=True), TOKENS)
    assert facts["segments"] == "7 x 1 (layer bodies compiled: 7, distinct: 2)"
    assert facts["weights"].startswith("expanded to float32")


@pytest.mark.parametrize(("name", "head"), [
    ("gemma3", "of 320 tokens, the embedding's weights"),
    ("gemma4-e", "of 320 tokens, the embedding's weights, soft cap 30"),
    ("gpt-oss", "of 288 tokens, its own weights"),
])  # fmt: skip
def test_the_head(name, head):
    assert info(loader.describe(model_path(name)))["head"] == head


def test_weight_types_are_counted():
    facts = info(loader.describe(model_path("gpt-oss-MXFP4"), expand=False))
    # embedding and head; q, k, v, o and three stacks of experts in each of two layers
    assert facts["tensors"].split(", ")[1] == f"{2 + 2 * 7} MXFP4"
    assert facts["weights"].startswith("packed as in the file")
