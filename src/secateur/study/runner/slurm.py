"""Run stages as SLURM jobs through submitit. A job waits for its inputs; stages with the same inputs are an array.

A job runs the same command as a stage of several processes on one machine. When its time is nearly over, or it is
preempted, the stage saves and stops, and the job is queued again. Job ids are in ``<out>/jobs``: a run that starts
while jobs are queued waits for them and does not submit them twice.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from secateur import progress
from secateur.config import Positive, parse, parse_value, spec
from secateur.errors import UserError, did_you_mean, first_line
from secateur.files import read_json, write_json, write_text
from secateur.formatting import plural
from secateur.runtime import install_command
from secateur.study.runner.scheduler import Run, StudyOutcome
from secateur.study.runner.slurm_job import Job
from secateur.study.runner.torchrun import processes_of
from secateur.study.stage import Stage, with_inputs
from secateur.study.store import StageOutcome, Store, key_of

__all__ = ["Slurm", "parse_slurm", "run_on_slurm"]

_POLL_SECONDS = 5.0  # between looks at the queue
_DISK_SECONDS = 60.0  # until the last files of a job are visible here
_SBATCH_OPTIONS = ("partition", "account", "qos", "constraint", "mem")  # passed to sbatch unchanged
_REQUEUES = 1000  # times that a job may run out of time and resume


@spec
class Slurm:
    """The resources of a job."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Positive = 60  #: minutes; a stage that takes longer is queued again and resumes
    mem: Annotated[str, Field(pattern=r"^\d+[KMGT]B?$")] | None = None  #: of a node
    cpus: Positive = 1  #: for each process
    gpus: Annotated[int, Field(ge=0)] | None = None  #: of a node; by default one for each process on it
    nodes: Positive = 1  #: that share a stage of several processes
    array: Positive = 256  #: jobs of an array that run at once
    grace: Positive = 90  #: seconds before the end of a job in which it saves


def parse_slurm(pairs: Sequence[str]) -> Slurm:
    """Read ``KEY=VALUE`` pairs.

    Raises:
        UserError: if a key is unknown or a value invalid.
    """
    raw = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"`slurm` {pair}: is not KEY=VALUE, as in time=120")
        if key not in (names := [f.name for f in fields(Slurm)]):
            raise UserError(f"`slurm` {key}: is not known{did_you_mean(key, names)}")
        raw[key] = value if key in _SBATCH_OPTIONS else parse_value(value)
    return parse(Slurm, raw, origin="`slurm`")


def run_on_slurm(
    stages: list[Stage], out: Path, file: Path, *, options: Slurm, device: str, keep_going: bool
) -> StudyOutcome:
    """Submit the stages that are not done, and their inputs, and wait. An interrupt does not end the jobs.

    Args:
        out: the study's folder, on a disk that all nodes share.
        device: ``auto``, ``cpu`` or ``cuda``.
        keep_going: after a failure, keep the jobs that do not depend on it; otherwise cancel them.

    Raises:
        UserError: if submitit or SLURM is missing, or refuses a job.
    """
    run = Run(with_inputs(stages), Store(out.resolve()), keep_going=keep_going)
    if not run.waiting:
        return run.outcome
    queue = _Queue(out.resolve(), file, options, device)
    try:
        return _follow(run, queue, queue.submit(run))
    except KeyboardInterrupt:
        progress.notify("the jobs continue: `study status` shows them, and the same command waits for them again")
        raise


def _follow(run: Run, queue: _Queue, jobs: dict[str, str]) -> StudyOutcome:
    """Wait until every job has ended."""
    missing: dict[str, float] = {}
    with progress.track("whole study", 1.0) as whole:
        while run.waiting:
            queued = queue.filter_queued(jobs.values())
            for stage in list(run.waiting.values()):
                _settle(stage, run, jobs[stage.fingerprint] in queued, missing)
            running = sum(processes_of(stage) for stage in run.waiting.values() if run.store.is_running(stage))
            run.report_progress(whole, max(running, 1))
            if run.stopping:
                queue.cancel(
                    {jobs[key] for key, stage in run.waiting.items() if not run.store.is_running(stage)} & queued
                )
            if run.waiting:
                time.sleep(_POLL_SECONDS)
    return run.outcome


def _settle(stage: Stage, run: Run, queued: bool, missing: dict[str, float]) -> None:
    """Record the outcome of a stage, unless its job may still run.

    Args:
        stage: one of the run's waiting stages.
        queued: whether the stage's job is in the queue.
        missing: fingerprint -> time at which its job was first missing from the queue without a result.
    """
    store, key = run.store, stage.fingerprint
    if store.done(stage) and not (key in run.damaged and (queued or store.damage(stage))):
        del run.waiting[key]
        run.record_outcome(stage, StageOutcome("done"))
        return
    if queued or store.is_running(stage):
        missing.pop(key, None)
        return
    if {used.fingerprint for used in stage.inputs.values()} & run.unavailable:
        run.drop(stage, run.outcome.skipped)
        return
    error = store.runtime(stage).get("error")
    if run.stopping and not error:
        run.drop(stage, run.outcome.not_started)
        return
    if not error and time.monotonic() - missing.setdefault(key, time.monotonic()) < _DISK_SECONDS:
        return
    text = f"its job ended without a result (see {store.log(stage)} and {store.out / 'jobs'})"
    del run.waiting[key]
    run.record_outcome(stage, StageOutcome("failed", str(error or text)))


