"""The benchmark of products: its shapes, its weights, and that all backends compute the same from every format."""

import csv
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from jaxinfer import __main__ as cli
from jaxinfer import bench_matmul, timing
from jaxinfer.bench_matmul import (
    BACKENDS,
    BENCHMARK,
    KINDS,
    ROWS,
    SHAPES,
    blocks,
    cases,
    copies,
    prepare,
    sample,
    shape_of,
    spread,
)
from jaxinfer.ops.matmul import matmul_reference
from jaxinfer.quants import dense
from jaxinfer.timing import Backend, Calls, Ceilings, measure, of_jax

CEILING = Ceilings(1e12, 1e11)
every_format = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def quickly(monkeypatch, quick_compiler):
    """Samples of a few calls, programs of one, and little to walk through."""
    monkeypatch.setattr(timing, "SAMPLE_S", 0.001)
    monkeypatch.setattr(timing, "SHORT_S", 0.0)
    monkeypatch.setattr(bench_matmul, "COLD_BYTES", 2**18)


def small(name: str = "Q4_K", rows: int = 3, dtype: str = "bfloat16", shape: str = "192x512") -> Any:
    (case,) = cases(formats=[name], shapes=[shape], rows=[rows], dtype=dtype)
    return case


def test_shapes_of_models():
    """From the models' widths, heads, heads' widths and feed-forward widths."""

    def attention(name: str, width: int, heads: int, kv_heads: int, head: int, kv: str = "kv") -> dict[str, Any]:
        q = heads * head
        return {f"{name}-q": (q, width), f"{name}-{kv}": (kv_heads * head, width), f"{name}-o": (width, q)}

    def mlp(name: str, width: int, ffn: int) -> dict[str, Any]:
        return {f"{name}-gate": (ffn, width), f"{name}-down": (width, ffn)}

    found = (
        attention("qwen3-8b", 4096, 32, 8, 128)
        | mlp("qwen3-8b", 4096, 12288)
        | {"qwen3-8b-head": (151936, 4096)}
        | attention("gemma4-31b-sliding", 5376, 32, 16, 256)
        | attention("gemma4-31b-global", 5376, 32, 4, 512, kv="k")
        | mlp("gemma4-31b", 5376, 21504)
        | {"gemma4-31b-head": (262144, 5376)}
        | attention("qwen3-30b-a3b", 2048, 32, 4, 128)
        | {"qwen3-30b-a3b-head": (151936, 2048)}
    )
    assert found.pop("qwen3-8b-o") == found["qwen3-8b-q"]  # which is there once
    assert {name: shape[1:] for name, shape in SHAPES.items()} == found
    assert shape_of("12288x4096")[1:] == (12288, 4096)


def test_all_cases():
    assert ROWS == (1, 2, 4, 8, 16, 64, 512, 2048, 8192)
    assert [*KINDS][-2:] == ["BF16", "F16"]
    assert len(KINDS) == 15
    assert len(cases()) == 15 * 18 * 9


def test_counts_and_what_a_case_is_bound_by():
    one, many = small(rows=1), small(rows=1000)
    assert one.flops == 2 * 192 * 512
    assert one.weight_bytes == 192 * 2 * 144  # blocks of Q4_K
    assert one.plain_bytes == 192 * 512 * 2
    ceiling = Ceilings(1e12, 1e11)  # 10 operations a byte; a row has 2 for 9 / 16
    assert one.bound(ceiling) == ("bytes", one.weight_bytes)
    assert [small(rows=n).bound(ceiling)[0] for n in (2, 3)] == ["bytes", "flops"]
    assert many.bound(ceiling) == ("flops", 1000 * one.flops)
    (head,) = cases(formats=["Q4_K"], shapes=["gemma4-31b-head"], rows=[8192])
    result = 2 * 8192 * 262144
    assert (
        2 * result < head.need_bytes < 6 * result
    )  # the result twice and not sixteen times: such a call is timed alone


@every_format
def test_no_cache_holds_the_weights_of_a_walk(monkeypatch, name):
    monkeypatch.undo()
    for case in cases(formats=[name], rows=[1]):
        stacks, layers = spread(case.weight_bytes)
        assert 16 % stacks == 0  # calls in a round
        assert layers >= 2
        assert stacks * layers * case.weight_bytes >= 2**28
        assert 256 % copies(case.plain_bytes) == 0
        assert copies(case.plain_bytes) * case.plain_bytes >= 2**28


