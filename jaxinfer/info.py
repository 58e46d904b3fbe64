"""What a model file holds, and how it will run."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
from gguf.constants import LlamaFileType

from jaxinfer import engine, gguf
from jaxinfer.cache import KVCache
from jaxinfer.generate import default_chunk
from jaxinfer.layers.attention import AttentionSpec
from jaxinfer.layers.delta import DeltaSpec
from jaxinfer.layers.mlp import MlpParams
from jaxinfer.layers.moe import MoeParams, MoeSpec
from jaxinfer.layers.rope import Rope
from jaxinfer.loader import Description, Source
from jaxinfer.segments import Layers

STILL = 1e-12  # radians a token: a pair that turns no faster is one that a file's divisors mean to stand still


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
    config, params = model.config, found.params
    tokens = config.context if ctx is None else ctx
    if tokens < 1:
        raise ValueError(f"{ctx=} must be at least 1")
    types = Counter(t.type.name for t in file.tensors.values())
    weights = "expanded to float32" if found.expand else "packed as in the file"
    n, size = parameters(file), size_bytes(file)
    facts = {
        "file": file.path,
        "name": str(file.metadata.get("general.name", "none")),
        "architecture": title(file),
        "tensors": ", ".join(f"{count} {name}" for name, count in types.most_common()),
        "parameters": f"{n / 1e6:.2f} M",
        "size": f"{_size(size)}, {8 * size / n:.2f} bits a parameter",
        "context": f"{config.context} tokens",
        "tokenizer": _tokenizer(found),
        "layers": _layers(params),
        "width": _width(params, config.width),
        "attention": _by_kind({kind: _attention(spec) for kind, spec in config.mixers}),
        "rope": _by_kind({kind: _rope(spec.rope) for kind, spec in config.mixers if isinstance(spec, AttentionSpec)}),
        "rope keys": _keys(found, "rope."),
        "experts": _experts(params, config.moe),
        "head": _head(params, config),
        "segments": _segments(params),
        "cache": _cache(found, tokens),
        "weights": f"{weights}, on {found.device.device_kind}",
        "activations": str(config.dtype),
        "ops": ", ".join(f"{name}: {getattr(op, '__name__', op)}" for name, op in model.ops._asdict().items()),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _by_kind(facts: dict[str, str]) -> str:
    return "; ".join(f"{kind}: {fact}" for kind, fact in facts.items())


def _counts(words: Iterable[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def _every(*parts: Layers) -> list[Any]:
    """One after the other, the parameters that stand for each layer."""
    return [layers.stacks[k] for layers in parts for k, _ in layers.places()]


def _layers(params: Any) -> str:
    own, sharing = _every(params.layers), _every(params.sharing)
    out = f"{len(own) + len(sharing)}: {_counts(layer.kind for layer in own)}"
    if sharing:
        out += f"; {_counts(layer.kind for layer in sharing)} that share keys and values"
    return out if params.draft is None else f"{out}; and one that drafts a second token"


def _feed_forward(layer: Any) -> list[MlpParams | MoeParams]:
    """A layer's networks; a shared expert is part of its mixture."""
    kinds = (MlpParams, MoeParams)
    return [x for x in jax.tree.leaves(layer, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(x, kinds)]


def _width(params: Any, width: int) -> str:
    """The width of the layers' input, and of the feed-forward networks that are no experts."""
    networks = [ffn for layer in _every(params.layers, params.sharing) for ffn in _feed_forward(layer)]
    found = sorted({_shape(ffn.gate.weight)[0] for ffn in networks if isinstance(ffn, MlpParams)})
    return f"{width}, feed-forward {' or '.join(map(str, found))}" if found else str(width)


def _experts(params: Any, spec: MoeSpec | None) -> str:
    """What the mixtures of experts have in common; nothing where there are none."""
    layers = _every(params.layers, params.sharing)
    mixtures = [ffn for layer in layers for ffn in _feed_forward(layer) if isinstance(ffn, MoeParams)]
    if spec is None or not mixtures:
        return ""
    experts, _, ffn = _shape(mixtures[0].experts.down)
    out = f"{experts} of width {ffn}, {spec.used} a token by {spec.routing.__name__}"
    if mixtures[0].shared is not None:
        out += f", a shared one of width {_shape(mixtures[0].shared.gate.weight)[0]}"
    return f"{out}, in {len(mixtures)} layers of {len(layers)}"


def _shape(weight: Any) -> tuple[int, ...]:
    """Of one layer's weight, which is a Source."""
    return weight.tensors[0].shape


def _attention(spec: AttentionSpec | DeltaSpec) -> str:
    if isinstance(spec, DeltaSpec):
        heads = f"{spec.value_heads} heads of {spec.width}, {spec.key_heads} of keys"
        return f"{heads}, convolution over {spec.kernel} tokens"
    words = [f"{spec.heads} heads of {spec.width}, {spec.kv_heads} of keys and values"]
    if spec.window:
        words.append(f"{'blocks of' if spec.aligned else 'window'} {spec.window}")
    if spec.gated:
        words.append("gated")
    if not math.isclose(spec.scale, spec.width**-0.5):
        words.append(f"scale {spec.scale:g}")
    return ", ".join(words)


def _rope(rope: Rope | None) -> str:
    """The pairs that turn, and how far the fastest and the slowest do from one token to the next."""
    if rope is None:
        return "none"
    turning = [f for f in rope.frequencies if f > STILL]
    pairs = f"{len(turning)} pairs of {'neighbours' if rope.interleaved else 'halves'}"
    if len(turning) < len(rope.frequencies):
        pairs += f" ({len(rope.frequencies) - len(turning)} more stand still)"
    out = f"{pairs}, {max(turning, default=0):.3g} to {min(turning, default=0):.3g} radians a token"
    return out if rope.magnitude == 1 else f"{out}, magnitude {rope.magnitude:.4g}"


def _keys(found: Description, prefix: str) -> str:
    """The metadata of the architecture whose keys start so, arrays left out."""
    prefix = f"{found.file.metadata['general.architecture']}.{prefix}"
    values = {key.removeprefix(prefix): v for key, v in found.file.metadata.items() if key.startswith(prefix)}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
        if isinstance(value, str | int | float)
    )