class _Queue:
    """The study's jobs in SLURM's queue."""

    def __init__(self, out: Path, file: Path, options: Slurm, device: str) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError(f"`launcher` slurm: needs submitit; {install_command('secateur[slurm]')}") from None
        self.folder, self.out, self.options, self.device = out / "jobs", out, options, device
        self.file = self.folder / "study.yaml"  # the file may change while jobs wait
        write_text(self.file, file.read_text(encoding="utf-8"))
        try:
            self.executor = submitit.SlurmExecutor(self.folder / "%j", max_num_timeout=_REQUEUES)
        except RuntimeError:
            raise UserError("`launcher` slurm: srun is missing; run the study on a host that can submit jobs") from None

    def submit(self, run: Run) -> dict[str, str]:
        """Submit the waiting stages that are not queued yet; return fingerprint -> job id of all of them."""
        earlier = {stage.fingerprint: self._recorded_job(stage) for stage in run.waiting.values()}
        queued = self.filter_queued(job for job in earlier.values() if job)
        jobs = {key: job for key, job in earlier.items() if job in queued and job}
        groups: dict[tuple[Any, ...], list[Stage]] = {}
        for stage in run.stages:  # each after its inputs
            if stage.fingerprint in run.waiting and stage.fingerprint not in jobs:
                needs = frozenset(used.fingerprint for used in stage.inputs.values() if used.fingerprint in run.waiting)
                groups.setdefault((needs, processes_of(stage)), []).append(stage)
        waiting = list(groups.items())
        while waiting:
            for entry in [entry for entry in waiting if entry[0][0] <= jobs.keys()]:
                (needs, processes), stages = entry
                jobs |= self._submit(stages, sorted(jobs[key] for key in needs), processes)
                waiting.remove(entry)
        progress.notify(
            f"{plural(len(jobs), 'job')}, {plural(len(groups), 'submission')}; their output is in {self.folder}"
        )
        return jobs

    def _submit(self, stages: list[Stage], after: list[str], processes: int) -> dict[str, str]:
        """Submit stages with the same inputs as one array; return fingerprint -> job id."""
        options = self.options
        nodes = options.nodes if processes > 1 else 1
        if processes % nodes:
            raise UserError(
                f"`slurm` nodes={nodes}: must divide {stages[0].name}'s {plural(processes, 'process', 'processes')}"
            )
        on_node = processes // nodes
        gpus = options.gpus if options.gpus is not None else on_node if self.device == "cuda" else 0
        parameters: dict[str, Any] = {key: getattr(options, key) for key in _SBATCH_OPTIONS}
        parameters |= {"gpus_per_node": gpus or None, "dependency": ":".join(["afterok", *after]) if after else None}
        self.executor.update_parameters(
            **{key: value for key, value in parameters.items() if value is not None},
            job_name=f"secateur-{stages[0].kind}",
            time=options.time,
            nodes=nodes,
            ntasks_per_node=1,
            cpus_per_task=options.cpus * on_node,
            array_parallelism=options.array,
            signal_delay_s=options.grace,
            additional_parameters={"kill-on-invalid-dep": "yes", "requeue": True},
        )
        self.executor.parameters = {k: v for k, v in self.executor.parameters.items() if after or k != "dependency"}
        jobs = [Job(stage, self.file, self.out, self.device, nodes, options.grace) for stage in stages]
        try:
            with self.executor.batch():
                submitted = [self.executor.submit(job) for job in jobs]
        except Exception as error:  # submitit raises sbatch's messages in errors of several types
            raise UserError(f"`launcher` slurm: {first_line(error)}") from None
        ids = {stage.fingerprint: job.job_id for stage, job in zip(stages, submitted, strict=True)}
        for stage in stages:
            write_json(self._job_file(stage), {"job": ids[stage.fingerprint]})
        return ids

    def _job_file(self, stage: Stage) -> Path:
        return self.folder / f"{key_of(stage)}.json"

    def _recorded_job(self, stage: Stage) -> str | None:
        try:
            return read_json(self._job_file(stage))["job"]
        except (UserError, LookupError, TypeError):
            return None

    def filter_queued(self, jobs: Iterable[str]) -> set[str]:
        """Return those of ``jobs`` that are in the queue; all of them if squeue fails."""
        ids = set(jobs)
        command = ["squeue", "--noheader", "--array", "--format=%i", "--me"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:  # e.g. the controller is down, which is no failure of the jobs
            return ids
        return ids & set(result.stdout.split())

    def cancel(self, jobs: set[str]) -> None:
        """Cancel jobs."""
        if jobs:
            subprocess.run(["scancel", *sorted(jobs)], capture_output=True, check=False)
