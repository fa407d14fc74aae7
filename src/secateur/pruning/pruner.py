"""Score, select and reconstruct for one target of a request, in one step or in several."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur import distributed
from secateur.calibration.journal import Workspace
from secateur.config import identity
from secateur.evaluation.lm_eval.tasks import Task
from secateur.files import sync_tree, write_text
from secateur.formatting import percent
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.progress import notify
from secateur.pruning.block_reconstruction import reconstruct_plan
from secateur.pruning.calibration import Calibration
from secateur.pruning.cost import reconstruction_flops, scoring_flops
from secateur.pruning.image_samples import ImageSamples
from secateur.pruning.iterations import PruningStep, split_steps
from secateur.pruning.pipeline import make_plan, write_pruned
from secateur.pruning.request import PruneRequest
from secateur.pruning.target import Target

__all__ = ["Pruner"]


@dataclass(frozen=True)
class Pruner:
    """Makes the plans of a request, on one calibration set."""

    request: PruneRequest
    checkpoint: Checkpoint
    calibration: Calibration | ImageSamples | None
    device: str
    dtype: torch.dtype

    def plan(self, target: Target, workspace: Workspace) -> Plan:
        """Plan one step to a target, with tuned weights where the request says so."""
        plan = self._score(self.checkpoint, target, workspace)
        if self.request.reconstruct is None:
            return plan
        key = f"reconstruct-{self.request.targets.index(target)}"
        return self._reconstruct(self.checkpoint, plan, workspace, key, self.request.reconstruct)

    def plan_in_steps(
        self, target: Target, steps: Sequence[PruningStep], folder: Path, states: str
    ) -> tuple[Plan, tuple[Checkpoint, Plan]]:
        """Prune in steps, each scored on the model that the step before left; finished steps are not repeated.

        The steps of a reconstruction are divided among them. Its targets are the blocks of the first model in each, and
        it goes on in the order of windows where the step before stopped.

        Args:
            folder: of the models between the steps, and of the results of unfinished ones.
            states: place of the states between blocks.

        Returns:
            The plan for the first model; and what the weights come from, the model before the last step and its plan.
        """
        count = len(steps)
        tuning = split_steps(self.request.reconstruct or 0, count)
        number = max((n for n in range(1, count) if (_step_folder(folder, n) / "finished").is_file()), default=0)
        checkpoint, whole = self._resume(folder, number, steps)
        while True:
            step, here = steps[number], _step_folder(folder, number + 1)
            notify(f"step {number + 1} of {count}: up to {percent(step.ratio)} gone")
            workspace = Workspace(here, states)
            plan = self._score(checkpoint, step.target, workspace)
            if self.request.reconstruct:
                earlier = None if whole is None else whole.keep_hidden
                skip = sum(tuning[:number])
                plan = self._reconstruct(checkpoint, plan, workspace, "reconstruct", tuning[number], skip, earlier)
            joined = self._join(target, whole, plan, step)
            number += 1
            if number == count:
                return joined, (checkpoint, plan)
            if distributed.is_main():
                _write_step(self.checkpoint, joined, here, (checkpoint, plan))
            distributed.barrier()
            checkpoint, whole = self._resume(folder, number, steps)

    def _resume(self, folder: Path, number: int, steps: Sequence[PruningStep]) -> tuple[Checkpoint, Plan | None]:
        """The model that so many steps left and its plan; the models before it are deleted."""
        if number == 0:
            return self.checkpoint, None
        model = _step_folder(folder, number) / "model"
        opened = Checkpoint(model)
        plan = Plan.load_selection(model, self.checkpoint.shape, opened.shape)
        distributed.barrier()  # until no process reads in the model before
        if distributed.is_main():
            for earlier in range(1, number):
                shutil.rmtree(_step_folder(folder, earlier), ignore_errors=True)
        return opened, plan

    def _score(self, checkpoint: Checkpoint, target: Target, workspace: Workspace) -> Plan:
        request = self.request
        task = None
        if request.task:
            task = Task(request.task, data=request.tasks_data, limit=request.task_limit, few_shot=0)
        fields: dict[str, Any] = {"options": request.options, "task": task, "batch": request.batch}
        fields |= {"device": self.device, "dtype": self.dtype, "workspace": workspace}
        return make_plan(checkpoint, request.method, target, self.calibration, **fields)

    def _reconstruct(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        workspace: Workspace,
        key: str,
        steps: int,
        skip: int = 0,
        channels: torch.Tensor | None = None,
    ) -> Plan:
        """The plan with weights that ``steps`` have tuned to the blocks of the first model."""
        assert self.request.reconstruction is not None and isinstance(self.calibration, Calibration)
        how = dataclasses.replace(self.request.reconstruction, steps=steps)
        execution = {"device": self.device, "dtype": self.dtype, "batch": self.request.batch}
        execution |= {"store": workspace.store(key), "journal": workspace.journal(key), "skip": skip}
        dense = {"dense": self.checkpoint, "channels": channels}
        return reconstruct_plan(checkpoint, plan, self.calibration.windows, how, **dense, **execution)

    def _join(self, target: Target, whole: Plan | None, plan: Plan, step: PruningStep) -> Plan:
        """The plan from the first model to the output of a step, with the records of all steps."""
        request, method = self.request, self.request.prototype
        windows, seqlen = self.calibration.size if self.calibration else (0, 0)
        tokens = windows * seqlen
        scored = tokens if request.scores_text else 0
        flops = scoring_flops(step.before, step.after, method, scored, seqlen, propagate=step.target.propagate)
        record: dict[str, Any] = {"ratio": step.ratio, "target": step.target.record(method), "tokens": tokens}
        if tuning := plan.summary.get("reconstruction"):
            record["reconstruction"] = tuning
            shapes = (self.checkpoint.shape, step.after)
            flops += reconstruction_flops(*shapes, tuning["tokens"], tokens, seqlen)
        record["flops"] = flops
        earlier = whole.summary["iterations"] if whole else []
        fields = target.record(method) | ({"options": identity(method)} if identity(method) else {})
        fields |= {"reconstruct": identity(request.reconstruction)} if request.reconstruction else {}
        fields |= {"iterations": request.iterations, "iteration_schedule": request.iteration_schedule}
        detail = f"in {request.iterations} steps, of which step {len(earlier) + 1}: {plan.summary['detail']}"
        summary = {**plan.summary, "detail": detail, "iterations": [*earlier, record]}
        plan = plan if whole is None else whole.then(plan)
        return dataclasses.replace(plan, request=fields, summary=summary)


def _step_folder(folder: Path, number: int) -> Path:
    return folder / f"step-{number}"


def _write_step(checkpoint: Checkpoint, plan: Plan, folder: Path, last: tuple[Checkpoint, Plan]) -> None:
    """Write the model that a step left, and mark the step as finished."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    (folder / "model").mkdir()
    write_pruned(checkpoint, plan, folder / "model", last=last)
    sync_tree(folder / "model")
    write_text(folder / "finished", "")
