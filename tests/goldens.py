"""The models and values of tests/goldens, unpacked when asked for; the README there says how they are packed."""

import json
import lzma
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
MODELS = sorted(path.name.removesuffix(".gguf.xz") for path in GOLDENS.glob("*.gguf.xz"))
PROMPTS = sorted(path.stem for path in GOLDENS.glob("*.npz") if path.stem.split(".")[0] in MODELS)  # <model>.<prompt>

_DRAWS = json.loads((GOLDENS / "draws.json").read_text())
F32 = sorted(_DRAWS)  # the models with weights of that type: one or more of every architecture
_FOLDER = TemporaryDirectory(prefix="jaxinfer-goldens-")  # this process's own; goes when it ends


class Golden(NamedTuple):
    tokens: list[int]  # T
    positions: np.ndarray  # int32 [P], those whose logits are kept
    logits: np.ndarray  # f32 [P, V]
    greedy_tokens: list[int]  # 16
    mtp_logits: np.ndarray | None  # f32 [P, V], of models with an MTP block


def golden(prompt: str) -> Golden:
    """What llama.cpp makes of a prompt."""
    with np.load(GOLDENS / f"{prompt}.npz") as arrays:
        tokens, greedy = arrays["tokens"].tolist(), arrays["greedy_tokens"].tolist()
        return Golden(tokens, arrays["positions"], arrays["logits"], greedy, arrays.get("mtp_logits"))


@cache
def model_path(name: str) -> Path:
    """A model's file, unpacked; F32 weights are drawn again."""
    data = bytearray(lzma.decompress((GOLDENS / f"{name}.gguf.xz").read_bytes()))
    if recipe := _DRAWS.get(name):
        rng, total = np.random.default_rng(recipe["seed"]), 0.0
        for offset, count, kind, mean, std in recipe["draws"]:
            values = (mean + std * rng.standard_normal(count, kind)).astype("<f4")
            if offset is not None:
                data[offset : offset + values.nbytes] = values.tobytes()
                total += values.sum(dtype=np.float64)
        # Another stream of numbers is off by hundreds; in the last place they may differ from one C library to another.
        assert abs(total - recipe["sum"]) < 1e-2, f"{name}: numpy {np.__version__} draws other numbers than 2.5 did"
    path = Path(_FOLDER.name) / f"{name}.gguf"
    path.write_bytes(data)
    return path
