"""Tiny files of every family of models, and what they must compute: float64 numpy, layer by layer, from the formulae.

A file is metadata and tensors. The oracle reads both by itself, with the defaults of each architecture, so that a test
changes either, saves the file and compares.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from models import Spec, angles, attend, rms_norm, rotate, silu

BLOCK = 8  # of llama4, whose files have 8192 always: tests patch the product

# Files: the shapes of their tensors first. Tests of wider models patch the sizes, which files and formulae both have.

type Shapes = dict[str, tuple[int, ...]]

D, HEAD, FFN, EXPERT_FFN, VOCAB = 24, 10, 20, 12, 67
WIDE = 16  # heads of gemma4's full layers
STATE = 6  # width of a delta net's heads


@dataclass(frozen=True)
class File:
    arch: str
    keys: dict[str, Any]  # without the architecture's prefix
    tensors: dict[str, np.ndarray]

    @property
    def metadata(self) -> dict[str, Any]:
        return {"general.architecture": self.arch} | {f"{self.arch}.{k}": v for k, v in self.keys.items()}


def attention(*, q: int = 4, kv: int = 2, head: int | None = None, gates: int = 0, norms: str = "head") -> Shapes:
    """`q` heads of queries, `kv` of keys and of values; `gates` more of q; `norms` of each "head", of "all", or ""."""
    head = head or HEAD
    out = {"attn_q.weight": ((q + gates) * head, D), "attn_output.weight": (D, q * head)}
    out |= {f"attn_{name}.weight": (kv * head, D) for name in "kv"}
    if norms:
        sizes = {"q": q * head, "k": kv * head} if norms == "all" else {"q": head, "k": head}
        out |= {f"attn_{name}_norm.weight": (size,) for name, size in sizes.items()}
    return out


def mlp(ffn: int | None = None, suffix: str = "") -> Shapes:
    ffn = ffn or FFN
    out = {f"ffn_{name}{suffix}.weight": (ffn, D) for name in ("gate", "up")}
    return out | {f"ffn_down{suffix}.weight": (D, ffn)}


def experts(count: int, *, ffn: int | None = None, shared: int = 0) -> Shapes:
    ffn = ffn or EXPERT_FFN
    out = {f"ffn_{name}_exps.weight": (count, ffn, D) for name in ("gate", "up")}
    out |= {"ffn_gate_inp.weight": (count, D), "ffn_down_exps.weight": (count, D, ffn)}
    return out | (mlp(shared, "_shexp") if shared else {})


def vectors(*names: str, size: int | None = None) -> Shapes:
    return {f"{name}.weight": (size or D,) for name in names}


def biases(shapes: Shapes, *names: str) -> Shapes:
    """With a bias for each of the named projections, or stacks of them."""
    return shapes | {f"{name}.bias": shapes[f"{name}.weight"][:-1] for name in names}


def build(
    arch: str,
    layers: int,
    layer: Callable[[int], Shapes],
    defaults: Mapping[str, Any],
    keys: Mapping[str, Any] | None,
    other: Shapes | None = None,
) -> File:
    """A file of `layers`, each with the shapes that `layer` has for it. `keys` replace others; None leaves one out."""
    common = {
        "block_count": layers,
        "context_length": 64,
        "embedding_length": D,
        "feed_forward_length": FFN,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    shapes = {"token_embd.weight": (VOCAB, D), "output_norm.weight": (D,)} | (other or {})
    for i in range(layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer(i).items()}
    found = common | dict(defaults) | dict(keys or {})
    return File(arch, {k: v for k, v in found.items() if v is not None}, draw(shapes))


def draw(shapes: Shapes) -> dict[str, np.ndarray]:
    """f32: norms and scales about 1, rates of decay below 0, matrices that keep a vector's length."""
    rng, out = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if "norm" in name or "scale" in name:
            values = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("ssm_a"):
            values = -rng.uniform(0.05, 2, shape)
        elif name.endswith("rope_freqs.weight"):
            values = np.geomspace(1, 8, *shape)
        elif len(shape) > 1 and name.endswith(".weight") and "embd" not in name:
            values /= shape[-1] ** 0.5
        out[name] = values.astype(np.float32)
    return out


