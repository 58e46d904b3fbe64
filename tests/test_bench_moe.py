"""The benchmark of experts: its cases and their bounds, how tokens choose, and that all backends compute the same."""

import csv
import re
from functools import partial
from typing import Any
from unittest import mock

import jax
import mosaic
import numpy as np
import pytest

from jaxinfer import __main__ as cli
from jaxinfer import bench_matmul, bench_moe, timing
from jaxinfer.bench_moe import BACKENDS, BENCHMARK, KINDS, SHAPES, SKEWS, TOKENS, WORKS, cases, choices, prepare
from jaxinfer.ops.experts import experts_gpu, experts_reference
from jaxinfer.pallas import grouped, limbs, matvec
from jaxinfer.pallas.reduce import reduce_reference
from jaxinfer.pallas.registers import PERMUTED
from jaxinfer.timing import Ceilings, measure

CEILING = Ceilings(1e12, 1e11)


@pytest.fixture(autouse=True)
def quickly(monkeypatch, quick_compiler):
    """Samples of a few calls, programs of one, and little to walk through."""
    monkeypatch.setattr(timing, "SAMPLE_S", 0.001)
    monkeypatch.setattr(timing, "SHORT_S", 0.0)
    monkeypatch.setattr(bench_matmul, "COLD_BYTES", 2**18)


def one(work: str, tokens: int, kind: str = "Q4_K", skew: str = "uniform", **options: Any) -> Any:
    """A case, by default of 8 experts, two for each token."""
    options = {"shapes": ["8/2/256/512"], "dtype": "bfloat16"} | options
    (case,) = cases(works=[work], tokens=[tokens], formats=[kind], skews=[skew], **options)
    return case


def test_all_cases():
    """Rows of 2880, 2816 and 704 are no blocks of 256."""
    assert max(TOKENS) == 32768
    whole = sum(KINDS[name].name.endswith("_K") or name == "IQ4_XS" for name in KINDS)
    products = 3 * 2 * len(KINDS) + (2 + 2) * (len(KINDS) - whole) + whole  # of a gemma's up, 2816 is 11 * 256
    assert len(cases()) == len(TOKENS) * (len(SKEWS) * (products + len(SHAPES)) + len(SHAPES))
    assert {case.work for case in cases()} == {*WORKS}
    assert {case.format for case in cases(works=["reduce", "route"])} == {"-"}


