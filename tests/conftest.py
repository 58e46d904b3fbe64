"""Settings for all tests."""

import gc
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a slow machine is no fault
settings.load_profile("untimed")

MAPPINGS = Path("/proc/self/maps")  # on Linux
MOST = 40_000  # of the 65,530 mappings that a process may have, before it crashes; a compiled program takes dozens
done = count(1)


def pytest_collection_finish() -> None:
    """What was imported stays, and need not be looked through for garbage again and again."""
    gc.freeze()


def pytest_runtest_teardown() -> None:
    """Forgets compiled programs now and then, for they are the most of a process's mappings."""
    if next(done) % 20 == 0 and MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """The command line sets where programs are kept, and whether, for its whole process."""
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def quick_compiler(request) -> Iterator[None]:
    """Compiling tiny programs takes most of the tests' time, so a fifth less; the marked ones compile as users do."""
    jax.config.update("jax_disable_most_optimizations", not request.node.get_closest_marker("optimised"))
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def templates_here(monkeypatch) -> None:
    """Fills in chat templates in this process; to start one for each takes a quarter of a second."""
    from jaxinfer import chat  # not above: what is imported before the tests is not checked for its types

    def render(template: str, messages: Sequence[Any], **kwargs: Any) -> str:
        return chat.fill(chat.compiled(template), messages, **kwargs)

    monkeypatch.setattr(chat, "render", render)
