"""What compiling costs: which kernels a program has is read off what JAX traced, and each is lowered alone."""

from importlib.metadata import version

import jax
import jax.numpy as jnp
import pytest
from goldens import model_path

from jaxinfer import __main__ as cli
from jaxinfer import compiling
from jaxinfer.pallas.reduce import reduce

pytestmark = pytest.mark.usefixtures("quick_compiler")

MODEL = str(model_path("qwen3"))


def test_a_kernel_counts_once_however_often_it_is_called():
    def program(rows: jax.Array, weights: jax.Array, others: jax.Array) -> tuple[jax.Array, ...]:
        def add(rows: jax.Array, weights: jax.Array) -> jax.Array:
            return reduce(rows, None, weights, None, dtype=jnp.float32)

        y = jax.lax.fori_loop(0, 2, lambda i, y: y + add(rows * i, weights), add(rows, weights))
        return y, add(rows, weights), add(rows, others)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 64), (2, 2), (1, 4))]
    (name, programs), *more = compiling.kernels(jax.jit(program).trace(*shapes)).items()
    assert (name, len(programs), more) == ("scatter_reduce", 2, [])
    for one in programs:
        assert one.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


def test_table_of_the_command_line(capfd, monkeypatch):
    alone = jax.jit(lambda x: x + 1).trace(1.0)  # stands for kernels, which a CPU's programs have none of
    programs = [compiling.kernels, lambda _: {"one": [alone, alone], "two": [alone]}]
    monkeypatch.setattr(compiling, "kernels", lambda traced: programs.pop(0)(traced))
    timed = compiling._timed
    monkeypatch.setattr(compiling, "_timed", lambda f: (timed(f)[0], 1.25))
    argv = ["bench", "-m", MODEL, "--no-expand", "--compile", "-p", "16", "-n", "3", "-b", "16"]
    assert cli.main(argv) == 0
    assert not jax.config.jax_enable_compilation_cache
    out, err = capfd.readouterr()
    head, rule, *rows, empty, build = out.splitlines()
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in (head, *rows)]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert cells[0] == ["program", "dtype", "layer bodies", "kernel", "different", "trace s", "lower s", "compile s"]
    assert [row[:5] for row in cells[1:]] == [
        ["prefill of 16 tokens", "float32", "1", "all", "0"],
        ["decode", "float32", "1", "all", "3"],
        ["", "", "", "one", "2"],
        ["", "", "", "two", "1"],
    ]
    assert [row[5:] for row in cells[1:]] == [["1.25"] * 3] * 2 + [["", "2.50", "2.50"], ["", "1.25", "1.25"]]
    assert (empty, build.split(",")[0]) == ("", f"build: jaxinfer {version('jaxinfer')}")
    assert "Compilation cache: off" in err
