"""Shared by the unit tests: where helpers lie, and a short garbage collection."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for helpers.py

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _freeze() -> None:
    """The block walk collects garbage after every block; torch's own objects need not be looked at each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
