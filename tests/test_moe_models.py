"""Whole models with experts, as wide as the kernels need, against float64: interpreted layer by layer, and on a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from families import File, changed, decoder, draw, fused, gemma4, gpt_oss, hybrid, llama4
from gguf.constants import GGMLQuantizationType
from models import save

import jaxinfer
from jaxinfer import Ops, segments
from jaxinfer import decoder as decoder_module
from jaxinfer.explain import explain
from jaxinfer.models import gemma4 as gemma4_module
from jaxinfer.models import llama4 as llama4_module
from jaxinfer.ops import CPU, HOPPER
from jaxinfer.ops import experts as experts_ops
from jaxinfer.ops import route as route_ops
from jaxinfer.ops.attention import attention_dense

EXPERTS = 4
SIZES = {"D": 256, "HEAD": 64, "FFN": 256, "EXPERT_FFN": 256, "WIDE": 128, "STATE": 64}
FEW = ["score", "route", "product", "product", "reduce"]
FORMS = {4: "few rows, choice by choice", 64: "grouped products"}  # by chunk


class Case(NamedTuple):
    build: Callable[[int], File]  # with so many layers
    layers: int  # that have each kind
    kind: str  # of the experts' weights
    kernels: list[str]  # that few rows take


def joined(layers: int) -> File:
    file = gemma4(sliding=(True, False)[:layers], mixture=EXPERTS)
    return fused(file, "ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps")


def delta(layers: int) -> File:
    keys = {"full_attention_interval": 2}
    return hybrid("qwen35moe", keys, layers=layers, full=(1,), mixture=EXPERTS)


# Kernels are interpreted with the shapes of those before where they may be: then they are not compiled again.
CASES = {
    "qwen3moe": Case(lambda n: decoder("qwen3moe", layers=n, norms="head", mixture=EXPERTS), 2, "Q4_0", FEW),
    "llama": Case(lambda n: decoder("llama", layers=n, mixture=EXPERTS), 2, "Q4_0", FEW),
    "olmoe": Case(lambda n: decoder("olmoe", layers=n, norms="all", mixture=EXPERTS), 2, "Q4_0", FEW),
    "qwen35moe": Case(delta, 2, "Q4_0", FEW),
    "llama4": Case(lambda n: llama4({"expert_used_count": 2}, layers=n, mixture=EXPERTS), 4, "Q4_0", FEW),
    "gpt-oss": Case(lambda n: gpt_oss({"expert_used_count": 2}, layers=n, mixture=EXPERTS), 2, "MXFP4", FEW),
    "gemma4": Case(joined, 2, "Q4_0", FEW[1:]),  # its router norms in a way of its own
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

OUTPUTS = "attn_output", "ssm_out", "ffn_down", "ffn_down_shexp", "ffn_down_exps"  # what layers add, before any norm
FACTORS = {  # of an architecture's own numbers, so that no part of a layer outweighs the others
    "gemma4": {"token_embd": 1 / 16, "ffn_gate_inp.weight": 16, "attn_q_norm": 1 / 8},  # it has these factors itself
    "gpt-oss": {"ffn_gate_inp.bias": 1 / 8, "ffn_down_exps.weight": 1 / 8},  # its hidden values are large
}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SIZES.items():
        monkeypatch.setattr(families, name, size)
    monkeypatch.setattr(llama4_module, "BLOCK", families.BLOCK)


def decided(file: File) -> File:
    """The file with routers whose choice no rounding changes, and a head of its own, which sees more than the token.

    The first numbers of a token's embedding are its ranks of the experts, no layer writes there, and routers read
    little else: scores are about one apart, a hundred times what bf16 makes of them.
    """
    rng, found = np.random.default_rng(1), {}
    for name, values in (file.tensors | draw({"output.weight": (families.VOCAB, families.D)})).items():
        new = values.copy()
        if name == "token_embd.weight":
            new[:, :EXPERTS] = rng.permuted(np.tile(np.arange(EXPERTS) - (EXPERTS - 1) / 2, (len(new), 1)), axis=1)
        elif name.endswith("ffn_gate_inp.weight"):
            new = new / 10 + 2 * np.eye(*new.shape, dtype=np.float32)
        elif values.shape == (families.D,):
            new[:EXPERTS] = 0 if name.endswith("bias") else 1
        elif name.endswith(tuple(f"{part}.weight" for part in OUTPUTS)):
            new[..., :EXPERTS, :] = 0
        elif name.endswith("ffn_down_exps.bias"):
            new[:, :EXPERTS] = 0
        found[name] = new * next((f for part, f in FACTORS.get(file.arch, {}).items() if part in name), 1)
    return changed(file, found)


def load(path: Path, case: Case, layers: int, ops: Ops | None) -> tuple[jaxinfer.Loaded, File]:
    """The model, in bf16, and its file as it is read."""
    file = decided(case.build(layers))
    matrices = [n for n, v in file.tensors.items() if v.ndim > 1 and n.endswith("weight")]
    types = {n: "BF16" for n in matrices if "gate_inp" not in n and "conv1d" not in n}
    types |= {n: case.kind for n in matrices if "_exps" in n}
    seen = save(path, file.metadata, file.tensors, {n: GGMLQuantizationType[kind] for n, kind in types.items()})
    return jaxinfer.load(path, dtype="bfloat16", ops=ops, expand=False), replace(file, tensors=seen)


def ids_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, families.VOCAB, length).tolist()


def check(got: Any, file: File, ids: list[int]) -> None:
    """Each of some 20 steps of a layer rounds by 2^-9 at most, and this adds up as squares: to 1 % of a row of logits
    in 4 layers, of which a row may have three times as much. Other experts, or none, make a quarter of a row."""
    want = families.forward(file, ids)
    wrong = np.linalg.norm(np.asarray(got, np.float64) - want, axis=1) / np.linalg.norm(want, axis=1)
    assert wrong.max() <= 2.0**-5


def layer_by_layer(layers: segments.Layers, caches: Sequence[Any], x: Any, step: Callable[..., Any]) -> Any:
    """`segments.run` without programs of whole layers: XLA's threads may be too few for kernels interpreted there."""
    held = list(caches)
    for k, i in layers.places():
        x, held[k] = step(layers.stacks[k], i, x, held[k])
    return x, tuple(held)


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"llama"}))  # which has qwen3moe's experts
def test_interpreted(name, tmp_path, monkeypatch):
    """A layer: what is done for experts by kernels, the rest by XLA. Kernels differ in formats elsewhere."""
    case = CASES[name]._replace(kind="Q4_0")
    launched = []

    def interpreted(module: Any, name: str) -> None:
        kernel = getattr(module, name)

        def launch(*args: Any, **options: Any) -> Any:
            launched.append(name)
            return kernel(*args, **options, interpret=True)

        monkeypatch.setattr(module, name, launch)

    for module, name in ((route_ops.route, "score"), (route_ops.route, "route"), (experts_ops, "reduce")):
        interpreted(module, name)
    for module in (experts_ops.matvec, experts_ops.halves):
        interpreted(module, "product")
    monkeypatch.setattr(segments, "run", layer_by_layer)
    whole = (decoder_module, "attention"), (decoder_module, "delta"), (gemma4_module, "attention")
    for module, name in whole:  # else each step is compiled by itself
        monkeypatch.setattr(module, name, jax.jit(getattr(module, name), static_argnums=(5, 6)))
    ops = CPU._replace(attention=attention_dense, experts=HOPPER.experts, route=HOPPER.route, scores=HOPPER.scores)
    (model, params, _), file = load(tmp_path / "model.gguf", case, 1, ops)
    ids = ids_of(2)
    cache = model.init_cache(params, 1, 32, chunk=len(ids))
    x, _ = mosaic.interpret(model.forward, params, jnp.asarray([ids]), jnp.arange(len(ids))[None], cache)
    assert launched == case.kernels
    check(model.logits(params, x)[0], file, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", FORMS)
@every_case
def test_on_a_gpu(case, chunk, tmp_path):
    """A prompt of 40 tokens in one chunk, of which the first are padding, and in chunks of few."""
    loaded, file = load(tmp_path / "model.gguf", case, case.layers, None)
    assert loaded.model.ops is HOPPER
    report, ids = explain(loaded, 40, chunk), ids_of(40)
    assert {use.forms for x in report.layers for use in x.prefill if use.op == "experts"} == {(FORMS[chunk],)}
    check(jaxinfer.score(loaded.model, loaded.params, ids, chunk=chunk), file, ids)