def test_what_a_case_is_bound_by():
    qwen: dict[str, Any] = {"shapes": ["qwen3-30b-a3b"]}
    h200 = Ceilings(740e12, 4.3e12)
    # 128 experts, 32,768 rows, 2048 -> 768
    assert one("up", 4096, "BF16", **qwen).bound(h200) == ("flops", 2 * 32768 * 2048 * 768)
    # a token reads 8 of 128 experts' three weights, Q4_K's 144 bytes for each 256, x, and 8 indices and weights
    assert one("layer", 1, **qwen).bound(h200) == ("bytes", 8 * 3 * 2048 * 768 * 144 // 256 + 2 * 2048 * 2 + 8 * 8)
    assert one("layer", 8192, **qwen).bound(h200) == ("flops", 3 * 2 * 65536 * 2048 * 768)
    # 16 rows of one expert alone, in and out
    assert one("up", 2, "Q8_0", "one", **qwen).bound(h200) == ("bytes", 2048 * 768 * 34 // 32 + 16 * (2048 + 768) * 2)
    assert one("reduce", 8192, **qwen).bound(h200) == ("bytes", 9 * 8192 * 2048 * 2 + 8 * 65536)
    assert one("route", 8192, **qwen).bound(h200) == ("bytes", 8192 * 128 * 4 + 8 * 65536)
    most = one("layer", 32768, "BF16", **qwen)
    assert 5e9 < most.need_bytes < 5e10  # 6 stacks of 1.2e9 bytes, 2 that are decoded, rows of 2 to 4 GB


def test_how_tokens_choose():
    experts = np.arange(16)
    shape: dict[str, Any] = {"shapes": ["16/4/256/256"]}
    uniform, zipf, same = (choices(one("layer", 4096, skew=skew, **shape)) for skew in SKEWS)
    for found in (uniform, zipf, same):
        assert found.shape == (4096, 4)
        assert (np.diff(np.sort(found), axis=1) > 0).all()  # no expert twice
    counts = np.bincount(uniform.ravel(), minlength=16)
    assert (abs(counts - 1024) < 5 * 1024**0.5).all()
    np.testing.assert_array_equal(same, np.broadcast_to(experts[:4], (4096, 4)))
    assert not choices(one("up", 9, skew="one", **shape)).any()
    # of one expert a token, the n-th has a share of (1 / n) / (1 + 1 / 2 + ... + 1 / 16); of four it is less steep
    alone = np.bincount(choices(one("layer", 4096, skew="zipf", shapes=["16/1/256/256"])).ravel(), minlength=16)
    wanted = 4096 / (experts + 1) / (1 / (experts + 1)).sum()
    assert (abs(alone - wanted) < 5 * wanted**0.5).all()
    assert (np.diff(np.bincount(zipf.ravel(), minlength=16)[[0, 1, 3, 7, 15]]) < 0).all()


@pytest.mark.parametrize(
    ("work", "skew", "backends"),
    [
        ("up", "zipf", ["xla", "ragged-dot"]),
        ("layer", "uniform", ["jaxinfer", "xla", "ragged-dot"]),
        ("reduce", "one", ["xla"]),
        ("route", "-", ["jaxinfer", "xla"]),
    ],
)
def test_every_backend_of_a_work(work, skew, backends):
    case = one(work, 9, dtype="float32", **({} if skew == "-" else {"skew": skew}))
    assert case.cells == ("Q4_K" if case.weights else "-", "8/2/256/512", work, skew, "9")
    found = list(measure(BENCHMARK, [case], [*BACKENDS.values()], CEILING, samples=1))
    assert [row.backend for row in found if not row.note] == backends
    for row in found:
        if row.note:
            assert row.note.startswith("not covered: ")
        else:
            assert row.error is not None
            assert row.error < 1e-6  # f32 in sums of 512
            assert (row.mean_us or 0) > 0


def test_wrong_results_are_seen():
    """Of the other layer, and with the experts of the call before. Random weights have a mean in common."""
    given, error = prepare(one("layer", 9, dtype="float32"))

    def first(p, _, *args, **options):
        return experts_gpu(p, 0, *args, **options)

    def before(p, layer, x, chosen, *args, **options):
        return experts_gpu(p, layer, x, (chosen + 2) % 8, *args, **options)

    for wrong in (first, before):
        assert error(bench_moe._layer(wrong, given, *bench_moe._stacks(given)).output()) > 0.1


def stands_in(kernel: Any, plain: Any) -> Any:
    """A plain function for a kernel that takes the same, and gives as much."""

    def call(*args: Any, **options: Any) -> jax.Array:
        y = plain(*args, **options)
        like = jax.eval_shape(partial(kernel, **options), *args)
        assert (y.shape, y.dtype) == (like.shape, like.dtype)
        return y

    return mock.Mock(side_effect=call)


def on_permuted(x, *args, **options):
    back = np.argsort(PERMUTED)
    return grouped.reference(x.reshape(len(x), -1, len(back))[..., back].reshape(x.shape), *args, **options)


@pytest.mark.parametrize(
    ("work", "kind", "plain"),
    [("up", "Q4_K", on_permuted), ("up", "BF16", grouped.reference), ("reduce", "Q4_K", reduce_reference)],
)
def test_what_kernels_for_hopper_are_given(monkeypatch, work, kind, plain):
    module, name = (grouped, "grouped") if work == "up" else (bench_moe, "reduce")
    kernel = stands_in(getattr(module, name), plain)
    monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(bench_moe, "experts_hopper", experts_reference)  # which is what a CPU runs
    case = one(work, 17, kind)
    given, error = prepare(case)
    assert error(BACKENDS["jaxinfer"].make(given).output()) < case.tolerance / 2
    assert kernel.called


def test_few_tokens_on_hopper(monkeypatch):
    """As on a GPU, interpreted."""
    for module, name in ((matvec, "product"), (limbs, "limbs")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))
    monkeypatch.setattr(bench_moe, "experts_hopper", experts_reference)
    case = one("up", 2, "Q4_0", shapes=["3/2/256/64"])
    given, error = prepare(case)
    assert error(mosaic.interpret(BACKENDS["jaxinfer"].make(given).output)) < case.tolerance / 2


def run(capfd, *argv: str) -> tuple[int, str, str]:
    return cli.main(["bench", "moe", *argv, "--no-compile-cache"]), *capfd.readouterr()


def test_from_the_command_line(capfd, tmp_path):
    argv = ["--shapes", "8/2/256/512", "--works", "up,reduce", "--formats", "Q8_0", "--skews", "one", "--tokens", "3"]
    argv += ["-r", "2", "--csv", str(tmp_path / "a.csv"), "--backends", "ragged-dot", "--no-compile-cache"]
    code, out, _ = run(capfd, *argv)
    assert code == 0
    head, _, *lines, empty, build = out.splitlines()
    cells = [[c.strip() for c in line.split("|")[1:]] for line in (head, *lines)]
    assert cells[0][:9] == ["format", "shape", "work", "skew", "tokens", "backend", "error", "µs", "speed"]
    assert cells[1][:6] == ["Q8_0", "8/2/256/512", "up", "one", "3", "ragged-dot"]
    assert cells[2][:6] == ["-", "8/2/256/512", "reduce", "one", "3", "ragged-dot"]
    assert lines[-1].endswith("not covered: works with weights alone")
    assert empty == ""
    assert build.startswith("build: jaxinfer ")
    with open(tmp_path / "a.csv") as file:
        row, _ = csv.DictReader(file)
    about = [row[name] for name in ("shape", "experts", "used", "width", "ffn", "work", "format", "skew", "tokens")]
    assert about == ["8/2/256/512", "8", "2", "256", "512", "up", "Q8_0", "one", "3"]
    assert float(row["error"]) < 1e-6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shapes", "qwen9"], "'qwen9' is no shape: known are qwen3-30b-a3b, .*, or E/A/D/F such as 128/8/2048/768"),
        (["--shapes", "4/0/256/256"], "'4/0/256/256' is no shape"),
        (["--shapes", "4/5/256/256"], "'4/5/256/256' is no shape: a token has 5 of 4 experts"),
        (["--works", "down"], r"\['down'\] are no works; known are up, layer, reduce, route"),
        (["--skews", "two"], r"\['two'\] are no skews; known are uniform, zipf, one"),
        (["--formats", "Q9"], r"\['Q9'\] are no formats; known are Q4_0, "),
        (["--tokens", "0"], r"tokens must be at least 1, not \[0\]"),
        (
            ["--shapes", "gpt-oss-20b", "--works", "up", "--formats", "Q4_K"],
            "nothing to run: rows of .* no whole blocks",
        ),
        (["--backends", "cublas"], r"\['cublas'\] are no backends; known are jaxinfer, xla, ragged-dot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capfd, argv, message):
    code, out, err = run(capfd, *argv, "--no-compile-cache")
    assert (code, out) == (2, "")
    assert re.search(f"^error: .*{message}", err, re.MULTILINE)