@every_format
def test_what_results_are_checked_against(name):
    """A product in float64 of what gguf-py makes of the blocks, and these are of the size of a model's."""
    case = small(name, rows=200)
    given, error = prepare(case)
    kind = KINDS[name]
    raw = [blocks(kind, 512, case.weight_bytes, seed).reshape(192, -1) for seed in range(2)]
    assert raw[0].nbytes == 192 * 512 // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1]
    first, second = (dequantize(data, kind).astype(np.float64) for data in raw)
    np.testing.assert_array_equal(jax.jit(dense)(given.w), [first, second])
    assert np.isfinite(second).all()
    assert second.std() == pytest.approx(512**-0.5, rel=0.5)
    x = np.asarray(given.x, np.float64)
    assert error(jnp.asarray(x @ second.T)) < 1e-6  # of the arrays' float32
    assert error(jnp.asarray(x @ first.T)) > 0.1
    rows, columns = sample(case)
    assert (len(rows), len(columns)) == (128, 128)
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (0, 199, 0, 191)


def test_random_blocks_are_repeated(monkeypatch):
    monkeypatch.setattr(bench_matmul, "POOL_BYTES", 1000)
    for name in ("Q6_K", "BF16"):
        raw = blocks(KINDS[name], 512, 2100, 0)
        period = {"Q6_K": 840, "BF16": 1000}[name]  # whole blocks
        np.testing.assert_array_equal(raw[period:], raw[:-period])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "MXFP4", "BF16"])  # test_ops has every format
def test_every_backend_reads_a_format(name):
    backends = BENCHMARK.choose(["xla-dot", "xla-sum", "bf16-dot"])  # the first one is the default's on a CPU
    for row in measure(BENCHMARK, [small(name, 1)], backends, CEILING, samples=1):
        assert row.note == ""
        assert row.error is not None
        assert 0 < row.error < 2**-8  # weights, and results, rounded to bfloat16: half of what is tolerated
        assert (row.mean_us or 0) > 0
        assert row.lower_s is row.compile_s is None


def test_wrong_products_are_not_timed():
    """One that reads the wrong layer, and one that leaves a block of 32 out."""

    def wrong(matmul) -> Backend:
        def make(given) -> Calls:
            right = bench_matmul._of(matmul, given)
            return right._replace(repeat=lambda _: pytest.fail("timed"))

        return Backend("wrong", lambda _: None, make)

    backends = [
        wrong(lambda x, w, _: matmul_reference(x, w, 0)),
        wrong(lambda x, w, layer: matmul_reference(x.at[..., :32].set(0), w, layer)),
    ]
    for row in measure(BENCHMARK, [small("Q4_0")], backends, CEILING):
        assert row.note == "wrong: an error above 7.8e-03"
        assert (row.error or 0) > 0.1


def test_float32():
    backends = [*BACKENDS.values()]
    names = ["jaxinfer", "few-rows", "many-rows", "xla-dot", "xla-sum", "bf16-dot"]
    assert [backend.name for backend in backends] == names
    found = list(measure(BENCHMARK, [small(dtype="float32")], backends, CEILING, samples=1, compiling=True))
    kernel, plain = "not covered: 16 bits on Hopper alone", "not covered: activations of bfloat16 alone"
    assert [row.note for row in found] == ["", kernel, kernel, "", "", plain]
    for row in (found[0], *found[3:5]):
        assert row.error is not None
        assert row.error < 1e-6
        assert (row.lower_s or 0) > 0
        assert (row.compile_s or 0) > 0


def test_long_programs_walk(monkeypatch):
    """A program of 256 calls gives the results of the last layers."""
    monkeypatch.undo()
    case = small("Q8_0", 1, "float32", "64x256")
    monkeypatch.setattr(bench_matmul, "COLD_BYTES", 16 * 5 * case.weight_bytes)
    given, error = prepare(case)
    calls = bench_matmul._of(matmul_reference, given)
    assert spread(case.weight_bytes) == (16, 5)
    results = calls.repeat(256)()  # 16 rounds from layer 0 on: the last one is 15 % 5 = 0
    assert len(results) == 16
    assert all(error(o) > 0.1 for o in results)
    results = of_jax(matmul_reference, given.x, [given.w], layers=2).repeat(256)()  # which ends with layer 1
    assert all(error(o) < 1e-6 for o in results)


