"""Writes a GGUF file of a published shape with random weights, for benchmarks.

    python benchmarks/write_model.py qwen3-8b Q4_K_M out.gguf

A shape is the metadata of its file; its architecture's function lists the tensors that follow from it, and the types
are those that llama.cpp's quantiser gives by a tensor's name. Weights have mean zero and variance 1 / fan-in, so that
activations stay finite through all layers. A pool of 64 MiB of random blocks per type and fan-in fills all tensors,
each from an offset of its own: drawing every byte afresh would take minutes and change no measurement. Needs gguf (and
so numpy) only.
"""

import argparse
import math
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import dequantize

POOL_BYTES = 2**26
FILE_TYPES = {"BF16": 32, "Q8_0": 7, "Q4_K_M": 15}  # general.file_type
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # for rows that are no multiple of 256
UNQUANTISED = re.compile(r"ffn_gate_inp|ssm_conv1d|per_layer_model_proj")  # F32 in any file, as all vectors are
# Half-precision fields of a block: {byte offset: value relative to the first}. A Q4_K weight is d·s·q - dmin·m, with s
# and m alike and q 7.5 on average, so dmin = 7.5 d gives a mean of zero; the others are symmetric to half a code.
HALVES = {"Q5_0": {0: 1.0}, "Q8_0": {0: 1.0}, "Q4_K": {0: 1.0, 2: 7.5}, "Q6_K": {208: 1.0}}

type Keys = dict[str, Any]  # int: u32, float: f32, list: an array of bool or i32
type Tensors = Iterator[tuple[str, tuple[int, ...]]]  # name and shape in numpy order


class Shape(NamedTuple):
    """A published model. A tuple among its keys has one value per layer of a period, and is repeated to all layers."""

    arch: str
    layers: int  # without those of multi-token prediction
    vocab: int
    keys: Keys
    period: int = 1


def common(width: int, heads: int, kv_heads: int | tuple[int, ...], head: int, rope_base: float, context: int) -> Keys:
    return {
        "context_length": context,
        "embedding_length": width,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": rope_base,
    }


def moe(experts: int, used: int, ffn: int) -> Keys:
    return {"expert_count": experts, "expert_used_count": used, "expert_feed_forward_length": ffn}


def hybrid(value_heads: int) -> Keys:
    """Qwen3.5 and 3.6: three gated delta nets, then gated attention with a partial rotation; one MTP block."""
    return {
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        "full_attention_interval": 4,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.group_count": 16,
        "ssm.time_step_rank": value_heads,
        "ssm.inner_size": value_heads * 128,
        "nextn_predict_layers": 1,
    }


def windowed(window: int, shared: int = 0, per_layer: int = 0) -> Keys:
    """Gemma 4: five sliding layers, then a full one with wider heads."""
    return {
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "rope.dimension_count": 512,
        "rope.dimension_count_swa": 256,
        "rope.freq_base_swa": 1e4,
        "attention.sliding_window": window,
        "attention.sliding_window_pattern": (True,) * 5 + (False,),
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": per_layer,
        "final_logit_softcapping": 30.0,
    }


SHAPES = {
    "qwen3-8b": Shape("qwen3", 36, 151936, common(4096, 32, 8, 128, 1e6, 40960) | {"feed_forward_length": 12288}),
    "qwen3-30b-a3b": Shape(
        "qwen3moe", 48, 151936, common(2048, 32, 4, 128, 1e6, 40960) | {"feed_forward_length": 6144} | moe(128, 8, 768)
    ),
    "qwen3.6-27b": Shape(
        "qwen35",
        64,
        248320,
        common(5120, 24, 4, 256, 1e7, 262144) | {"feed_forward_length": 17408} | hybrid(48),
        period=4,
    ),
    "qwen3.6-35b-a3b": Shape(
        "qwen35moe",
        40,
        248320,
        common(2048, 16, 2, 256, 1e7, 262144)
        | hybrid(32)
        | moe(256, 8, 512)
        | {"expert_shared_feed_forward_length": 512},
        period=4,
    ),
    "gemma4-e4b": Shape(
        "gemma4",
        42,
        262144,
        common(2560, 8, 2, 512, 1e6, 131072) | {"feed_forward_length": 10240} | windowed(512, shared=18, per_layer=256),
        period=6,
    ),
    "gemma4-26b-a4b": Shape(
        "gemma4",
        30,
        262144,
        common(2816, 16, (8,) * 5 + (2,), 512, 1e6, 262144)
        | {"feed_forward_length": 2112}
        | windowed(1024)
        | moe(128, 8, 704),
        period=6,
    ),
    "gemma4-31b": Shape(
        "gemma4",
        60,
        262144,
        common(5376, 32, (16,) * 5 + (4,), 512, 1e6, 262144) | {"feed_forward_length": 21504} | windowed(1024),
        period=6,
    ),
}


