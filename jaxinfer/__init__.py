"""LLM inference from GGUF files as pure JAX functions."""

from jaxinfer.engine import State, decode, left_pad, prefill, start
from jaxinfer.generate import Piece, Stats, generate, score, stream
from jaxinfer.loader import Loaded, Model, load
from jaxinfer.ops import AMPERE, CPU, GPU, HOPPER, HOPPER_INT8, HOPPER_INVARIANT, REFERENCE, Ops
from jaxinfer.sample import Sampler
from jaxinfer.session import Session
from jaxinfer.snapkv import Eviction
from jaxinfer.tokenizer import Tokenizer, load_tokenizer

init_cache = Model.init_cache

__all__ = [
    "AMPERE",
    "CPU",
    "GPU",
    "HOPPER",
    "HOPPER_INT8",
    "HOPPER_INVARIANT",
    "REFERENCE",
    "Eviction",
    "Loaded",
    "Model",
    "Ops",
    "Piece",
    "Sampler",
    "Session",
    "State",
    "Stats",
    "Tokenizer",
    "decode",
    "generate",
    "init_cache",
    "left_pad",
    "load",
    "load_tokenizer",
    "prefill",
    "score",
    "start",
    "stream",
]
