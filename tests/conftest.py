"""Settings of every test."""

from hypothesis import settings

# The same examples on every run, without a store of earlier ones, and without limits of time: machines differ.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")