def metadata(s: Shape) -> Keys:
    """The keys of the file, without the architecture's prefix."""
    if s.layers % s.period:
        raise ValueError(f"{s.layers} layers are not a multiple of {s.period}, the period of {s.arch}'s layers")
    repeated = {key: list(v) * (s.layers // s.period) for key, v in s.keys.items() if isinstance(v, tuple)}
    keys = s.keys | repeated | {"block_count": s.layers + s.keys.get("nextn_predict_layers", 0), "vocab_size": s.vocab}
    if "attention.shared_kv_layers" in keys:  # the first layer of each kind owns its cache in a trial, too
        keys["attention.shared_kv_layers"] = min(keys["attention.shared_kv_layers"], s.layers - s.period)
    return keys


def attention(k: Keys, gated: bool) -> Tensors:
    width, head = k["embedding_length"], k["attention.key_length"]
    rows, kv_rows = k["attention.head_count"] * head, k["attention.head_count_kv"] * head
    yield "attn_q.weight", (2 * rows if gated else rows, width)
    yield "attn_k.weight", (kv_rows, width)
    yield "attn_v.weight", (kv_rows, width)
    yield "attn_q_norm.weight", (head,)
    yield "attn_k_norm.weight", (head,)
    yield "attn_output.weight", (width, rows)


def delta_net(k: Keys) -> Tensors:
    width, state, value_heads = k["embedding_length"], k["ssm.state_size"], k["ssm.time_step_rank"]
    values = value_heads * state
    channels = 2 * k["ssm.group_count"] * state + values
    yield "attn_qkv.weight", (channels, width)
    yield "attn_gate.weight", (values, width)
    yield "ssm_conv1d.weight", (channels, k["ssm.conv_kernel"])
    yield "ssm_dt.bias", (value_heads,)
    yield "ssm_a", (value_heads,)
    yield "ssm_alpha.weight", (value_heads, width)
    yield "ssm_beta.weight", (value_heads, width)
    yield "ssm_norm.weight", (state,)
    yield "ssm_out.weight", (width, values)


def mlp(width: int, ffn: int, suffix: str = "", stack: tuple[int, ...] = ()) -> Tensors:
    yield f"ffn_gate{suffix}.weight", (*stack, ffn, width)
    yield f"ffn_up{suffix}.weight", (*stack, ffn, width)
    yield f"ffn_down{suffix}.weight", (*stack, width, ffn)


def feed_forward(k: Keys) -> Tensors:
    width, experts = k["embedding_length"], k.get("expert_count")
    if not experts:
        yield from mlp(width, k["feed_forward_length"])
        return
    yield "ffn_gate_inp.weight", (experts, width)
    yield from mlp(width, k["expert_feed_forward_length"], "_exps", (experts,))
    if shared := k.get("expert_shared_feed_forward_length"):
        yield "ffn_gate_inp_shexp.weight", (width,)
        yield from mlp(width, shared, "_shexp")


def qwen3_layer(k: Keys, i: int) -> Tensors:
    yield "attn_norm.weight", (k["embedding_length"],)
    yield from attention(k, gated=False)
    yield "ffn_norm.weight", (k["embedding_length"],)
    yield from feed_forward(k)


def qwen35_layer(k: Keys, i: int) -> Tensors:
    width = k["embedding_length"]
    mtp = i >= k["block_count"] - k["nextn_predict_layers"]
    yield "attn_norm.weight", (width,)
    yield from attention(k, gated=True) if mtp or (i + 1) % k["full_attention_interval"] == 0 else delta_net(k)
    yield "post_attention_norm.weight", (width,)
    yield from feed_forward(k)
    if mtp:
        yield "nextn.eh_proj.weight", (width, 2 * width)
        yield "nextn.enorm.weight", (width,)
        yield "nextn.hnorm.weight", (width,)
        yield "nextn.shared_head_norm.weight", (width,)


def gemma4_layer(k: Keys, i: int) -> Tensors:
    width, heads, kv_heads = k["embedding_length"], k["attention.head_count"], k["attention.head_count_kv"]
    sliding = k["attention.sliding_window_pattern"][i]
    head = k["attention.key_length_swa" if sliding else "attention.key_length"]
    kv_rows = head * (kv_heads[i] if isinstance(kv_heads, list) else kv_heads)
    yield "attn_norm.weight", (width,)
    yield "attn_q.weight", (heads * head, width)
    yield "attn_q_norm.weight", (head,)
    if i < k["block_count"] - k["attention.shared_kv_layers"]:
        yield "attn_k.weight", (kv_rows, width)
        yield "attn_k_norm.weight", (head,)
        if sliding or not isinstance(kv_heads, list):  # models with fewer heads on full layers use K as V there
            yield "attn_v.weight", (kv_rows, width)
    yield "attn_output.weight", (width, heads * head)
    yield "post_attention_norm.weight", (width,)
    yield "ffn_norm.weight", (width,)
    yield from mlp(width, k["feed_forward_length"])
    if experts := k.get("expert_count"):
        ffn = k["expert_feed_forward_length"]
        yield "ffn_gate_inp.weight", (experts, width)
        yield "ffn_gate_inp.scale", (width,)
        yield "pre_ffw_norm_2.weight", (width,)
        yield "ffn_gate_up_exps.weight", (experts, 2 * ffn, width)
        yield "ffn_down_exps.weight", (experts, width, ffn)
        yield "ffn_down_exps.scale", (experts,)
        yield "post_ffw_norm_1.weight", (width,)
        yield "post_ffw_norm_2.weight", (width,)
    yield "post_ffw_norm.weight", (width,)
    if per_layer := k["embedding_length_per_layer_input"]:
        yield "inp_gate.weight", (per_layer, width)
        yield "proj.weight", (width, per_layer)
        yield "post_norm.weight", (width,)
    yield "layer_output_scale.weight", (1,)


LAYERS = {
    "qwen3": qwen3_layer,
    "qwen3moe": qwen3_layer,
    "qwen35": qwen35_layer,
    "qwen35moe": qwen35_layer,
    "gemma4": gemma4_layer,
}


def tensors(s: Shape) -> Tensors:
    """All tensors of the file in its order."""
    k = metadata(s)
    width, blocks = k["embedding_length"], k["block_count"]
    yield "token_embd.weight", (s.vocab, width)
    if s.arch == "gemma4":
        yield "rope_freqs.weight", (k["rope.dimension_count"] // 2,)
        if per_layer := k["embedding_length_per_layer_input"]:
            yield "per_layer_token_embd.weight", (s.vocab, blocks * per_layer)
            yield "per_layer_model_proj.weight", (blocks * per_layer, width)
            yield "per_layer_proj_norm.weight", (per_layer,)
    for i in range(blocks):
        yield from ((f"blk.{i}.{name}", shape) for name, shape in LAYERS[s.arch](k, i))
    yield "output_norm.weight", (width,)
    if s.arch != "gemma4":  # which ties it to token_embd
        yield "output.weight", (s.vocab, width)


def more(i: int, n: int) -> bool:
    """Whether llama.cpp's *_M mixtures give tensor i of n the finer type."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def kinds(listed: Iterable[tuple[str, tuple[int, ...]]], file_type: str) -> Iterator[str]:
    """The type of every tensor, as llama.cpp's quantiser chooses it without an importance matrix."""
    shapes = dict(listed)
    values = [name for name in shapes if re.search(r"attn_(v|qkv)\.", name)]  # counted among those that exist
    downs = {name: int(name.split(".")[1]) for name in shapes if "ffn_down" in name}  # counted by layer
    finer = {name for i, name in enumerate(values) if more(i, len(values))}
    finer |= {name for name, i in downs.items() if more(i, 1 + max(downs.values()))}
    finer |= {"output.weight"} if "output.weight" in shapes else {"token_embd.weight", "per_layer_token_embd.weight"}
    for name, shape in shapes.items():
        if len(shape) == 1 or UNQUANTISED.search(name):
            yield "F32"
        elif file_type != "Q4_K_M":
            yield file_type
        else:
            kind = "Q6_K" if name in finer else "Q4_K"
            yield FALLBACK[kind] if shape[-1] % 256 else kind


class Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: str
    stored: tuple[int, ...]  # the shape in bytes

    @property
    def size(self) -> int:
        return math.prod(self.stored)


def plan(s: Shape, file_type: str) -> list[Entry]:
    listed, out = list(tensors(s)), []
    for (name, shape), kind in zip(listed, kinds(listed, file_type), strict=True):
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        out.append(Entry(name, shape, kind, (*shape[:-1], shape[-1] // block * size)))
    return out


def size_bytes(s: Shape, file_type: str) -> int:
    """The size of the file's data, which is all but its header."""
    align = GGUF_DEFAULT_ALIGNMENT
    return sum(-(-entry.size // align) * align for entry in plan(s, file_type))


def header(path: str, s: Shape, name: str, file_type: str) -> gguf.GGUFWriter:
    w = gguf.GGUFWriter(path, s.arch)
    w.add_name(f"{name} with random weights")
    w.add_file_type(FILE_TYPES[file_type])
    w.add_quantization_version(2)
    add = {int: w.add_uint32, float: w.add_float32, list: w.add_array}
    for key, value in metadata(s).items():
        add[type(value)](f"{s.arch}.{key}", value)
    w.add_tokenizer_model("none")
    return w


def numbers(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of an F32 tensor."""
    if name == "rope_freqs.weight":  # divisors: a quarter of the pairs rotate, the others do not move
        return np.where(np.arange(shape[0]) < shape[0] // 4, 1.0, 1e30)
    if name.endswith("ssm_a"):  # rates of decay
        return -np.exp(rng.uniform(math.log(0.05), math.log(8), shape))
    if name.endswith("ssm_dt.bias"):  # steps, after a softplus, of 0.001 to 0.1, as such layers are initialised
        return np.log(np.expm1(np.exp(rng.uniform(math.log(0.001), math.log(0.1), shape))))
    if len(shape) == 1 and not name.endswith("ffn_gate_inp_shexp.weight"):  # norms and scales
        return 1 + 0.1 * rng.standard_normal(shape)
    return rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5


def pool(rng: np.random.Generator, kind: str, fan_in: int, n_bytes: int) -> np.ndarray:
    """About n_bytes of random weights of a type as bytes [blocks, bytes of a block]."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    n = n_bytes // size
    if kind == "BF16":
        values = rng.standard_normal((n, 1), np.float32) * np.float32(fan_in**-0.5)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    raw = np.frombuffer(bytearray(rng.bytes(n * size)), np.uint8).reshape(n, size)
    sample = set_scales(raw[: 2**20 // block], kind, 1.0)
    unit = dequantize(sample, GGMLQuantizationType[kind]).std()
    return set_scales(raw, kind, fan_in**-0.5 / unit)


def set_scales(raw: np.ndarray, kind: str, d: float) -> np.ndarray:
    for offset, relative in HALVES[kind].items():
        raw[:, offset : offset + 2] = np.array([relative * d], np.float16).view(np.uint8)
    return raw


def fill(file: BinaryIO, blocks: np.ndarray, size: int, start: int) -> None:
    """Writes `size` bytes of blocks over and over, from block `start` on."""
    data, at = memoryview(blocks.reshape(-1)), start * blocks.shape[1]
    while size:
        piece = data[at : at + size]
        file.write(piece)
        size, at = size - len(piece), 0


def write(path: str, s: Shape, name: str, file_type: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    entries, largest, pools = plan(s, file_type), {}, {}
    writer = header(path, s, name, file_type)
    for entry in entries:
        kind = GGMLQuantizationType[entry.kind]
        writer.add_tensor_info(entry.name, entry.stored, np.dtype(np.uint8), entry.size, kind)
        key = entry.kind, entry.shape[-1]
        largest[key] = max(largest.get(key, 0), entry.size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout  # the header's one file
    file = writer.fout[0]
    for entry in entries:
        writer.write_padding(file, file.tell())
        if entry.kind == "F32":
            file.write(numbers(rng, entry.name, entry.shape).astype(np.float32).tobytes())
            continue
        key = entry.kind, entry.shape[-1]
        if key not in pools:
            pools[key] = pool(rng, *key, min(POOL_BYTES, largest[key]))
        fill(file, pools[key], entry.size, int(rng.integers(len(pools[key]))))
    writer.write_padding(file, file.tell())
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("file_type", choices=FILE_TYPES)
    parser.add_argument("path")
    parser.add_argument("--layers", type=int, help="in place of the published number, for small trials")
    parser.add_argument("--vocab", type=int, help="in place of the published number, for small trials")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = shape._replace(layers=args.layers or shape.layers, vocab=args.vocab or shape.vocab)
    try:
        size = size_bytes(shape, args.file_type)
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    write(args.path, shape, args.shape, args.file_type, args.seed)
    seconds = time.perf_counter() - start
    print(f"{args.path}: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s)")


if __name__ == "__main__":
    main()
