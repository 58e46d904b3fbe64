"""Settings for all tests."""

import gc
from collections.abc import Iterator
from itertools import count

import jax
import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a slow machine is no fault
settings.load_profile("untimed")

KEPT = 40  # tests whose compiled programs a process keeps
done = count(1)


def pytest_runtest_teardown() -> None:
    """Forgets programs: one takes dozens of memory mappings, and a process crashes that needs more than 65,530."""
    if next(done) % KEPT == 0:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """Compiling tiny programs takes most of the tests' time, and this half of it; others compile optimised ones."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
