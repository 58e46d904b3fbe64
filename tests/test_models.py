"""Whole models of odd shapes against the float64 forward pass of tests/models.py, through files."""

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from models import Spec, forward, keys, save, weights

import jaxinfer

YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "attn_factor": 1.25}
DIVISORS = tuple(np.geomspace(1, 8, 12).tolist())  # as many as the pairs of a head of 24
QKV = ("attn_q", "attn_k", "attn_v")

CASES = {
    "llama": Spec(layers=3),
    "llama untied, partly rotated": Spec(tied=False, rotated=10, heads=6, kv_heads=3),
    "llama with linear scaling": Spec(scaling={"type": "linear", "factor": 2.5}),
    "llama with yarn": Spec(scaling=YARN),
    "llama 3": Spec(divisors=DIVISORS, base=500000.0, heads=4, kv_heads=2),
    "llama with every bias": Spec(biases=(*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    "llama fused": Spec(fused=True, biases=QKV, heads=4, kv_heads=2),
    "qwen2": Spec(arch="qwen2", biases=(*QKV, "output"), base=1e6, heads=4, kv_heads=2, eps=1e-6),
    "qwen2 with yarn, untied": Spec(arch="qwen2", biases=QKV, scaling=YARN, tied=False, rotated=16),
    "qwen3": Spec(arch="qwen3", heads=6, kv_heads=2, head=10, base=1e6),
    "qwen3 scaled by a type it ignores": Spec(arch="qwen3", scaling={"type": "none", "factor": 4.0}),
}


def check(path, stored, spec):
    model, params, _ = jaxinfer.load(path, dtype="float32")
    for length in (1, 2, 31):
        ids = np.random.default_rng(length).integers(0, spec.vocab, length).tolist()
        got, want = jaxinfer.score(model, params, ids, chunk=16), forward(spec, stored, ids)
        assert got.dtype == np.float32
        # f32 rounds to 6e-8 and a value passes some tens of sums; a wrong formula shows as 1e-2 or more
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_logits_at_every_position(spec, tmp_path):
    path = tmp_path / "model.gguf"
    check(path, save(path, keys(spec), weights(spec)), spec)


def test_logits_from_a_mix_of_weight_types(tmp_path):
    spec = Spec(layers=2, width=256, heads=4, kv_heads=2, head=64, ffn=512, tied=False)
    types = {"attn_q": Type.Q4_K, "attn_k": Type.Q8_0, "attn_v": Type.Q6_K, "attn_output": Type.IQ4_XS}
    types |= {"ffn_gate": Type.BF16, "ffn_up": Type.F16, "0.ffn_down": Type.Q4_1, "1.ffn_down": Type.Q5_0}
    types |= {"token_embd": Type.Q3_K, "output.weight": Type.Q2_K}
    path = tmp_path / "model.gguf"
    check(path, save(path, keys(spec), weights(spec), types), spec)
