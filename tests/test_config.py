"""Run files: what is read, and that every mistake is named."""

import tomllib
from pathlib import Path

import pytest

from jaxinfer import config

ALLOWED = {"model": str, "max_tokens": int, "temperature": float, "top_k": int, "ignore_eos": bool, "stop": list[str]}


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"

    def write(text: str | bytes) -> Path:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_values_have_their_types(run_file):
    path = run_file('model = "é.gguf"\nmax_tokens = 3\ntemperature = 1\nignore_eos = true\nstop = ["a"]\n')
    values = config.read(path, ALLOWED)
    assert values == {"model": "é.gguf", "max_tokens": 3, "temperature": 1.0, "ignore_eos": True, "stop": ["a"]}
    assert type(values["temperature"]) is float
    assert config.read(str(run_file("# nothing")), ALLOWED) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-tokens = 1", "'max-tokens' is no argument; the nearest one is 'max_tokens'"),
        ("temp = 1.0", "'temp' is no argument; the nearest one is 'temperature'"),
        ("[top_kk]\na = 1", "'top_kk' is no argument; the nearest one is 'top_k'"),
        ("max_tokens = 1.5", r"max_tokens must be of type int, not float"),
        ("max_tokens = true", r"max_tokens must be of type int, not bool"),
        ("temperature = false", r"temperature must be of type float, not bool"),
        ("temperature = '1'", r"temperature must be of type float, not str"),
        (f"temperature = 1{'0' * 400}", r"temperature must be of type float, not int"),
        ("ignore_eos = 1", r"ignore_eos must be of type bool, not int"),
        ("stop = 'a'", r"stop must be of type list of str, not str"),
        ("stop = ['a', 1]", r"stop must be of type list of str, not list"),
        ("model.name = 'a'", r"model must be of type str, not dict"),
        ("model = 'a'\nmodel = 'b'\n", r"not a TOML file: .*line 2"),
        ("max_tokens = \n", r"not a TOML file: .*line 1"),
        (f"max_tokens = 1{'0' * 5000}", "not a TOML file"),
        (f"stop = {'[' * 50_000}", "not a TOML file"),
        (b"model = '\xff'", "not a TOML file"),
        (b"GGUF" + bytes(2**20), "a run file has at most 1048576 bytes"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_mistakes_are_named_with_the_file(run_file, text, message):
    with pytest.raises(ValueError, match=rf"run\.toml: {message}"):
        config.read(run_file(text), ALLOWED)


@pytest.mark.parametrize("name", ["missing.toml", ".", "nul\0.toml", "x" * 5000])
def test_a_file_that_cannot_be_read(name):
    with pytest.raises(ValueError, match="cannot read this run file"):
        config.read(name, ALLOWED)


def test_an_unknown_key_far_from_all_others_still_has_a_nearest(run_file):
    with pytest.raises(ValueError, match="'zzz' is no argument; the nearest one is '"):
        config.read(run_file("zzz = 1"), ALLOWED)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_published_run_files_are_plain_toml(path):
    values = tomllib.loads(path.read_text())
    assert values["model"]
    assert not [key for key, value in values.items() if isinstance(value, dict)]
