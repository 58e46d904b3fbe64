"""Tiny model files and what they must compute: gguf-py writes the files, float64 numpy has the formulae.

A test changes the metadata or the weights before it saves them, so that each kind of file is one line.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quantize

from jaxinfer.quants import FORMATS


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A model's numbers. By default nothing is a multiple of anything."""

    arch: str = "llama"
    layers: int = 2
    width: int = 40
    heads: int = 5
    kv_heads: int = 1
    head: int = 24
    ffn: int = 36
    vocab: int = 301
    context: int = 512
    eps: float = 1e-5
    base: float = 10000.0
    rotated: int | None = None  # elements of a head; None: all
    scaling: Mapping[str, Any] | None = None  # the keys under rope.scaling
    divisors: tuple[float, ...] | None = None  # rope_freqs
    tied: bool = True
    biases: tuple[str, ...] = ()  # of these projections, and "output"
    fused: bool = False  # q, k and v as one tensor
    tokenizer: bool = False  # byte-level, with two merges; needs a vocabulary of at least 259


def keys(spec: Spec) -> dict[str, Any]:
    """The metadata of a model's file."""
    model = {
        "block_count": spec.layers,
        "context_length": spec.context,
        "embedding_length": spec.width,
        "feed_forward_length": spec.ffn,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head,
        "attention.value_length": spec.head,
        "attention.layer_norm_rms_epsilon": spec.eps,
        "rope.freq_base": spec.base,
    }
    if spec.rotated is not None:
        model["rope.dimension_count"] = spec.rotated
    model |= {f"rope.scaling.{k}": v for k, v in (spec.scaling or {}).items()}
    out: dict[str, Any] = {"general.architecture": spec.arch}
    out |= {f"{spec.arch}.{k}": v for k, v in model.items()}
    return out | (vocabulary(spec.vocab) if spec.tokenizer else {})


def vocabulary(size: int) -> dict[str, Any]:
    """GPT-2's alphabet of bytes, two merges, an end token, and unused tokens up to a size."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    tokens = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))] + ["th", "the", "<end>"]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3] + [5] * (size - 259),  # normal, control, unused
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.eos_token_id": 258,
    }


def weights(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """All tensors by name, f32: matrices that keep a vector's length, norms about 1."""
    rng = np.random.default_rng(seed)
    q, k = spec.heads * spec.head, spec.kv_heads * spec.head
    out: dict[str, np.ndarray] = {}

    def norm(name: str, size: int) -> None:
        out[f"{name}.weight"] = rng.uniform(0.5, 1.5, size).astype(np.float32)

    def matrix(name: str, rows: int, columns: int, bias: bool = False) -> None:
        out[f"{name}.weight"] = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        if bias:
            out[f"{name}.bias"] = rng.standard_normal(rows).astype(np.float32)

    out["token_embd.weight"] = rng.standard_normal((spec.vocab, spec.width), np.float32)
    for i in range(spec.layers):
        p = f"blk.{i}."
        norm(f"{p}attn_norm", spec.width)
        norm(f"{p}ffn_norm", spec.width)
        shapes = {"attn_q": (q, spec.width), "attn_k": (k, spec.width), "attn_v": (k, spec.width)}
        shapes |= {"attn_output": (spec.width, q), "ffn_gate": (spec.ffn, spec.width)}
        shapes |= {"ffn_up": (spec.ffn, spec.width), "ffn_down": (spec.width, spec.ffn)}
        for name, shape in shapes.items():
            matrix(p + name, *shape, bias=name in spec.biases)
        if spec.arch == "qwen3":
            norm(f"{p}attn_q_norm", spec.head)
            norm(f"{p}attn_k_norm", spec.head)
        if spec.fused:
            fuse(out, p)
    norm("output_norm", spec.width)
    if not spec.tied:
        matrix("output", spec.vocab, spec.width)
    if "output" in spec.biases:
        out["output.bias"] = rng.standard_normal(spec.vocab).astype(np.float32)
    if spec.divisors:
        out["rope_freqs.weight"] = np.array(spec.divisors, np.float32)
    return out


def fuse(tensors: dict[str, np.ndarray], prefix: str) -> None:
    """Puts a layer's q, k and v into one tensor, and their biases if there are any."""
    for kind in ("weight", "bias"):
        if f"{prefix}attn_q.{kind}" in tensors:
            parts = [tensors.pop(f"{prefix}attn_{x}.{kind}") for x in "qkv"]
            tensors[f"{prefix}attn_qkv.{kind}"] = np.concatenate(parts)


