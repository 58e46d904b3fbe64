"""LLM inference from GGUF files as pure JAX functions."""

from jaxinfer.engine import State, decode, left_pad, prefill
from jaxinfer.generate import Piece, Stats, generate, score, stream
from jaxinfer.loader import Loaded, Model, load
from jaxinfer.ops import REFERENCE, Ops
from jaxinfer.sample import Sampler
from jaxinfer.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "REFERENCE",
    "Loaded",
    "Model",
    "Ops",
    "Piece",
    "Sampler",
    "State",
    "Stats",
    "Tokenizer",
    "decode",
    "generate",
    "left_pad",
    "load",
    "load_tokenizer",
    "prefill",
    "score",
    "stream",
]
