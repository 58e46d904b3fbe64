"""Files of every architecture with one thing wrong: a clear ValueError, or a model; never another error, never a hang.

`loader.describe` reads no weights and makes nothing of a size that a file claims, so that a case takes milliseconds.
"""

import re
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from goldens import model_path
from models import save

from jaxinfer import gguf, loader

MODELS = (
    "gemma3", "gemma4-e", "gemma4-moe", "gpt-oss", "llama-moe", "llama4", "olmoe", "qwen35-mtp", "qwen35moe",
    "qwen3moe", "qwen3next",
)  # fmt: skip
INFORMATION = ("vocab_size", "gpt-oss.feed_forward_length")  # nothing depends on what they say
FIT = "the tensors do not fit the architecture: "
OPTIONAL = re.compile(
    r"\.bias$|layer_output_scale|ffn_down_exps\.scale|shared_head_norm|^output\.weight|attn_v\.weight"
)


@pytest.fixture
def refusal(monkeypatch):
    """The message with which a file is refused, which names the file and one of the names; None if it is not."""

    def describe(file: gguf.File, *names: str) -> str | None:
        monkeypatch.setattr(gguf, "read", lambda path: file)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loader.describe(file.path, expand=False)
        except ValueError as error:
            message = str(error)
            assert file.path in message
            assert any(name in message for name in names), message
            return message
        return None

    return describe


def without_vocabulary(name: str) -> gguf.File:
    file = gguf.read(model_path(name))
    return file._replace(metadata={k: v for k, v in file.metadata.items() if not k.startswith("tokenizer.")})


def changed(file: gguf.File, key: str, value: Any) -> gguf.File:
    """The file with another value of one key; None: without it."""
    rest = {k: v for k, v in file.metadata.items() if k != key}
    return file._replace(metadata=rest if value is None else rest | {key: value})


@pytest.mark.parametrize("name", MODELS)
def test_every_key_of_the_metadata(name, refusal):
    file = without_vocabulary(name)
    arch = file.metadata["general.architecture"]
    layers = file.metadata[f"{arch}.block_count"]
    # Refused, or contradicted by the tensors, or right.
    either = None, 0, np.array([0] + [2] * (layers - 1), np.uint32), 2**31 - 1
    for key in (key for key in file.metadata if key.startswith(f"{arch}.")):
        for value in either:
            refusal(changed(file, key, value), f"{arch}.", FIT)
        for value in ("x", float("nan"), -1, True, np.array([2] * layers + [1], np.int32)):
            message = refusal(changed(file, key, value), key)
            assert message or key.endswith(INFORMATION), (key, value)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_made_of_a_size_that_is_only_claimed(name, refusal):
    file = without_vocabulary(name)
    arch = file.metadata["general.architecture"]
    huge = 2**31 - 1
    for key in ("block_count", "embedding_length", "expert_count", "attention.head_count", "ssm.state_size"):
        tracemalloc.start()
        message = refusal(changed(file, f"{arch}.{key}", huge), f"{arch}.", FIT)
        assert tracemalloc.get_traced_memory()[1] < 2**25
        tracemalloc.stop()
        assert message or f"{arch}.{key}" not in file.metadata


def first_tensors(file: gguf.File) -> dict[str, gguf.Tensor]:
    """Of all tensors of the same name and shape in different layers, one. rope_freqs has errors of its own."""
    firsts = {(re.sub(r"^blk\.\d+\.", "", n), t.shape): t for n, t in file.tensors.items() if n != "rope_freqs.weight"}
    return {t.name: t for t in firsts.values()}


@pytest.mark.parametrize("name", MODELS)
def test_a_tensor_that_is_missing(name, refusal):
    file = without_vocabulary(name)
    for lost in first_tensors(file):
        rest = file._replace(tensors={n: t for n, t in file.tensors.items() if n != lost})
        assert refusal(rest, f"{lost} [", FIT) or OPTIONAL.search(lost), lost


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_that_is_wrong_is_named(name, refusal):
    file = without_vocabulary(name)
    some = first_tensors(file)

    def named(change: Callable[[gguf.Tensor], gguf.Tensor], what: str) -> None:
        message = refusal(file._replace(tensors=file.tensors | {n: change(t) for n, t in some.items()}), FIT)
        assert message
        assert [n for n in some if f"{n} {what}" not in message] == []

    named(lambda t: t._replace(shape=(*t.shape[:-1], t.shape[-1] + 1)), "has the shape")
    named(lambda t: t._replace(shape=(*t.shape, 2)), "has the shape")
    named(lambda t: t._replace(type=GGMLQuantizationType.TQ1_0), "has the type TQ1_0, not one of")
    extra = {f"{n}.other": t for n, t in some.items()}
    message = refusal(file._replace(tensors=file.tensors | extra), FIT)
    assert message
    assert [n for n in extra if f"{n} is not known" not in message] == []


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen3moe", "expert_group_count", 2),
        ("gemma4-moe", "expert_group_used_count", 4),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gemma3", "expert_count", 8),
        ("gpt-oss", "attention.causal", False),
        ("olmoe", "rope.scaling.type", "longrope"),
        ("qwen35-mtp", "nextn_predict_layers", 2),
        ("qwen3moe", "nextn_predict_layers", 1),
        ("qwen3next", "nextn_predict_layers", 1),
        ("llama4", "attention.chunk_size", 4096),
        ("llama4", "attention.sliding_window", 0),
        ("llama4", "attention.sliding_window_pattern", 2),
        ("qwen35-mtp", "rope.dimension_sections", [0, 0, 0, 0]),
    ],
)
def test_a_feature_that_is_not_supported(tmp_path, name, key, value):
    file = without_vocabulary(name)
    key = f"{file.metadata['general.architecture']}.{key}"
    path = rewritten(tmp_path, changed(file, key, value))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {key} ")):
        loader.describe(path)


@pytest.mark.parametrize("key", ["expert_gating_func", "expert_weights_norm", "attention.scale", "no_such_key"])
def test_a_key_that_is_not_known_warns(tmp_path, key):
    path = rewritten(tmp_path, changed(without_vocabulary("qwen3moe"), f"qwen3moe.{key}", 2))
    with pytest.warns(UserWarning, match=f"does not know: qwen3moe.{key}$"):
        loader.describe(path)


def rewritten(folder: Any, file: gguf.File) -> str:
    """A file's contents in a file of their own, written by gguf-py."""
    metadata = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.metadata.items()}
    path = str(folder / "model.gguf")
    save(path, metadata, {t.name: t.data.view("<f4").reshape(t.shape) for t in file.tensors.values()})
    return path
