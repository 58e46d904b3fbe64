"""What many architectures store alike: numbers to specs, tensors to parameters.

Keys and names are GGUF's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.decoder import Config, LayerParams, Params
from jaxinfer.layers.attention import AttentionParams, AttentionSpec
from jaxinfer.layers.linear import Linear
from jaxinfer.layers.mlp import MlpParams, silu_gate
from jaxinfer.layers.moe import MoeParams, MoeSpec
from jaxinfer.layers.rope import Rope, Yarn, frequencies, yarn_frequencies, yarn_magnitude
from jaxinfer.layers.routing import Routing
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.ops.experts import Activation, ExpertParams


def blocks(metadata: Metadata, weights: Weights) -> int:
    """How many layers the file says it has: no more than tensors, so that a claim costs nothing."""
    return metadata.whole("block_count", most=len(weights))


def config(metadata: Metadata, weights: Weights, dtype: np.dtype, *, drafts: int = 0, **own: Any) -> Config:
    """The numbers that every architecture has, and an architecture's own; the last `drafts` blocks are no layers."""
    metadata.refuse("attention.causal", True)
    metadata.refuse("nextn_predict_layers", drafts)
    metadata.get("vocab_size", None)
    common = {
        "layers": blocks(metadata, weights) - drafts,
        "width": metadata.whole("embedding_length"),
        "vocab": weights.length("token_embd.weight"),
        "context": metadata.whole("context_length"),
        "eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "dtype": dtype,
    }
    return Config(**(common | own))


def params(
    weights: Weights, config: Config, layer: Callable[["Block", int], Any], *, layers: int | None = None, **own: Any
) -> Params:
    """Embedding, all `layers` (by default the config's) and head; `layer(block, i)` reads layer i."""
    vocab, width = config.vocab, config.width
    count = config.layers if layers is None else layers
    return Params(
        embedding=weights("token_embd.weight", vocab, width),
        layers=weights.layers([layer(Block(weights, f"blk.{i}."), i) for i in range(count)]),
        norm=weights("output_norm.weight", width),
        head=weights.optional("output.weight", vocab, width),
        head_bias=weights.optional("output.bias", vocab),
        **own,
    )


