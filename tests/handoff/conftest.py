"""Shared by the tests of hand-offs: where helpers lie."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # tests/, for helpers.py
