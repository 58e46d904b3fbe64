"""Writes a GGUF file of a published shape with random weights, for benchmarks.

    python benchmarks/write_model.py qwen3-8b Q4_K_M out.gguf

Types per tensor follow llama.cpp's quantiser. Weights have mean zero and variance 1 / fan-in, so that activations stay
finite through all layers. A pool of 64 MiB of random blocks per type and fan-in fills all tensors, each from an offset
of its own: drawing every byte afresh would take minutes and change no measurement. Needs gguf (and so numpy) only.
"""

import argparse
import time
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

POOL_BYTES = 2**26
FILE_TYPES = {"BF16": 32, "Q8_0": 7, "Q4_K_M": 15}  # general.file_type
# Half-precision fields of a block: {byte offset: value relative to the first}. A Q4_K weight is d·s·q - dmin·m, with s
# and m alike and q 7.5 on average, so dmin = 7.5 d gives a mean of zero; the others are symmetric as they are.
HALVES = {"Q8_0": {0: 1.0}, "Q4_K": {0: 1.0, 2: 7.5}, "Q6_K": {208: 1.0}}


class Shape(NamedTuple):
    arch: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    ffn: int
    vocab: int
    rope_base: float
    eps: float
    context: int


SHAPES = {"qwen3-8b": Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 1e6, 1e-6, 40960)}


def more(i: int, n: int) -> bool:
    """Whether llama.cpp's *_M mixtures give layer i of n the finer type."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def tensors(s: Shape, file_type: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape in numpy order and type of every tensor, in the file's order."""
    base, fine = ("Q4_K", "Q6_K") if file_type == "Q4_K_M" else (file_type, file_type)
    yield "token_embd.weight", (s.vocab, s.width), base
    for i in range(s.layers):
        mixed = fine if more(i, s.layers) else base
        for name, shape, kind in (
            ("attn_norm", (s.width,), "F32"),
            ("attn_q", (s.heads * s.head, s.width), base),
            ("attn_k", (s.kv_heads * s.head, s.width), base),
            ("attn_v", (s.kv_heads * s.head, s.width), mixed),
            ("attn_q_norm", (s.head,), "F32"),
            ("attn_k_norm", (s.head,), "F32"),
            ("attn_output", (s.width, s.heads * s.head), base),
            ("ffn_norm", (s.width,), "F32"),
            ("ffn_gate", (s.ffn, s.width), base),
            ("ffn_up", (s.ffn, s.width), base),
            ("ffn_down", (s.width, s.ffn), mixed),
        ):
            yield f"blk.{i}.{name}.weight", shape, kind
    yield "output_norm.weight", (s.width,), "F32"
    yield "output.weight", (s.vocab, s.width), fine


def header(path: str, s: Shape, name: str, file_type: str) -> gguf.GGUFWriter:
    w = gguf.GGUFWriter(path, s.arch)
    w.add_name(f"{name} with random weights")
    w.add_file_type(FILE_TYPES[file_type])
    w.add_quantization_version(2)
    w.add_block_count(s.layers)
    w.add_context_length(s.context)
    w.add_embedding_length(s.width)
    w.add_feed_forward_length(s.ffn)
    w.add_head_count(s.heads)
    w.add_head_count_kv(s.kv_heads)
    w.add_key_length(s.head)
    w.add_value_length(s.head)
    w.add_layer_norm_rms_eps(s.eps)
    w.add_rope_freq_base(s.rope_base)
    w.add_vocab_size(s.vocab)
    w.add_tokenizer_model("none")
    return w


def pool(rng: np.random.Generator, kind: str, fan_in: int) -> np.ndarray:
    """About POOL_BYTES of random weights of a type as bytes [blocks, bytes of a block]."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    n = POOL_BYTES // size
    if kind == "F32":  # norms
        return (1 + 0.1 * rng.standard_normal((2**16, 1), np.float32)).view(np.uint8)
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


def write(path: str, s: Shape, name: str, file_type: str, seed: int) -> int:
    """Writes the file and returns its size in bytes."""
    rng = np.random.default_rng(seed)
    writer, plan, pools = header(path, s, name, file_type), [], {}
    for tensor, shape, kind in tensors(s, file_type):
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        stored = *shape[:-1], shape[-1] // block * size
        n_bytes = int(np.prod(stored))
        writer.add_tensor_info(tensor, stored, np.dtype(np.uint8), n_bytes, GGMLQuantizationType[kind])
        plan.append((kind, shape[-1], n_bytes))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout  # the header's one file
    file = writer.fout[0]
    for kind, fan_in, n_bytes in plan:
        writer.write_padding(file, file.tell())
        blocks = pools.get((kind, fan_in))
        if blocks is None:
            blocks = pools[kind, fan_in] = pool(rng, kind, fan_in)
        fill(file, blocks, n_bytes, int(rng.integers(len(blocks))))
    writer.write_padding(file, file.tell())
    total = file.tell()
    writer.close()
    return total


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
    start = time.perf_counter()
    total = write(args.path, shape, args.shape, args.file_type, args.seed)
    seconds = time.perf_counter() - start
    print(f"{args.path}: {total / 1e9:.2f} GB in {seconds:.1f} s ({total / 1e9 / seconds:.2f} GB/s)")


if __name__ == "__main__":
    main()
