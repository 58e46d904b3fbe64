"""Settings for all tests."""

from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a slow machine is no fault
settings.load_profile("untimed")


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """Compiling tiny programs takes most of the tests' time, and this half of it; others compile optimised ones."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
