"""Kernels of Mosaic GPU without a GPU: interpreted, lowered, and compiled ahead of time in a process of their own."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.primitives import mma_p
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import utils

ARCHS = ((8, 0), (8, 9), (9, 0))
SHARED = {(8, 0): (167936, 166912), (8, 9): (102400, 101376), (9, 0): (233472, 232448)}  # bytes a processor, and a CTA
Program = tuple[str, Callable[..., Any], tuple]  # a name, a function and the shapes of its arguments

needs_ptxas = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs the wheels of the extra cuda13"
)


def _dot(acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return acc + jnp.dot(a, b, preferred_element_type=acc.dtype)


mlir.register_lowering(mma_p, mlir.lower_fun(_dot, multiple_results=False), platform="cpu")  # the interpreter has none


def interpret(f: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """f(...), of which the last kernel was interpreted, with its races looked for, and has none."""
    gpu_callbacks.reset_gpu_interpret_mode_state()  # a kernel that failed leaves its state behind
    with jax.default_device(jax.devices("cpu")[0]):
        out = jax.block_until_ready(f(*args, **options))
    # Which raises where nothing was interpreted. jax 0.12 has raised before, with the same words.
    assert not gpu_callbacks.get_races().races_found, "RACE DETECTED"
    return out


def lower(f: Callable[..., Any], *args: Any, arch: tuple[int, int]) -> str:
    """The program for a GPU of a compute capability; it is checked for what a kernel may do there, not compiled."""
    with mock.patch.object(utils, "_infer_arch", return_value=arch):
        # a function of its own: tracing asks for the capability, and is remembered by function
        return jax.jit(lambda *x: f(*x)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def ptxas(module: str, arch: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of each kernel of the module's `programs(arch)`; the compiler may well abort.

    They are 0 where a program's kernels are those of one before: jax 0.12 does not compile them again.
    """
    settings = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, module, *map(str, arch)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for name, report in re.findall(r"^program (.*)\n((?:(?!program ).*\n)*)", done.stdout, re.MULTILINE):
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
        found[name] = max((int(n) for n in re.findall(r"Used (\d+) registers", report)), default=0), sum(spills)
    assert any(registers for registers, _ in found.values()), done.stdout
    return found


def _compile(programs: Iterator[Program], arch: tuple[int, int]) -> None:
    text = (Path(__file__).parent / "data/h200.txt").read_text()
    if arch != (9, 0):
        text = text.replace("ACCELERATED_FEATURES", "NONE").replace(
            "major: 9 feature", f"major: 8 minor: {arch[1]} feature"
        )
    for old, new in zip(SHARED[9, 0], SHARED[arch], strict=True):
        text = text.replace(str(old), str(new))
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    utils._infer_arch = lambda: arch
    for name, f, args in programs:
        print("program", name, flush=True)
        place = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), x) for x in args]
        jax.jit(f).lower(*place).compile()


if __name__ == "__main__":
    compute_capability = int(sys.argv[2]), int(sys.argv[3])
    _compile(importlib.import_module(sys.argv[1]).programs(compute_capability), compute_capability)
