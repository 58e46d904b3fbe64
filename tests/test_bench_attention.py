"""The benchmark of attention: what it counts, what it runs, and that it times nothing that is wrong."""

import csv
import re
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import __main__ as cli
from jaxinfer import timing
from jaxinfer.bench_attention import BACKENDS, BENCHMARK, SHAPES, cases, expected, inputs, plot, shape_of
from jaxinfer.timing import Backend, Calls, Ceilings, Row, measure, recorded, table

QUICK: dict[str, Any] = {"samples": 2}
CEILING = Ceilings(1e12, 1e11)
SMALL: dict[str, Any] = {"shapes": ["4/2/16"], "lengths": [40], "chunk": 16, "dtype": "float32"}
WINDOW = {**SMALL, "shapes": ["4/2/16/24"], "lengths": [300]}  # its ring of 256 slots has wrapped


@pytest.fixture(autouse=True)
def quickly(monkeypatch, quick_compiler):
    """Samples of a few calls, and programs of one."""
    monkeypatch.setattr(timing, "SAMPLE_S", 0.001)
    monkeypatch.setattr(timing, "SHORT_S", 0.0)


def backend(name: str, change) -> Backend:
    """One that computes the right result and changes it."""

    def make(given) -> Calls:
        right = BACKENDS["jaxinfer"].make(given)
        return Calls(lambda: change(right.output()), right.repeat)

    return Backend(name, lambda _: None, make)


@pytest.mark.parametrize("work", ["prefill", "chunk", "decode"])
@pytest.mark.parametrize("shape", ["4/2/16", "4/2/16/24", "4/1/8/500"])
def test_counts_are_those_of_the_mask(shape, work):
    (case,) = cases(shapes=[shape], works=[work], lengths=[96], tokens=[3], batch=[2], chunk=32, dtype="bfloat16")
    key, query = np.arange(96), np.arange(96)[-case.tokens :, None]
    mask = (key <= query) & (key > query - (case.shape.window or 96))
    width, heads, kv_heads = case.shape.width, 4, case.shape.kv_heads
    assert case.tokens == {"prefill": 96, "chunk": 32, "decode": 3}[work]
    assert case.flops == 2 * heads * mask.sum() * (2 * width + 2 * width)  # products of two numbers, and their sums
    assert case.keys == mask.any(0).sum()
    assert case.kv_bytes == 2 * kv_heads * case.keys * width * 2 * 2


