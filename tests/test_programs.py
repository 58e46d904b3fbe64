"""Programs that are kept in files, and their kernels apart: what is found again, and when it must not be."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import model_path

import jaxinfer
from jaxinfer import engine, programs
from jaxinfer.layers.norm import rms_norm
from jaxinfer.pallas.reduce import reduce
from jaxinfer.programs import Program

X = np.arange(1, 9, dtype=np.float32).reshape(2, 4)
NORMED = X / np.sqrt((X**2).mean(1, keepdims=True) + 1)


@pytest.fixture
def folder(tmp_path) -> Path:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    return tmp_path


def norm() -> Program:
    """A program that no process has prepared."""
    return Program(rms_norm, static_argnames=("eps",), donate_argnames="x")


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rms_norm-*.lowered"))


def check(program: Program, x: np.ndarray = X, eps: float = 1.0) -> None:
    given = jnp.array(x)
    # One rounding each of the mean, the root and two products in f32.
    np.testing.assert_allclose(program(given, None, eps), x / np.sqrt((x**2).mean(1, keepdims=True) + eps), rtol=5e-7)
    assert given.is_deleted()


def test_a_file_saves_tracing(folder, monkeypatch):
    check(norm())
    (path,) = files(folder)
    written = path.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(Program, "_export", None)
        patch.setattr(jax.lax, "rsqrt", None)  # what it would be traced by
        again = norm()
        check(again)
        check(again)
    assert [files(folder), path.stat().st_mtime_ns] == [[path], written]


def test_from_shapes_in_two_steps(folder):
    program = norm()
    finish = program.prepare(jax.ShapeDtypeStruct((2, 4), jnp.float32), None, eps=1.0)
    assert len(files(folder)) == 1
    assert not program._prepared
    finish()
    assert len(program._prepared) == 1
    check(program)
    assert len(program._prepared) == 1


def test_what_a_program_is_made_from_is_in_its_name(folder, monkeypatch):
    check(norm())
    check(norm(), eps=2.0)
    check(norm(), X[:1])
    assert len(files(folder)) == 3
    with jax.default_matmul_precision("highest"):
        check(norm())
    monkeypatch.setattr(programs, "_source", lambda: "changed")
    check(norm())
    assert len(files(folder)) == 5


def test_a_damaged_file_is_written_anew(folder):
    check(norm())
    (path,) = files(folder)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1] + b"\0", whole[:40] + b"\0" + whole[41:]):
        path.write_bytes(damaged)
        check(norm())
        assert programs._read(path) is not None


def test_what_has_no_lasting_name_is_not_kept(folder):
    def local(x: jax.Array, eps: float) -> jax.Array:
        return x * eps

    mine = Program(local, static_argnames=("eps",))
    np.testing.assert_array_equal(mine(X, 2.0), X * 2)
    for op in (local, lambda x: x, partial(local, eps=1.0), object()):
        with pytest.raises(programs._Nameless):
            programs._described({"op": op})
    assert not list(folder.glob("*.lowered"))


def test_names_tell_values_and_types_apart():
    scalars = [1, 1.0, True, "1", np.float32(1), np.float32(2), np.int32(1), np.dtype("int32")]
    others = [[1], (1,), {"a": 1}, {"b": 1}, partial(rms_norm, eps=np.float32(1)), partial(rms_norm, eps=np.float32(2))]
    names = [
        programs._described(x) for x in [*scalars, *others, rms_norm, programs._Kind((1,), np.dtype("int32"), False)]
    ]
    assert len(set(names)) == len(names)
    with pytest.raises(programs._Nameless):
        programs._described(np.ones(2))


def test_where_nothing_can_be_written_it_runs_and_says_so(folder):
    (folder / "file").write_text("")
    jax.config.update("jax_compilation_cache_dir", str(folder / "file" / "within"))
    with pytest.warns(UserWarning, match="the program is not kept"):
        check(norm())


def test_without_a_folder_nothing_is_kept(folder):
    jax.config.update("jax_compilation_cache_dir", None)
    check(norm())
    assert not files(folder)


def test_calls_that_jit_takes_itself():
    program = norm()
    assert program.eval_shape(X, None, eps=1.0).shape == (2, 4)
    np.testing.assert_allclose(jax.vmap(lambda x: program(x[None], None, 1.0)[0])(X), NORMED, rtol=5e-7)
    with pytest.raises(TypeError):
        program(X)
    assert not program._prepared


@pytest.mark.parametrize("where", ["here", pytest.param("on a GPU", marks=pytest.mark.gpu)])
def test_a_model_answers_from_files(folder, monkeypatch, where):
    loaded = jaxinfer.load(model_path("qwen3"))
    assert (next(iter(jax.tree.leaves(loaded.params)[0].devices())).platform == "gpu") == (where == "on a GPU")

    def answer() -> list[int]:
        for one in (engine.prefill, engine.decode):
            monkeypatch.setattr(one, "_prepared", {})
        options = {"max_tokens": 8, "chunk": 8, "ignore_eos": True, "sampler": jaxinfer.Sampler.greedy()}
        return [piece.token for piece in jaxinfer.stream(*loaded, list(range(20)), **options)]

    first = answer()
    assert sorted(path.name.split("-")[0] for path in folder.glob("*.lowered")) == ["decode", "prefill"]
    monkeypatch.setattr(Program, "_export", None)
    assert answer() == first


def lowered() -> jax.stages.Lowered:
    def program(rows: jax.Array, weights: jax.Array, others: jax.Array) -> tuple[jax.Array, ...]:
        ys = [reduce(rows, None, w, None, dtype=jnp.bfloat16) for w in (weights, others, weights)]
        return ys[0] + ys[2], ys[1]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 64), (2, 2), (1, 4))]
    return jax.jit(program).trace(*shapes).lower(lowering_platforms=("cuda",))


def test_each_kernel_of_a_program_is_lowered_alone():
    program = lowered()
    alone = programs.kernels(program, jax.devices("cpu")[0])

    def calls(one: jax.stages.Lowered) -> set[str]:
        """What is between the arguments and the types."""
        lines = [line for line in one.as_text().splitlines() if "@mosaic_gpu_v2" in line]
        return {line[line.index(") {") : line.rindex("} :")] for line in lines}

    assert len(alone) == 2
    assert all(len(calls(one)) == 1 for one in alone)
    assert set().union(*map(calls, alone)) == calls(program)


@pytest.mark.parametrize("name", ["bool", "int8", "uint16", "int32", "float32", "bfloat16", "float16"])
def test_types_by_their_names(name):
    text = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((3,), name)).as_text()
    assert programs._dtype(text.split("tensor<3x")[1].split(">")[0]) == jnp.dtype(name)
