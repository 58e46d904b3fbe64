"""Settings for all tests."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a slow machine is no fault
settings.load_profile("untimed")
