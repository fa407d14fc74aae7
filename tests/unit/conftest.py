"""Shared by the unit tests: where helpers lie, and a short garbage collection."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for helpers.py

import pytest
import torch

from reference import Zoo


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> None:
    """The block walk collects garbage after every block; what libraries made need not be looked at each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    """Shared by all modules, since most of its time goes into making it."""
    root = tmp_path_factory.mktemp("zoo")
    yield Zoo(root)
    shutil.rmtree(root)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
