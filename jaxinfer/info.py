"""What a model file holds, and how it will run."""

import math
from collections import Counter
from typing import Any

import jax
from gguf.constants import LlamaFileType

from jaxinfer import gguf
from jaxinfer.loader import Description
from jaxinfer.segments import Segment


def parameters(file: gguf.File) -> int:
    return sum(math.prod(t.shape) for t in file.tensors.values())


def size_bytes(file: gguf.File) -> int:
    return sum(t.data.nbytes for t in file.tensors.values())


def title(file: gguf.File) -> str:
    """Architecture, size and file type in a few words: `qwen3 8B Q4_K_M`."""
    kinds = [
        t.name.split("_", 1)[1] for t in LlamaFileType if t == file.metadata.get("general.file_type")
    ]  # MOSTLY_F16
    words = [file.metadata.get(f"general.{key}", "") for key in ("architecture", "size_label")] + kinds
    return " ".join(str(word) for word in words if word)


def info(found: Description, ctx: int | None = None) -> dict[str, str]:
    """Facts by name, in the order to show them. The cache is that of `ctx` tokens, by default the model's context."""
    file, model = found.file, found.model
    slots = model.config.context if ctx is None else ctx
    if slots < 1:
        raise ValueError(f"{ctx=} must be at least 1")
    types = Counter(t.type.name for t in file.tensors.values())
    cache = jax.eval_shape(lambda: model.init_cache(found.params, 1, slots, chunk=512))
    weights = "expanded to float32" if found.expand else "packed as in the file"
    n, size = parameters(file), size_bytes(file)
    return {
        "file": file.path,
        "name": str(file.metadata.get("general.name", "none")),
        "architecture": title(file),
        "tensors": ", ".join(f"{count} {name}" for name, count in types.most_common()),
        "parameters": f"{n / 1e6:.2f} M",
        "size": f"{size / 2**20:.2f} MiB, {8 * size / n:.2f} bits a parameter",
        "context": f"{model.config.context} tokens",
        "shape": _keys(found, ("block_count", "embedding_length", "feed_forward_length", "attention.")),
        "rope": _keys(found, ("rope.",)),
        "tokenizer": _tokenizer(found),
        "segments": _segments(found.params),
        "cache": f"{_bytes(cache) / 2**20:.2f} MiB for {slots} tokens",
        "weights": f"{weights}, on {found.device.device_kind}",
        "activations": str(model.config.dtype),
        "ops": ", ".join(f"{name}: {getattr(op, '__name__', op)}" for name, op in model.ops._asdict().items()),
    }


def _keys(found: Description, prefixes: tuple[str, ...]) -> str:
    """The metadata of the architecture whose keys start so, arrays left out."""
    arch = f"{found.file.metadata['general.architecture']}."
    values = {key.removeprefix(arch): v for key, v in found.file.metadata.items() if key.startswith(arch)}
    plain = {key: v for key, v in values.items() if key.startswith(prefixes) and isinstance(v, str | int | float)}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()
    )


def _tokenizer(found: Description) -> str:
    if found.tokenizer is None:
        return "none"
    kind = " ".join(str(found.file.metadata.get(f"tokenizer.ggml.{key}", "")) for key in ("model", "pre")).strip()
    template = "with" if found.tokenizer.chat_template else "no"
    return f"{kind}, {found.tokenizer.vocab_size} tokens, {template} chat template"


def _segments(params: Any) -> str:
    """How the layers are looped over: `1 x 30` is one layer body that is run 30 times."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Segment))
    cuts = [(len(s.layers), s.repeats) for s in leaves if isinstance(s, Segment)]
    bodies = sum(length for length, _ in cuts)
    return ", ".join(f"{length} x {repeats}" for length, repeats in cuts) + f" (layer bodies compiled: {bodies})"


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