def _head(params: Any, config: Any) -> str:
    head = f"of {config.vocab} tokens, " + ("the embedding's weights" if params.head is None else "its own weights")
    return head if config.softcap is None else f"{head}, soft cap {config.softcap:g}"


def _tokenizer(found: Description) -> str:
    if found.tokenizer is None:
        return "none"
    kind = " ".join(str(found.file.metadata.get(f"tokenizer.ggml.{key}", "")) for key in ("model", "pre")).strip()
    template = "with" if found.tokenizer.chat_template else "no"
    return f"{kind}, {found.tokenizer.vocab_size} tokens, {template} chat template"


def _segments(params: Any) -> str:
    """How the layers are looped over: `1 x 30` is one layer body that is run 30 times."""
    trunk = [(layers, segment) for layers in (params.layers, params.sharing) for segment in layers.segments]
    bodies = [layers.stacks[k] for layers, (pattern, _) in trunk for k in pattern]
    cuts = ", ".join(f"{len(pattern)} x {repeats}" for _, (pattern, repeats) in trunk)
    return f"{cuts} (layer bodies compiled: {len(bodies)}, distinct: {len(set(map(_signature, bodies)))})"


def _signature(layer: Any) -> Any:
    leaves, tree = jax.tree.flatten(layer, is_leaf=lambda x: isinstance(x, Source))
    return tree, tuple((x.tensors[0].type, x.tensors[0].shape) for x in leaves)


def _cache(found: Description, tokens: int) -> str:
    """What each kind of layer keeps of so many tokens, at the chunk that prompts are taken in by default."""
    slots, chunk = engine.slots_for(tokens), default_chunk(found.device)
    cache = jax.eval_shape(lambda: found.model.init_cache(found.params, 1, slots, chunk=chunk))
    sizes: Counter[str] = Counter()
    for layer, one in zip(found.params.layers.stacks, cache, strict=True):
        what = "state"
        if isinstance(one, KVCache):
            what = f"{'ring of ' if one.k.shape[3] < slots else ''}{one.k.shape[3]} slots"
        sizes[f"{layer.kind}: {what}"] += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
    parts = "".join(f"{what}, {_size(size)}; " for what, size in sizes.items())
    return f"{parts}in all {_size(sizes.total())} for {tokens} tokens in chunks of {chunk}"


def _size(n: int) -> str:
    unit, size = next((name, size) for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 1)) if n >= size)
    return f"{n / max(size, 2**10):.2f} {unit}"
