"""Settings of every test."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same examples on every run, without a store of earlier ones, and without limits of time: machines differ.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

ATTENTION_CHOICE = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@pytest.fixture(autouse=True, scope="module")
def _own_attention_choice() -> Iterator[None]:
    """Core writes its attention backend into the environment and refuses another one later: each module has its own."""
    for name in ATTENTION_CHOICE:
        os.environ.pop(name, None)
    yield
    for name in ATTENTION_CHOICE:
        os.environ.pop(name, None)