def changed(file: File, tensors: Mapping[str, np.ndarray | None]) -> File:
    """The file with other tensors; None leaves one out."""
    found = file.tensors | dict(tensors)
    return replace(file, tensors={name: values for name, values in found.items() if values is not None})


def fused(file: File, name: str, *parts: str) -> File:
    """The file with tensors of all its layers joined to one along their rows, biases likewise: "attn_qkv" of three."""
    found = dict(file.tensors)
    for i in range(file.keys["block_count"]):
        for kind, axis in (("weight", -2), ("bias", -1)):
            old = [f"blk.{i}.{part}.{kind}" for part in parts]
            if all(one in found for one in old):
                found[f"blk.{i}.{name}.{kind}"] = np.concatenate([found.pop(one) for one in old], axis=axis)
    return replace(file, tensors=found)


def decoder(
    arch: str,
    keys: Mapping[str, Any] | None = None,
    *,
    layers: int = 2,
    norms: str = "",
    biased: tuple[str, ...] = (),
    mixture: int = 0,
    ffn: int | None = None,
    tied: bool = True,
) -> File:
    """Llama's kind of layers, with a `mixture` of so many experts if that is not 0."""
    ffn = ffn or EXPERT_FFN
    feed_forward = experts(mixture, ffn=ffn) if mixture else mlp()
    layer = biases(vectors("attn_norm", "ffn_norm") | attention(norms=norms) | feed_forward, *biased)
    counts = {"expert_count": mixture, "expert_used_count": 2, "expert_feed_forward_length": ffn} if mixture else {}
    return build(arch, layers, lambda i: layer, counts, keys, {} if tied else {"output.weight": (VOCAB, D)})


GEMMA = "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"


def gemma3(keys: Mapping[str, Any] | None = None, *, layers: int = 2) -> File:
    own = {"attention.sliding_window": 5, "rope.freq_base": 1e6}
    return build("gemma3", layers, lambda i: vectors(*GEMMA) | attention() | mlp(), own, keys)