def attention_spec(
    metadata: Metadata,
    rope: Callable[[int], Rope | None],
    *,
    suffix: str = "",
    width: int | None = None,
    kv_heads: int | None = None,
    **own: Any,
) -> AttentionSpec:
    """One kind of attention; `rope(width of a head)` is its rotation, `suffix` that of its keys ("_swa").

    Heads are as wide as `width` where the metadata does not say.
    """
    heads = metadata.whole("attention.head_count")
    if kv_heads is None:
        kv_heads = metadata.whole("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise metadata.wrong("attention.head_count", heads, f"a multiple of attention.head_count_kv, {kv_heads}")
    key = f"attention.key_length{suffix}"
    head = metadata.whole(key, width or metadata.whole("embedding_length") // heads, most=2**16)
    if head % 2:
        raise metadata.wrong(key, head, "even")
    value = f"attention.value_length{suffix}"
    if metadata.whole(value, head) != head:
        raise metadata.wrong(value, metadata.get(value), f"{key}, {head}")
    eps = metadata.number("attention.layer_norm_rms_epsilon")
    defaults = {"scale": head**-0.5, "eps": eps, "rope": rope(head)}
    return AttentionSpec(kv_heads=kv_heads, group=heads // kv_heads, width=head, **(defaults | own))


def rope(
    metadata: Metadata,
    *,
    interleaved: bool,
    divisors: Callable[[int], np.ndarray | None] = lambda pairs: None,
    base: float | None = None,
    suffix: str = "",
    scaled: bool = True,
) -> Callable[[int], Rope]:
    """The rotation that the metadata describes, for heads of a width: plain, linear or YaRN, over the file's divisors.

    `base` is the key's default; keys end in `suffix`; `scaled` is whether rope.scaling.* applies.
    """

    def read(head: int) -> Rope:
        width = metadata.whole(f"rope.dimension_count{suffix}", metadata.whole("rope.dimension_count", head))
        if width > head or width % 2:
            raise metadata.wrong(f"rope.dimension_count{suffix}", width, f"even and at most the head's width, {head}")
        theta = metadata.number(f"rope.freq_base{suffix}", base or 10000.0)
        over = divisors(width // 2)
        kind = metadata.text("rope.scaling.type", "linear")
        factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
        original = metadata.whole("rope.scaling.original_context_length", metadata.whole("context_length"))
        magnitude = metadata.number("rope.scaling.attn_factor", 1.0)
        metadata.get("rope.scaling.finetuned", None)
        match kind if scaled else "none":
            case "none":
                return Rope(tuple(frequencies(theta, width, 1.0, over)), interleaved, magnitude)
            case "linear":
                return Rope(tuple(frequencies(theta, width, factor, over)), interleaved, magnitude)
            case "yarn":
                if theta <= 1:
                    raise metadata.wrong(f"rope.freq_base{suffix}", theta, "above 1 for yarn")
                yarn = Yarn(factor, original, magnitude)
                return Rope(tuple(yarn_frequencies(theta, width, yarn, over)), interleaved, yarn_magnitude(yarn))
        raise metadata.wrong("rope.scaling.type", kind, "none, linear or yarn")

    return read


def moe_spec(
    metadata: Metadata, routing: Routing, activation: Activation = silu_gate, *, weigh_inputs: bool = False
) -> MoeSpec:
    for key in ("expert_group_count", "expert_group_used_count"):
        metadata.refuse(key, 0, 1)
    used = metadata.whole("expert_used_count", most=metadata.whole("expert_count"))
    return MoeSpec(used=used, routing=routing, activation=activation, weigh_inputs=weigh_inputs)


def decoder(
    metadata: Metadata,
    weights: Weights,
    dtype: np.dtype,
    *,
    interleaved: bool,
    norms: str | None = None,
    routing: Routing | None = None,
    expert_ffn: Callable[[int, int], int] = lambda ffn, used: ffn,
    rotated: Callable[[int], bool] = lambda i: True,
) -> tuple[Config, Params]:
    """A decoder with one kind of attention, of which the layers that are not `rotated` do without rope.

    `interleaved` is the rope's pairing. With a `routing`, files may have experts in place of each feed-forward layer;
    `expert_ffn(feed_forward_length, experts used)` is their width where the metadata does not say.
    """
    divisors = partial(weights.values, "rope_freqs.weight")
    spec = attention_spec(metadata, rope(metadata, interleaved=interleaved, divisors=divisors))
    moe, experts = None, metadata.whole("expert_count", 0, least=0)
    if routing and experts:
        moe = moe_spec(metadata, routing)
        ffn = expert_ffn(metadata.whole("feed_forward_length", 0, least=0), moe.used)
        ffn = metadata.whole("expert_feed_forward_length", ffn)
    else:
        for key in ("expert_count", "expert_used_count"):
            metadata.refuse(key, 0)
        ffn = metadata.whole("feed_forward_length")
    mixers = {"full": spec, "unrotated": replace(spec, rope=None)}
    kinds = ["full" if rotated(i) else "unrotated" for i in range(blocks(metadata, weights))]
    own = {"mixers": tuple((kind, mixers[kind]) for kind in sorted(set(kinds))), "moe": moe}
    whole = config(metadata, weights, dtype, **own)
    d = whole.width

    def layer(block: Block, i: int) -> LayerParams:
        return LayerParams(
            norm=block.norm("attn_norm", d),
            mixer=block.attention(spec, d, norms=norms),
            ffn_norm=block.norm("ffn_norm", d),
            ffn=block.moe(experts, ffn, d) if moe else block.mlp(ffn, d),
            kind=kinds[i],
        )

    return whole, params(weights, whole, layer)


class Block(NamedTuple):
    """One layer's tensors, by the names that they have in it."""

    weights: Weights
    prefix: str

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}{name}.weight" in self.weights

    def norm(self, name: str, size: int) -> Any:
        return self.weights(f"{self.prefix}{name}.weight", size)

    def linear(self, name: str, out: int, into: int) -> Linear:
        """A projection, with the bias that it may have."""
        name = self.prefix + name
        return Linear(self.weights(f"{name}.weight", out, into), self.weights.optional(f"{name}.bias", out))

    def attention(
        self, spec: AttentionSpec, width: int, *, norms: str | None = None, parts: str = "qkv"
    ) -> AttentionParams:
        """The projections of an attention layer that has those to `parts`: "qkv", "qk" or "q".

        `norms` of q and k are of each "head", of "all" heads together, or None.
        """
        n, k = spec.heads * spec.width, spec.kv_heads * spec.width
        sizes = (n * (2 if spec.gated else 1), k, k)
        if parts == "qkv":
            q, k_, v = self.qkv(sizes, width)
        else:
            q, v = self.linear("attn_q", sizes[0], width), None
            k_ = self.linear("attn_k", k, width) if "k" in parts else None
        q_norm, k_norm = (n, k) if norms == "all" else (spec.width, spec.width)
        return AttentionParams(
            q=q,
            k=k_,
            v=v,
            o=self.linear("attn_output", width, n),
            q_norm=self.norm("attn_q_norm", q_norm) if norms else None,
            k_norm=self.norm("attn_k_norm", k_norm) if norms and "k" in parts else None,
        )

    def qkv(self, sizes: Sequence[int], width: int) -> list[Linear]:
        """The projections to q, k and v, stored one by one or as the rows of one tensor; biases likewise."""
        names = [f"{self.prefix}attn_{x}" for x in "qkv"]
        fused = f"{self.prefix}attn_qkv"
        if f"{fused}.weight" in self.weights:
            w = self.weights.rows(f"{fused}.weight", (sum(sizes), width), sizes)
        else:
            w = [self.weights(f"{name}.weight", size, width) for name, size in zip(names, sizes, strict=True)]
        if f"{fused}.bias" in self.weights:
            b = self.weights.rows(f"{fused}.bias", (sum(sizes),), sizes)
        else:
            b = [self.weights.optional(f"{name}.bias", size) for name, size in zip(names, sizes, strict=True)]
        return [Linear(*pair) for pair in zip(w, b, strict=True)]

    def mlp(self, ffn: int, width: int, suffix: str = "") -> MlpParams:
        return MlpParams(
            gate=self.linear(f"ffn_gate{suffix}", ffn, width),
            up=self.linear(f"ffn_up{suffix}", ffn, width),
            down=self.linear(f"ffn_down{suffix}", width, ffn),
        )

    def moe(self, experts: int, ffn: int, width: int, *, shared: int = 0, shared_gate: bool = False) -> MoeParams:
        """Router, experts of `ffn`, and a shared expert of the width `shared` if that is not zero."""
        return MoeParams(
            router=self.linear("ffn_gate_inp", experts, width),
            experts=self.experts(experts, ffn, width),
            shared=self.mlp(shared, width, "_shexp") if shared else None,
            shared_gate=self.norm("ffn_gate_inp_shexp", width) if shared_gate else None,
        )

    def experts(self, experts: int, ffn: int, width: int) -> ExpertParams:
        """The stacks of all experts; gate and up may be one stack, gate first."""

        def stack(name: str, *shape: int) -> tuple[Any, Any]:
            name = self.prefix + name
            bias = self.weights.optional(f"{name}.bias", experts, shape[0])
            return self.weights(f"{name}.weight", experts, *shape), bias

        if "ffn_gate_up_exps" in self:
            (gate, gate_bias), (up, up_bias) = stack("ffn_gate_up_exps", 2 * ffn, width), (None, None)
        else:
            (gate, gate_bias), (up, up_bias) = (stack(f"ffn_{name}_exps", ffn, width) for name in ("gate", "up"))
        down, down_bias = stack("ffn_down_exps", width, ffn)
        scale = self.weights.optional(f"{self.prefix}ffn_down_exps.scale", experts)
        return ExpertParams(gate, up, down, gate_bias, up_bias, down_bias, scale)