@pytest.mark.parametrize("work", ["prefill", "chunk", "decode"])
@pytest.mark.parametrize("settings", [SMALL, WINDOW], ids=["full", "window"])
def test_what_results_are_checked_against(settings, work):
    """A softmax in float64, of keys and values in the order of positions."""
    (case,) = cases(**settings, works=[work], tokens=[2], batch=[2])
    given = inputs(case)
    assert (given.cache.k.shape[3] < case.length) == (settings is WINDOW and work != "prefill")
    k, v = (np.asarray(a, np.float64) for a in given.in_order())
    q = np.asarray(given.q, np.float64)[:, -128:]
    query, key = np.arange(case.length)[-q.shape[1] :, None], np.arange(case.length)[-k.shape[2] :]
    s = np.einsum("btkgh,bksh->bkgts", q, k) / np.sqrt(16)
    mask = (key <= query) & (key > query - (case.shape.window or case.length))
    np.testing.assert_array_equal(given.seen()[-128:], mask)
    e = np.exp(np.where(mask, s, -np.inf))
    o = np.einsum("bkgts,bksh->btkgh", e / e.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(expected(given), o, atol=1e-5)  # float32, of numbers up to 4
    held = np.asarray(given.cache.pos[1, 0, 0])
    slots = given.cache.k.shape[3]
    assert all(p % slots == slot for slot, p in enumerate(held) if p >= 0)
    assert set(range(case.length - case.keys, case.length)) <= set(held.tolist())


def test_shapes_of_models():
    assert {name: shape[1:] for name, shape in SHAPES.items()} == {
        "qwen3-8b": (32, 8, 128, None),
        "gemma4-31b-sliding": (32, 16, 256, 1024),
        "gemma4-31b-global": (32, 4, 512, None),
        "qwen3.6": (16, 2, 256, None),
        "llama-d64": (32, 8, 64, None),
    }
    assert shape_of("32/8/128/1024")[1:] == (32, 8, 128, 1024)


def test_the_cases_of_a_run():
    found = cases(shapes=["4/2/16"], lengths=[16, 64], chunk=32, tokens=[1, 4], batch=[1, 2])
    assert [(str(case), case.length, case.tokens) for case in found] == [
        *[(f"prefill{b}", n, n) for b in ("", " x 2") for n in (16, 64)],
        *[(f"chunk 32{b}", 64, 32) for b in ("", " x 2")],  # 16 tokens are no more than a chunk: they are a prefill
        *[(f"decode{t}{b}", n, 4 if t else 1) for b in ("", " x 2") for n in (16, 64) for t in ("", " 4")],
    ]
    assert len(cases()) == 5 * (9 + 6 + 9)


def test_a_wrong_backend_is_not_timed():
    """A result too large by a hundredth, one that is not a number, and one that is right."""
    timed = []

    def slightly(given) -> Calls:
        right = BACKENDS["jaxinfer"].make(given)
        return Calls(lambda: right.output() * 1.01, lambda calls: timed.append(calls))

    found = [
        Backend("slightly", lambda _: None, slightly),
        backend("nan", lambda o: o.at[0, -1].set(jnp.nan)),
        backend("right", lambda o: o),
    ]
    wrong, nan, right = measure(BENCHMARK, cases(**SMALL, works=["decode"]), found, CEILING, **QUICK)
    assert wrong.error == pytest.approx(0.01, rel=1e-3)
    assert np.isnan(nan.error)
    for row in (wrong, nan):
        assert row.note == "wrong: an error above 1.0e-05"
        assert row.mean_us is row.rate is row.share is None
    assert timed == []
    assert right.error < 1e-6
    assert right.mean_us > 0
    assert not right.note
    lines = list(table(BENCHMARK, [wrong, nan, right], CEILING))
    assert lines[2].startswith("| 4/2/16             | decode     |      40 | slightly         |  1.0e-02 |       ")
    assert lines[2].endswith("| wrong: an error above 1.0e-05")


def test_what_does_not_run_says_why():
    def uncovered(given) -> Calls:
        raise NotImplementedError("no heads of 16\nof any kind")

    def broken(given) -> Calls:
        raise RuntimeError("out of registers")

    found = [
        Backend("absent", lambda device: f"not on a {device.platform}", uncovered),
        Backend("uncovered", lambda _: None, uncovered),
        Backend("broken", lambda _: None, broken),
    ]
    rows = list(measure(BENCHMARK, cases(**SMALL | {"lengths": [32, 40]}, works=["decode"]), found, CEILING, **QUICK))
    notes = ["not available: not on a cpu", "not covered: no heads of 16", "failed: RuntimeError: out of registers"]
    assert [row.note for row in rows] == notes * 2
    assert len(list(table(BENCHMARK, rows, CEILING))) == 2 + 3 + 1  # each is said once, and not for every length


def test_arrays_that_do_not_fit_are_not_made(monkeypatch):
    (case,) = cases(shapes=["32/8/128"], works=["decode"], lengths=[131072], batch=[64])
    stack = 2 * 2 * 64 * 8 * 131072 * 128 * 2  # keys and values of two layers
    assert stack * 2 < case.need_bytes < stack * 2.2  # and a copy of one, with another type of numbers
    monkeypatch.setattr(timing.memory, "available_bytes", lambda _: 100 * 2**30)
    (row,) = measure(BENCHMARK._replace(prepare=lambda _: pytest.fail("made")), [case], [BACKENDS["jaxinfer"]], CEILING)
    assert re.fullmatch(r"not run: its arrays need 1\d\d\.\d\d GiB, and there are 100\.00 GiB", row.note)


def run(capfd, *argv: str) -> tuple[int, str, str]:
    return cli.main(["bench", "attention", *argv, "--no-compile-cache"]), *capfd.readouterr()


def test_from_the_command_line(capfd, tmp_path):
    argv = ["--shapes", "4/2/16/24", "--lengths", "40", "--chunk", "32", "--tokens", "2", "--dtype", "bfloat16"]
    files = ["--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")]
    code, out, err = run(capfd, *argv, *files, "-r", "2", "--backends", "jaxinfer,reference,cudnn")
    assert code == 0
    head, rule, *lines, empty, build = out.splitlines()
    cells = [[c.strip() for c in line.split("|")[1:]] for line in (head, *lines)]
    assert cells[0][:8] == ["shape", "work", "tokens", "backend", "error", "µs", "speed", "ceiling"]
    assert len({len(line) for line in (head, rule, *(x for x in lines if "cudnn" not in x))}) == 1
    every = ["jaxinfer", "reference", "cudnn"]
    works = ["prefill", "chunk 32", "decode 2"]
    assert [tuple(row[1:4]) for row in cells[1:]] == [(w, "40", b) for w in works for b in every]
    for row in cells[1:]:
        if row[3] == "cudnn":
            assert row[4:] == ["", "", "", "", "not available: made for NVIDIA GPUs, and this is a cpu"]
            continue
        assert 0 < float(row[4]) < 2**-6
        assert re.fullmatch(r"\d+\.\d ± \d+\.\d", row[5])
        assert re.fullmatch(r"\d+\.\d GB/s" if row[1] == "decode 2" else r"\d+\.\d [GT]FLOP/s", row[6])
        assert re.fullmatch(r"\d+\.\d%", row[7])
    assert empty == ""
    assert re.fullmatch(r"build: jaxinfer \S+, jax \S+; device: cpu; ceilings: \d+\.\d [GT]FLOP/s, \d+\.\d GB/s", build)
    assert "4/2/16/24 decode 2 40" in err

    with open(tmp_path / "a.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(works) * 3
    row = rows[-3]
    assert (row["shape"], row["heads"], row["window"], row["work"], row["tokens"]) == (
        "4/2/16/24",
        "4",
        "24",
        "decode",
        "2",
    )
    kv_bytes = 2 * 2 * 25 * 16 * 2  # of 24 keys, and the one that the other query sees
    assert float(row["rate"]) == pytest.approx(kv_bytes / (1e-6 * float(row["median_us"])))
    row = rows[0]
    flops = 4 * 4 * 16 * (24 * 25 // 2 + 16 * 24)
    assert (row["work"], row["length"], row["backend"]) == ("prefill", "40", "jaxinfer")
    assert float(row["rate"]) == pytest.approx(flops / (1e-6 * float(row["median_us"])))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shapes", "qwen9"], "'qwen9' is no shape: known are qwen3-8b, .*, or heads/KV heads/width"),
        (["--shapes", "4/2"], "'4/2' is no shape"),
        (["--shapes", "4/2/0"], "'4/2/0' is no shape"),
        (["--shapes", "4/3/16"], "'4/3/16' is no shape: 4 heads are no multiple of 3 KV heads"),
        (["--works", "train"], r"\['train'\] are no works; known are prefill, chunk, decode"),
        (["--lengths", "0,8"], r"lengths must be at least 1, not \[0\]"),
        (["--lengths", "x"], "'x' is no list of whole numbers"),
        (["--batch", "0"], r"batch must be at least 1, not \[0\]"),
        (["--tokens", "4", "--lengths", "2"], r"tokens=\[4\] are more than the length=2 of the text"),
        (["--works", "chunk", "--lengths", "8"], r"no length of \[8\] is more than chunk=2048"),
        (["--chunk", "-1"], r"chunk must be at least 1, not \[-1\]"),
        (["-r", "0"], "samples=0 must be at least 1"),
        (["--backends", "triton"], r"\['triton'\] are no backends; known are jaxinfer, "),
        (["--shape", "4/2/16"], "bench attention has no argument '--shape'; the nearest flag is --shapes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capfd, argv, message):
    code, out, err = run(capfd, *argv)
    assert (code, out) == (2, "")
    assert re.search(f"^error: .*{message}", err, re.MULTILINE)


def rows() -> list[Row]:
    found = cases(shapes=["4/2/16"], lengths=[32, 64], works=["prefill", "decode"])
    return [Row(c, b, 1e-3, 10.0, 0.5, 10.0, "flops", 1e12, 0.5) for c in found for b in ("one", "other")]


def test_rows_are_in_the_file_as_they_come(tmp_path):
    passing = recorded(rows(), tmp_path / "a.csv")
    next(passing)
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2


def test_a_plot_is_a_picture(tmp_path):
    plot(rows(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"b\.png: there is nothing to plot: no backend was timed"):
        plot([Row(cases(**SMALL)[0], "one", note="not available")], tmp_path / "b.png")


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"a\.png: a plot needs matplotlib: pip install 'jaxinfer\[plot\]'"):
        plot(rows(), tmp_path / "a.png")