def save(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, GGMLQuantizationType] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a file and returns its tensors as a reader must see them, f32.

    `types` gives the type of the tensors whose name contains a key; the others are F32, or as their array is. Types
    that gguf-py cannot encode get random blocks instead of the values.
    """
    writer = GGUFWriter(path, str(metadata.get("general.architecture", "")))
    if "general.architecture" not in metadata:
        writer.kv_data[0].clear()
    for key, value in metadata.items():
        if key != "general.architecture" or not isinstance(value, str):
            writer.kv_data[0].pop(key, None)
            items = value if isinstance(value, list) else [value]
            kind = _value_type(items[0])
            if isinstance(value, list):
                writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)
            else:
                writer.add_key_value(key, value, kind)
    seen = {}
    for i, (name, values) in enumerate(tensors.items()):
        kind = next((kind for part, kind in (types or {}).items() if part in name), None)
        if kind is None:
            writer.add_tensor(name, values)
            seen[name] = values
            continue
        try:
            raw = quantize(values, kind)
        except NotImplementedError:
            raw = random_blocks(kind, values.shape, values.shape[-1] ** -0.5, seed=i)
        writer.add_tensor(name, raw, raw_dtype=kind)
        seen[name] = dequantize(raw, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return seen


def _value_type(value: Any) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.UINT32 if 0 <= value < 2**32 else GGUFValueType.INT64
    return GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.STRING


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, ...], std: float, seed: int = 0) -> np.ndarray:
    """A weight of random codes as bytes [*shape[:-1], bytes of a row], its values about `std` in size."""
    form, rng = FORMATS[kind], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // form.block, form.size), np.uint8)
    planes = form.split(raw)
    halves = [plane for plane in planes.values() if plane.dtype == np.float16]
    for plane in halves:
        plane[...] = rng.uniform(0.5, 1, plane.shape)
    if "e" in planes:  # a block's exponent, MXFP4
        planes["e"][...] = rng.integers(119, 122, planes["e"].shape)
    raw = raw.reshape(*shape[:-1], -1)
    size = dequantize(raw, kind).std()
    for plane in halves:
        plane[...] *= std / size
    return raw


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def angles(spec: Spec) -> tuple[np.ndarray, float]:
    """Each pair's angle per position, and the factor on cos and sin."""
    n, scaling = spec.rotated or spec.head, dict(spec.scaling or {})
    kind, factor = scaling.get("type", "linear"), scaling.get("factor", 1.0)
    magnitude = scaling.get("attn_factor", 1.0)
    j = np.arange(n // 2)
    theta = spec.base ** (-2.0 * j / n) / np.array(spec.divisors or 1.0)
    if kind == "linear":
        return theta / factor, magnitude
    if kind == "none":
        return theta, magnitude
    original = scaling.get("original_context_length", spec.context)
    fast, slow = (n * np.log(original / (2 * np.pi * turns)) / (2 * np.log(spec.base)) for turns in (32, 1))
    low, high = max(0, np.floor(fast)), min(n - 1, np.ceil(slow))
    keep = 1 - np.clip((j - low) / max(0.001, high - low), 0, 1)
    return theta / factor * (1 - keep) + theta * keep, magnitude * (1 + 0.1 * np.log(factor))


def rotate(x: np.ndarray, pos: np.ndarray, theta: np.ndarray, magnitude: float, interleaved: bool) -> np.ndarray:
    """Each pair of elements of x [T, heads, H] as a complex number, turned by its position [T]."""
    n = 2 * len(theta)
    first, second = (np.arange(0, n, 2), np.arange(1, n, 2)) if interleaved else np.split(np.arange(n), 2)
    turned = (x[..., first] + 1j * x[..., second]) * magnitude * np.exp(1j * pos[:, None, None] * theta)
    out = x.copy()
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, scale: float, sinks: np.ndarray | None = None
) -> np.ndarray:
    """Attention of q [T, N, H] to k, v [S, K, H], query by query and head by head; zeros where nothing is seen.

    A head's sink is the score of one more key, whose value is zero.
    """
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for t, head in np.ndindex(q.shape[:2]):
        if seen[t].any():
            scores = k[seen[t], head // group] @ q[t, head] * scale
            e, sink = np.exp(scores - scores.max()), 0.0
            if sinks is not None:
                sink = np.exp(sinks[head] - scores.max())
            out[t, head] = e / (e.sum() + sink) @ v[seen[t], head // group]
    return out


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def forward(spec: Spec, stored: Mapping[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits [T, V] after every token, in float64."""
    w = {name: values.astype(np.float64) for name, values in stored.items()}
    pos, (theta, magnitude) = np.arange(len(ids)), angles(spec)
    causal = pos[:, None] >= pos

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def heads(x: np.ndarray, norm: str) -> np.ndarray:
        x = x.reshape(len(ids), -1, spec.head)
        return rms_norm(x, w[norm], spec.eps) if norm in w else x

    def turn(x: np.ndarray) -> np.ndarray:
        return rotate(x, pos, theta, magnitude, spec.arch == "llama")

    x = w["token_embd.weight"][ids]
    for i in range(spec.layers):
        p = f"blk.{i}."
        h = rms_norm(x, w[f"{p}attn_norm.weight"], spec.eps)
        if spec.fused:
            k = spec.kv_heads * spec.head
            q, k, v = np.split(linear(f"{p}attn_qkv", h), [spec.heads * spec.head, spec.heads * spec.head + k], axis=-1)
        else:
            q, k, v = (linear(f"{p}attn_{name}", h) for name in "qkv")
        q, k = heads(q, f"{p}attn_q_norm.weight"), heads(k, f"{p}attn_k_norm.weight")
        o = attend(turn(q), turn(k), heads(v, ""), causal, spec.head**-0.5)
        x = x + linear(f"{p}attn_output", o.reshape(len(ids), -1))
        h = rms_norm(x, w[f"{p}ffn_norm.weight"], spec.eps)
        x = x + linear(f"{p}ffn_down", silu(linear(f"{p}ffn_gate", h)) * linear(f"{p}ffn_up", h))
    head = w.get("output.weight", w["token_embd.weight"])
    return rms_norm(x, w["output_norm.weight"], spec.eps) @ head.T + w.get("output.bias", 0.0)
