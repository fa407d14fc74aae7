"""prune, with a method that learns what to cut: data, estimate, training, and the cut."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur import ranks
from secateur.checkpoint import Checkpoint, positions
from secateur.data.shards import TokenStore
from secateur.errors import UserError
from secateur.evaluate.loss import Protocol
from secateur.footprint import Use, learning_estimate, size, watched
from secateur.learn import learn, learning_recipe
from secateur.methods import LearnedMethod
from secateur.plan import Plan
from secateur.progress import say
from secateur.prune import scoring_flops, write_pruned
from secateur.report.words import scientific
from secateur.runtime import pick_batch
from secateur.shapes import Shape
from secateur.target import Target
from secateur.train.loop import Housekeeping
from secateur.train.measure import held_out_loss
from secateur.train.metrics import Metrics
from secateur.train.parallel import Execution, Trainee
from secateur.train.speed import Meter, peak_of
from secateur.train.state import FINISHED
from secateur.train.watch import stop_on_signals
from secateur.verbs.directories import shared_directory
from secateur.verbs.ids import calibration_of, window_length

__all__ = ["learned"]