def gemma4(
    keys: Mapping[str, Any] | None = None,
    *,
    sliding: tuple[bool, ...] = (True, True, False),
    shared: int = 0,
    inputs: int = 0,
    kv_heads: tuple[int, int] = (2, 2),
    mixture: int = 0,
    ffn: tuple[int, ...] = (),
) -> File:
    """`kv_heads` are of sliding and full layers; the last `shared` have no keys; `inputs` is the layers' own width."""

    def layer(i: int) -> Shapes:
        head, kv = (HEAD, kv_heads[0]) if sliding[i] else (WIDE, kv_heads[1])
        out = vectors(*GEMMA) | attention(kv=kv, head=head) | mlp(ffn[i] if ffn else FFN)
        out |= vectors("layer_output_scale", size=1)
        if i >= len(sliding) - shared:
            out = {name: shape for name, shape in out.items() if name[:6] not in ("attn_k", "attn_v")}
        if inputs:
            out |= {"inp_gate.weight": (inputs, D), "proj.weight": (D, inputs), "post_norm.weight": (D,)}
        if mixture:
            out |= experts(mixture) | vectors("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")
            out |= {"ffn_gate_inp.scale": (D,), "ffn_down_exps.scale": (mixture,)}
        return out

    own: dict[str, Any] = {
        "attention.sliding_window": 5,
        "attention.sliding_window_pattern": list(sliding),
        "attention.key_length": WIDE,
        "attention.value_length": WIDE,
        "attention.key_length_swa": HEAD,
        "attention.value_length_swa": HEAD,
        "rope.dimension_count": WIDE,
        "rope.dimension_count_swa": HEAD,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": inputs,
    }
    if kv_heads[0] != kv_heads[1]:
        own["attention.head_count_kv"] = [kv_heads[0] if local else kv_heads[1] for local in sliding]
    if ffn:
        own["feed_forward_length"] = list(ffn)
    if mixture:
        own |= {"expert_count": mixture, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FFN}
    width = len(sliding) * inputs
    other: Shapes = {} if all(sliding) else {"rope_freqs.weight": (WIDE // 2,)}
    if inputs:
        other |= {"per_layer_token_embd.weight": (VOCAB, width), "per_layer_model_proj.weight": (width, D)}
        other |= {"per_layer_proj_norm.weight": (inputs,)}
    return build("gemma4", len(sliding), layer, own, keys, other)


def gpt_oss(keys: Mapping[str, Any] | None = None, *, layers: int = 3, mixture: int = 5) -> File:
    layer = vectors("attn_norm", "post_attention_norm") | attention(norms="") | experts(mixture)
    layer = biases(layer, *(f"attn_{name}" for name in ("q", "k", "v", "output")), "ffn_gate_inp")
    layer = biases(layer, *(f"ffn_{name}_exps" for name in ("gate", "up", "down"))) | vectors("attn_sinks", size=4)
    yarn = {"type": "yarn", "factor": 8.0, "original_context_length": 16}
    own = {"attention.sliding_window": 7, "rope.freq_base": 150000.0, "expert_count": mixture, "expert_used_count": 3}
    own |= {"expert_feed_forward_length": EXPERT_FFN} | {f"rope.scaling.{k}": v for k, v in yarn.items()}
    file = build("gpt-oss", layers, lambda i: layer, own, keys, {"output.weight": (VOCAB, D)})
    # so that the clamps of the activation are met
    return changed(
        file, {k: 4 * v for k, v in file.tensors.items() if k.endswith(("gate_exps.weight", "up_exps.weight"))}
    )


def llama4(keys: Mapping[str, Any] | None = None, *, layers: int = 4, step: int = 1, mixture: int = 4) -> File:
    def layer(i: int) -> Shapes:
        routed = (i + 1) % step == 0
        feed_forward = experts(mixture, shared=EXPERT_FFN) if routed else mlp()
        return vectors("attn_norm", "ffn_norm") | attention(norms="") | feed_forward

    own = {"expert_count": mixture, "expert_used_count": 1, "expert_feed_forward_length": EXPERT_FFN}
    return build(
        "llama4", layers, layer, own | {"interleave_moe_layer_step": step}, keys, {"output.weight": (VOCAB, D)}
    )


def hybrid(
    arch: str,
    keys: Mapping[str, Any] | None = None,
    *,
    layers: int = 4,
    full: tuple[int, ...] = (3,),
    key_heads: int = 2,
    value_heads: int = 4,
    mixture: int = 5,
    drafts: bool = False,
    tied: bool = True,
) -> File:
    """Delta nets and the `full` layers between them; "ssm_alpha" and "ssm_beta" are apart unless it is qwen3next."""
    channels, values = (2 * key_heads + value_heads) * STATE, value_heads * STATE
    net: Shapes = {
        "attn_qkv.weight": (channels, D),
        "attn_gate.weight": (values, D),
        "ssm_conv1d.weight": (channels, 4),
        "ssm_dt.bias": (value_heads,),
        "ssm_a": (value_heads,),
        "ssm_norm.weight": (STATE,),
        "ssm_out.weight": (D, values),
    }
    if arch == "qwen3next":
        net |= {"ssm_ba.weight": (2 * value_heads, D)}
    else:
        net |= {f"ssm_{name}.weight": (value_heads, D) for name in ("alpha", "beta")}
    feed_forward = mlp() if arch == "qwen35" else experts(mixture, shared=FFN) | vectors("ffn_gate_inp_shexp")
    both = vectors("attn_norm", "post_attention_norm") | feed_forward

    def layer(i: int) -> Shapes:
        if i == layers:
            joined = {"nextn.eh_proj.weight": (D, 2 * D)} | vectors("nextn.enorm", "nextn.hnorm")
            return both | attention(gates=4) | joined
        return both | (attention(gates=4) if i in full else net)

    own: dict[str, Any] = {
        "rope.freq_base": 1e6,
        "ssm.conv_kernel": 4,
        "ssm.state_size": STATE,
        "ssm.group_count": key_heads,
        "ssm.time_step_rank": value_heads,
        "ssm.inner_size": values,
    }
    if arch != "qwen3next":
        own["rope.dimension_sections"] = [2, 1, 1, 0]
    if arch != "qwen35":
        own |= {"expert_count": mixture, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FFN}
        own["expert_shared_feed_forward_length"] = FFN
    if drafts:
        own["nextn_predict_layers"] = 1
    return build(arch, layers + drafts, layer, own, keys, {} if tied else {"output.weight": (VOCAB, D)})


# What a file computes.


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return silu(gate) * up


def geglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gelu(gate) * up


def clamped(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate * sigmoid(1.702 * gate) * (up + 1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


class Run:
    """A file's numbers in float64 and tokens at the positions 0, 1, and so on."""

    def __init__(self, file: File, ids: list[int]):
        self.keys, self.ids, self.pos = file.keys, ids, np.arange(len(ids))
        self.w = {name: values.astype(np.float64) for name, values in file.tensors.items()}
        self.layers = file.keys["block_count"] - file.keys.get("nextn_predict_layers", 0)
        self.eps = file.keys["attention.layer_norm_rms_epsilon"]

    @cached_property
    def causal(self) -> np.ndarray:
        return self.pos[:, None] >= self.pos

    def within(self, window: int) -> np.ndarray:
        """Each query's last `window` keys, its own with them."""
        return self.causal & (self.pos > self.pos[:, None] - window)

    def flags(self, key: str, default: int) -> list[bool]:
        """For each layer; a number n is n - 1 times true and once false, over and over."""
        value = self.keys.get(key, default)
        return value if isinstance(value, list) else [i % value < value - 1 for i in range(self.layers)]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, self.w[f"{name}.weight"], self.eps)

    def plain(self, x: np.ndarray) -> np.ndarray:
        """A norm without a weight."""
        return rms_norm(x, np.float64(1), self.eps)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def mlp(self, p: str, x: np.ndarray, activation: Callable = swiglu, suffix: str = "") -> np.ndarray:
        gate, up = (self.linear(f"{p}ffn_{name}{suffix}", x) for name in ("gate", "up"))
        return self.linear(f"{p}ffn_down{suffix}", activation(gate, up))

    def qkv(self, p: str, h: np.ndarray, head: int, kv: int, gated: bool = False) -> list[np.ndarray]:
        """Heads [T, n, head] of q, k and v; a layer without v has k for it."""
        if f"{p}attn_qkv.weight" in self.w:
            rows = self.linear(f"{p}attn_qkv", h)
            parts = np.split(rows, [rows.shape[1] - 2 * kv * head, rows.shape[1] - kv * head], axis=1)
        else:
            parts = [self.linear(f"{p}attn_{x}", h) for x in "qkv" if f"{p}attn_{x}.weight" in self.w]
        q, k, v = parts if len(parts) == 3 else (*parts, parts[-1])
        return [x.reshape(len(h), -1, 2 * head if gated and x is q else head) for x in (q, k, v)]

    def turn(self, x: np.ndarray, base: float, *, interleaved: bool = False, scaled: bool = True, own: str = "") -> Any:
        """Rope of heads x; `own` is the ending of its keys, `scaled` whether the scaling keys and divisors apply."""
        n = self.keys.get(f"rope.dimension_count{own}", self.keys.get("rope.dimension_count", x.shape[-1]))
        scaling = {k.removeprefix("rope.scaling."): v for k, v in self.keys.items() if "rope.scaling" in k}
        spec = Spec(head=n, base=base, context=self.keys["context_length"], scaling=scaling if scaled else None)
        if scaled and "rope_freqs.weight" in self.w:
            spec = replace(spec, divisors=tuple(self.w["rope_freqs.weight"]))
        theta, magnitude = angles(spec)
        if (sections := self.keys.get("rope.dimension_sections")) is not None:
            # Time, height, width take pairs in turn while they have any left; the rest stay at the fourth position, 0.
            owner = [j % sum(sections) for j in range(len(theta))]
            theta = np.array([t if j < 3 * sections[j % 3] else 0.0 for t, j in zip(theta, owner, strict=True)])
        return rotate(x, self.pos, theta, magnitude, interleaved)

    def output(self, p: str, o: np.ndarray) -> np.ndarray:
        return self.linear(f"{p}attn_output", o.reshape(len(o), -1))

    def best(self, scores: np.ndarray) -> np.ndarray:
        return np.argsort(-scores, kind="stable")[: self.keys["expert_used_count"]]

    def experts(
        self, p: str, x: np.ndarray, scores: np.ndarray, recipe: Callable, activation: Callable = swiglu
    ) -> np.ndarray:
        """Token by token, expert by expert; their weights are `recipe(a token's scores, the best ones' indices)`."""
        out = np.zeros_like(x)
        for t, row in enumerate(scores):
            for e, weight in zip(self.best(row), recipe(row, self.best(row)), strict=True):
                out[t] += weight * self.expert(p, e, x[t], activation)
        return out

    def expert(self, p: str, e: int, x: np.ndarray, activation: Callable) -> np.ndarray:
        def product(name: str, x: np.ndarray) -> np.ndarray:
            bias = self.w.get(f"{p}ffn_{name}_exps.bias")
            return self.w[f"{p}ffn_{name}_exps.weight"][e] @ x + (0 if bias is None else bias[e])

        if f"{p}ffn_gate_up_exps.weight" in self.w:
            gate, up = np.split(product("gate_up", x), 2)
        else:
            gate, up = product("gate", x), product("up", x)
        scale = self.w.get(f"{p}ffn_down_exps.scale")
        return product("down", activation(gate, up)) * (1 if scale is None else scale[e])

    def head(self, x: np.ndarray, softcap: float | None = None) -> np.ndarray:
        y = x @ self.w.get("output.weight", self.w["token_embd.weight"]).T
        return softcap * np.tanh(y / softcap) if softcap else y


def renormalised(scores: np.ndarray, best: np.ndarray) -> np.ndarray:
    p = softmax(scores)[best]
    return p / p.sum()


def of_all(scores: np.ndarray, best: np.ndarray) -> np.ndarray:
    return softmax(scores)[best]


def of_chosen(scores: np.ndarray, best: np.ndarray) -> np.ndarray:
    return softmax(scores[best])


def run_decoder(m: Run, arch: str) -> np.ndarray:
    interleaved, x = arch in ("llama", "smollm3"), m.w["token_embd.weight"][m.ids]
    base, kv = m.keys.get("rope.freq_base", 1e4), m.keys["attention.head_count_kv"]
    for i in range(m.layers):
        p = f"blk.{i}."
        q, k, v = m.qkv(p, m.norm(f"{p}attn_norm", x), HEAD, kv)
        if arch == "olmoe":
            q, k = (
                m.norm(f"{p}attn_{n}_norm", y.reshape(len(x), -1)).reshape(y.shape) for n, y in (("q", q), ("k", k))
            )
        elif arch == "qwen3moe":
            q, k = m.norm(f"{p}attn_q_norm", q), m.norm(f"{p}attn_k_norm", k)
        if arch != "smollm3" or (i + 1) % 4:
            q, k = (m.turn(y, base, interleaved=interleaved) for y in (q, k))
        x = x + m.output(p, attend(q, k, v, m.causal, HEAD**-0.5))
        h = m.norm(f"{p}ffn_norm", x)
        if "expert_count" in m.keys:
            recipe = of_all if arch == "olmoe" else renormalised
            x = x + m.experts(p, h, m.linear(f"{p}ffn_gate_inp", h), recipe)
        else:
            x = x + m.mlp(p, h)
    return m.head(m.norm("output_norm", x))


def run_gemma3(m: Run) -> np.ndarray:
    x = D**0.5 * m.w["token_embd.weight"][m.ids]
    window = m.keys.get("attention.sliding_window", 0)
    sliding = m.flags("attention.sliding_window_pattern", 6) if window else [False] * m.layers
    scale = (D / m.keys["attention.head_count"] if m.layers == 62 else HEAD) ** -0.5
    for i in range(m.layers):
        p = f"blk.{i}."
        q, k, v = m.qkv(p, m.norm(f"{p}attn_norm", x), HEAD, m.keys["attention.head_count_kv"])
        q, k = m.norm(f"{p}attn_q_norm", q), m.norm(f"{p}attn_k_norm", k)
        base = m.keys.get("rope.freq_base_swa" if sliding[i] else "rope.freq_base", 1e4)
        q, k = (m.turn(y, base, scaled=not sliding[i]) for y in (q, k))
        o = attend(q, k, v, m.within(window) if sliding[i] else m.causal, scale)
        x = x + m.norm(f"{p}post_attention_norm", m.output(p, o))
        x = x + m.norm(f"{p}post_ffw_norm", m.mlp(p, m.norm(f"{p}ffn_norm", x), geglu))
    return m.head(m.norm("output_norm", x), m.keys.get("final_logit_softcapping"))


def run_gemma4(m: Run) -> np.ndarray:
    x = D**0.5 * m.w["token_embd.weight"][m.ids]
    sliding, width = m.keys["attention.sliding_window_pattern"], m.keys["embedding_length_per_layer_input"]
    own, kv, inputs = m.layers - m.keys.get("attention.shared_kv_layers", 0), {}, None
    if width:
        common = m.linear("per_layer_model_proj", x).reshape(len(x), m.layers, width) / D**0.5
        table = width**0.5 * m.w["per_layer_token_embd.weight"][m.ids].reshape(common.shape)
        inputs = (m.norm("per_layer_proj_norm", common) + table) / 2**0.5
    for i in range(m.layers):
        p, head = f"blk.{i}.", HEAD if sliding[i] else WIDE
        h = m.norm(f"{p}attn_norm", x)
        base = m.keys.get("rope.freq_base_swa", 1e4) if sliding[i] else m.keys["rope.freq_base"]
        turned = {"base": base, "scaled": not sliding[i], "own": "_swa" if sliding[i] else ""}
        if i < own:
            heads = m.keys["attention.head_count_kv"]
            q, k, v = m.qkv(p, h, head, heads[i] if isinstance(heads, list) else heads)
            kv[sliding[i]] = m.turn(m.norm(f"{p}attn_k_norm", k), **turned), m.plain(v)
        else:
            q = m.linear(f"{p}attn_q", h).reshape(len(x), -1, head)
        q = m.turn(m.norm(f"{p}attn_q_norm", q), **turned)
        seen = m.within(m.keys["attention.sliding_window"]) if sliding[i] else m.causal
        y = x + m.norm(f"{p}post_attention_norm", m.output(p, attend(q, *kv[sliding[i]], seen, 1.0)))
        z = m.mlp(p, m.norm(f"{p}ffn_norm", y), geglu)
        if "expert_count" in m.keys:
            scores = m.linear(f"{p}ffn_gate_inp", m.plain(y) / D**0.5 * m.w[f"{p}ffn_gate_inp.scale"])
            e = m.experts(p, m.norm(f"{p}pre_ffw_norm_2", y), scores, renormalised, geglu)
            z = m.norm(f"{p}post_ffw_norm_1", z) + m.norm(f"{p}post_ffw_norm_2", e)
        x = y + m.norm(f"{p}post_ffw_norm", z)
        if inputs is not None:
            g = geglu(m.linear(f"{p}inp_gate", x), inputs[:, i])
            x = x + m.norm(f"{p}post_norm", m.linear(f"{p}proj", g))
        x = x * m.w.get(f"{p}layer_output_scale.weight", 1.0)
    return m.head(m.norm("output_norm", x), m.keys.get("final_logit_softcapping", 30.0))


def run_gpt_oss(m: Run) -> np.ndarray:
    x, sliding = m.w["token_embd.weight"][m.ids], m.flags("attention.sliding_window_pattern", 2)
    for i in range(m.layers):
        p = f"blk.{i}."
        q, k, v = m.qkv(p, m.norm(f"{p}attn_norm", x), HEAD, m.keys["attention.head_count_kv"])
        base = m.keys["rope.freq_base"]
        q, k = (m.turn(y, m.keys.get("rope.freq_base_swa", base) if sliding[i] else base) for y in (q, k))
        seen = m.within(m.keys["attention.sliding_window"]) if sliding[i] else m.causal
        x = x + m.output(p, attend(q, k, v, seen, HEAD**-0.5, m.w[f"{p}attn_sinks.weight"]))
        h = m.norm(f"{p}post_attention_norm", x)
        x = x + m.experts(p, h, m.linear(f"{p}ffn_gate_inp", h), of_chosen, clamped)
    return m.head(m.norm("output_norm", x))


def run_llama4(m: Run) -> np.ndarray:
    x, base = m.w["token_embd.weight"][m.ids], m.keys.get("rope.freq_base", 1e4)
    base = m.keys.get("rope.freq_base_swa", base)
    block = m.causal & (m.pos >= m.pos[:, None] // BLOCK * BLOCK)
    for i in range(m.layers):
        p = f"blk.{i}."
        q, k, v = m.qkv(p, m.norm(f"{p}attn_norm", x), HEAD, m.keys["attention.head_count_kv"])
        if (i + 1) % 4:
            q, k = (m.turn(y, base, interleaved=True) for y in (q, k))
            if m.keys["expert_count"] != 128:
                q, k = m.plain(q), m.plain(k)
        else:
            q = q * (1 + 0.1 * np.log((m.pos + 1) // BLOCK + 1))[:, None, None]
        x = x + m.output(p, attend(q, k, v, block if (i + 1) % 4 else m.causal, HEAD**-0.5))
        h = m.norm(f"{p}ffn_norm", x)
        if (i + 1) % m.keys["interleave_moe_layer_step"]:
            x = x + m.mlp(p, h)
            continue
        y = m.mlp(p, h, suffix="_shexp")
        scores = m.linear(f"{p}ffn_gate_inp", h)
        for t, row in enumerate(scores):
            for e in m.best(row):
                y[t] += m.expert(p, e, sigmoid(row[e]) * h[t], swiglu)
        x = x + y
    return m.head(m.norm("output_norm", x))


def run_hybrid(m: Run, arch: str) -> np.ndarray:
    """The hidden state after the last norm, which is what a draft block sees."""
    x = m.w["token_embd.weight"][m.ids]
    default = [(i + 1) % m.keys.get("full_attention_interval", 4) != 0 for i in range(m.layers)]
    recurrent = m.keys.get("attention.recurrent_layers", default)
    for i in range(m.layers):
        x = hybrid_layer(m, arch, f"blk.{i}.", x, recurrent[i])
    return m.norm("output_norm", x)


def hybrid_layer(m: Run, arch: str, p: str, x: np.ndarray, recurrent: bool) -> np.ndarray:
    h = m.norm(f"{p}attn_norm", x)
    x = x + (delta_net(m, p, h, grouped=arch == "qwen3next") if recurrent else gated_attention(m, p, h))
    h = m.norm(f"{p}post_attention_norm", x)
    if "expert_count" not in m.keys:
        return x + m.mlp(p, h)
    y = m.experts(p, h, m.linear(f"{p}ffn_gate_inp", h), renormalised)
    gate = sigmoid(h @ m.w[f"{p}ffn_gate_inp_shexp.weight"])
    return x + y + gate[:, None] * m.mlp(p, h, suffix="_shexp")


def gated_attention(m: Run, p: str, h: np.ndarray) -> np.ndarray:
    q, k, v = m.qkv(p, h, HEAD, m.keys["attention.head_count_kv"], gated=True)
    q, gate = q[..., :HEAD], q[..., HEAD:]
    q, k = m.norm(f"{p}attn_q_norm", q), m.norm(f"{p}attn_k_norm", k)
    q, k = (m.turn(y, m.keys["rope.freq_base"]) for y in (q, k))
    return m.output(p, attend(q, k, v, m.causal, HEAD**-0.5) * sigmoid(gate))


def delta_net(m: Run, p: str, h: np.ndarray, grouped: bool) -> np.ndarray:
    keys, heads, kernel = (m.keys[f"ssm.{name}"] for name in ("group_count", "time_step_rank", "conv_kernel"))
    c = np.concatenate([np.zeros((kernel - 1, len(m.w[f"{p}attn_qkv.weight"]))), m.linear(f"{p}attn_qkv", h)])
    conv = m.w[f"{p}ssm_conv1d.weight"]
    y = silu(np.array([(c[t : t + kernel].T * conv).sum(1) for t in range(len(h))]))
    q, k, v = (a.reshape(len(h), -1, STATE) for a in np.split(y, [keys * STATE, 2 * keys * STATE], axis=1))
    q, k = (a / np.sqrt((a**2).sum(-1, keepdims=True) + m.eps) for a in (q, k))
    if f"{p}ssm_ba.weight" in m.w:  # for each key head, the rows of beta of its value heads, then those of alpha
        both = m.linear(f"{p}ssm_ba", h).reshape(len(h), keys, 2, heads // keys)
        beta, alpha = both[:, :, 0].reshape(len(h), heads), both[:, :, 1].reshape(len(h), heads)
    else:
        beta, alpha = m.linear(f"{p}ssm_beta", h), m.linear(f"{p}ssm_alpha", h)
    log_decay = m.w[f"{p}ssm_a"] * np.log1p(np.exp(alpha + m.w[f"{p}ssm_dt.bias"]))
    o = np.zeros_like(v)
    for n in range(heads):
        key, state = n // (heads // keys) if grouped else n % keys, np.zeros((STATE, STATE))
        for t in range(len(h)):
            state = np.exp(log_decay[t, n]) * state
            wrong = v[t, n] - state.T @ k[t, key]
            state = state + np.outer(k[t, key], sigmoid(beta[t, n]) * wrong)
            o[t, n] = state.T @ q[t, key] / STATE**0.5
    z = m.linear(f"{p}attn_gate", h).reshape(o.shape)
    return m.linear(f"{p}ssm_out", (m.norm(f"{p}ssm_norm", o) * silu(z)).reshape(len(h), -1))


def forward(file: File, ids: list[int]) -> np.ndarray:
    """Logits [T, V] after every token, in float64."""
    m = Run(file, ids)
    match file.arch:
        case "gemma3":
            return run_gemma3(m)
        case "gemma4":
            return run_gemma4(m)
        case "gpt-oss":
            return run_gpt_oss(m)
        case "llama4":
            return run_llama4(m)
        case "qwen35" | "qwen35moe" | "qwen3next":
            return m.head(run_hybrid(m, file.arch))
    return run_decoder(m, file.arch)


def hidden(file: File, ids: list[int]) -> np.ndarray:
    """A hybrid's output [T, D] of its last norm."""
    return run_hybrid(Run(file, ids), file.arch)


def draft(file: File, ids: list[int], before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The draft block on tokens and the hidden states before them: (its hidden states [T, D], logits [T, V])."""
    m = Run(file, ids)
    p = f"blk.{m.layers}."
    own = f"{p}nextn."
    e = m.w.get(f"{own}embed_tokens.weight", m.w["token_embd.weight"])[ids]
    y = m.linear(f"{own}eh_proj", np.concatenate([m.norm(f"{own}enorm", e), m.norm(f"{own}hnorm", before)], axis=1))
    y = hybrid_layer(m, file.arch, p, y, recurrent=False)
    y = m.norm(f"{own}shared_head_norm" if f"{own}shared_head_norm.weight" in m.w else "output_norm", y)
    head = m.w.get(f"{own}shared_head_head.weight")
    return y, m.head(y) if head is None else y @ head.T