def run(capfd, *argv: str) -> tuple[int, str, str]:
    return cli.main(["bench", "matmul", *argv, "--no-compile-cache"]), *capfd.readouterr()


def test_from_the_command_line(capfd, tmp_path):
    argv = ["--formats", "Q4_K", "--shapes", "192x512,qwen3-30b-a3b-kv", "--rows", "1,9", "--dtype", "bfloat16"]
    argv += ["-r", "2", "--compile", "--csv", str(tmp_path / "a.csv")]
    code, out, err = run(capfd, *argv, "--backends", "jaxinfer,xla-sum")
    assert code == 0
    head, _, *lines, empty, build = out.splitlines()
    cells = [[c.strip() for c in line.split("|")[1:]] for line in (head, *lines)]
    names = ["format", "shape", "rows", "backend", "error", "µs", "speed", "ceiling", "lower s", "compile s"]
    assert cells[0][:10] == names
    several = [("Q4_K", s, n) for s in ("192x512", "qwen3-30b-a3b-kv") for n in ("1", "9")]
    assert [tuple(row[:4]) for row in cells[1:]] == [(*c, b) for c in several for b in ("jaxinfer", "xla-sum")]
    for row in cells[1:]:
        if row[2:4] == ["9", "xla-sum"]:
            assert row[4:8] == [""] * 4
            assert row[10] == "not covered: more than 8 rows"
            continue
        assert 0 < float(row[4]) < 2**-8
        assert re.fullmatch(r"\d+\.\d ± \d+\.\d", row[5])
        assert re.fullmatch(r"\d+\.\d (GB|[GT]FLOP)/s", row[6])
        assert re.fullmatch(r"\d+\.\d%", row[7])
        assert all(re.fullmatch(r"\d+\.\d\d", c) for c in row[8:10])
    assert empty == ""
    assert build.startswith("build: jaxinfer ")
    assert "Q4_K qwen3-30b-a3b-kv 9" in err
    assert "Compilation cache: off" in err  # or compiling might be reading

    with open(tmp_path / "a.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    row = rows[4]
    about = [row[name] for name in ("shape", "out", "into", "format", "rows", "dtype", "backend")]
    assert about == ["qwen3-30b-a3b-kv", "512", "2048", "Q4_K", "1", "bfloat16", "jaxinfer"]
    amount = {"bytes": 512 * 2048 * 144 // 256, "flops": 2 * 512 * 2048}[row["bound"]]
    assert float(row["rate"]) == pytest.approx(amount / (1e-6 * float(row["median_us"])))
    assert math.isclose(float(row["compile_s"]), float(cells[5][9]), abs_tol=0.006)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--formats", "Q4_K,Q9"], r"\['Q9'\] are no formats; known are Q4_0, .*, F16"),
        (["--shapes", "qwen9"], "'qwen9' is no shape: known are qwen3-8b-q, .*, or OUTxIN such as 12288x4096"),
        (["--shapes", "64x0"], "'64x0' is no shape"),
        (["--shapes", "64x64x64"], "'64x64x64' is no shape"),
        (["--shapes", "64x320", "--formats", "Q8_0,Q4_K"], "'64x320': 320 is no multiple of 256, Q4_K's block"),
        (["--rows", "0,8"], r"rows must be at least 1, not \[0\]"),
        (["--rows", "x"], "'x' is no list of whole numbers"),
        (["-r", "0", "--shapes", "64x256"], "samples=0 must be at least 1"),
        (
            ["--backends", "cublas"],
            r"\['cublas'\] are no backends; known are jaxinfer, few-rows, .*, bf16-dot",
        ),
        (["--row", "1"], "bench matmul has no argument '--row'; the nearest flag is --rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capfd, argv, message):
    code, out, err = run(capfd, *argv, "--no-compile-cache")
    assert (code, out) == (2, "")
    assert re.search(f"^error: .*{message}", err, re.MULTILINE)
