"""Settings for all tests."""

import gc
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import jax
import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a slow machine is no fault
settings.load_profile("untimed")

MAPPINGS = Path("/proc/self/maps")  # on Linux
MOST = 25_000  # of the 65,530 mappings that a process may have, before it crashes; a compiled program takes dozens
done = count(1)


def pytest_runtest_teardown() -> None:
    """Forgets compiled programs now and then, for they are the most of a process's mappings."""
    if next(done) % 20 == 0 and MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """Compiling tiny programs takes most of the tests' time, and this half of it; others compile optimised ones."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
