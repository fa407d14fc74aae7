"""Stages as jobs of SLURM, through submitit: each waits for its inputs' jobs, stages of the same inputs are an array.

A job runs the same command as a stage of several processes on one machine. When its time is nearly over, or it is
preempted, the stage is told to save and stop, and the job is queued again. Job ids lie in ``<out>/jobs``: a run that
starts while jobs are queued waits for these and does not submit them twice.
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
from secateur.study.runner.scheduler import Run, StudyOutcome
from secateur.study.runner.slurm_job import Job
from secateur.study.runner.torchrun import processes_of
from secateur.study.stage import Stage, with_inputs
from secateur.study.store import StageOutcome, Store, key_of

__all__ = ["Slurm", "parse_slurm", "run_on_slurm"]

_LOOK_EVERY = 5.0  # seconds between looks at the queue
_PATIENCE = 60.0  # seconds until what a job wrote last is seen here
_PASSED_ON = ("partition", "account", "qos", "constraint", "mem")  # to sbatch, as they are
_REQUEUES = 1000  # times that a job may run out of time: each goes on where the last one stopped


@spec
class Slurm:
    """What a job asks for."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Positive = 60  #: minutes; a stage that takes longer is queued again and goes on
    mem: Annotated[str, Field(pattern=r"^\d+[KMGT]B?$")] | None = None  #: of a node
    cpus: Positive = 1  #: for each process
    gpus: Annotated[int, Field(ge=0)] | None = None  #: of a node; one for each process on it unless given
    nodes: Positive = 1  #: that share a stage of several processes
    array: Positive = 256  #: jobs of an array that run at once
    grace: Positive = 90  #: seconds before its end in which a job saves


def parse_slurm(pairs: Sequence[str]) -> Slurm:
    """Read ``KEY=VALUE`` pairs.

    Raises:
        UserError: if a key is unknown or a value cannot be.
    """
    raw = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--slurm {pair}: give KEY=VALUE, e.g. time=120")
        if key not in (known := [f.name for f in fields(Slurm)]):
            raise UserError(f"--slurm {key}: is not known{did_you_mean(key, known)}")
        raw[key] = value if key in _PASSED_ON else parse_value(value)
    return parse(Slurm, raw, origin="--slurm")


def run_on_slurm(
    stages: list[Stage], out: Path, file: Path, *, options: Slurm, device: str, keep_going: bool
) -> StudyOutcome:
    """Submit what is not done yet and wait for it; interrupted, the jobs go on.

    Args:
        stages: to run, and with them what they are made from.
        out: the study's directory, which all nodes see.
        file: the study file.
        options: what each job asks for.
        device: ``auto``, ``cpu`` or ``cuda``.
        keep_going: after a failure let the jobs that do not depend on it go on; else they are cancelled.

    Raises:
        UserError: if submitit or SLURM is not there, or refuses a job.
    """
    run = Run(with_inputs(stages), Store(out.resolve()), keep_going=keep_going)
    if not run.waiting:
        return run.outcome
    queue = _Queue(out.resolve(), file, options, device)
    try:
        return _follow(run, queue, queue.submit(run))
    except KeyboardInterrupt:
        progress.notify("the jobs go on: `study status FILE --watch` shows them, and the same command waits again")
        raise


def _follow(run: Run, queue: _Queue, jobs: dict[str, str]) -> StudyOutcome:
    """Wait until every job has ended."""
    gone: dict[str, float] = {}
    work = sum(stage.flops for stage in run.waiting.values())
    with progress.track("whole study", work) as whole:
        while run.waiting:
            queued = queue.there(jobs.values())
            for stage in list(run.waiting.values()):
                if _settled(stage, run, jobs[stage.fingerprint] in queued, gone):
                    whole.advance(stage.flops, f"{len(run.done)} of {len(run.stages)} stages done")
            if run.stopping:
                queue.cancel({jobs[key] for key, stage in run.waiting.items() if not run.store.held(stage)} & queued)
            if run.waiting:
                time.sleep(_LOOK_EVERY)
    return run.outcome


def _settled(stage: Stage, run: Run, queued: bool, gone: dict[str, float]) -> bool:
    """Take note of what became of a stage; False while its job may still do something.

    Args:
        stage: that is waited for.
        run: it is of.
        queued: whether its job is in the queue.
        gone: fingerprint -> since when a job is not, without a result.
    """
    store, key = run.store, stage.fingerprint
    if store.done(stage) and not (key in run.damaged and (queued or store.damage(stage))):
        del run.waiting[key]
        run.ended(stage, StageOutcome("done"))
        return True
    if queued or store.held(stage):
        gone.pop(key, None)
        return False
    if {used.fingerprint for used in stage.inputs.values()} & run.lost:
        run.drop(stage, run.outcome.skipped)
        return True
    error = store.runtime(stage).get("error")
    if run.stopping and not error:
        run.drop(stage, run.outcome.not_started)
        return True
    if not error and time.monotonic() - gone.setdefault(key, time.monotonic()) < _PATIENCE:
        return False
    lost = f"its job has ended without a result (see {store.log(stage)} and {store.out / 'jobs'})"
    del run.waiting[key]
    run.ended(stage, StageOutcome("failed", str(error or lost)))
    return True


class _Queue:
    """SLURM's queue, and what of the study is in it."""

    def __init__(self, out: Path, file: Path, options: Slurm, device: str) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError("--launcher slurm: needs submitit; pip install 'secateur[slurm]'") from None
        self.folder, self.out, self.options, self.device = out / "jobs", out, options, device
        self.file = self.folder / "study.yaml"  # the file may change while jobs wait
        write_text(self.file, file.read_text(encoding="utf-8"))
        try:
            self.executor = submitit.SlurmExecutor(self.folder / "%j", max_num_timeout=_REQUEUES)
        except RuntimeError:
            raise UserError("--launcher slurm: there is no srun here; run it where jobs are submitted") from None

    def submit(self, run: Run) -> dict[str, str]:
        """Queue what is waiting, but for what is queued already; return fingerprint -> job id."""
        known = {stage.fingerprint: self._known(stage) for stage in run.waiting.values()}
        queued = self.there(job for job in known.values() if job)
        jobs = {key: job for key, job in known.items() if job in queued and job}
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
        progress.notify(f"{len(jobs)} jobs, {len(groups)} submissions; what they print is in {self.folder}")
        return jobs

    def _submit(self, stages: list[Stage], after: list[str], processes: int) -> dict[str, str]:
        """Queue stages of the same inputs as one array."""
        asked = self.options
        nodes = asked.nodes if processes > 1 else 1
        if processes % nodes:
            raise UserError(f"--slurm nodes={nodes}: {processes} processes do not divide into so many")
        on_node = processes // nodes
        gpus = asked.gpus if asked.gpus is not None else on_node if self.device == "cuda" else 0
        told: dict[str, Any] = {
            key: getattr(asked, key) for key in ("partition", "account", "qos", "constraint", "mem")
        }
        told |= {"gpus_per_node": gpus or None, "dependency": ":".join(["afterok", *after]) if after else None}
        self.executor.update_parameters(
            **{key: value for key, value in told.items() if value is not None},
            job_name=f"secateur-{stages[0].kind}",
            time=asked.time,
            nodes=nodes,
            ntasks_per_node=1,
            cpus_per_task=asked.cpus * on_node,
            array_parallelism=asked.array,
            signal_delay_s=asked.grace,
            additional_parameters={"kill-on-invalid-dep": "yes", "requeue": True},
        )
        self.executor.parameters = {k: v for k, v in self.executor.parameters.items() if after or k != "dependency"}
        work = [Job(stage, self.file, self.out, self.device, nodes, asked.grace) for stage in stages]
        try:
            with self.executor.batch():
                submitted = [self.executor.submit(job) for job in work]
        except Exception as error:  # submitit passes on what sbatch says, in errors of several kinds
            raise UserError(f"--launcher slurm: {first_line(error)}") from None
        found = {stage.fingerprint: job.job_id for stage, job in zip(stages, submitted, strict=True)}
        for stage in stages:
            write_json(self._note(stage), {"job": found[stage.fingerprint]})
        return found

    def _note(self, stage: Stage) -> Path:
        return self.folder / f"{key_of(stage)}.json"

    def _known(self, stage: Stage) -> str | None:
        try:
            return read_json(self._note(stage))["job"]
        except (UserError, LookupError, TypeError):
            return None

    def there(self, jobs: Iterable[str]) -> set[str]:
        """Which of some jobs are in the queue."""
        asked = set(jobs)
        command = ["squeue", "--noheader", "--array", "--format=%i", "--me"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:  # e.g. a controller that is away: nothing is known, and nothing has failed
            return asked
        return asked & set(done.stdout.split())

    def cancel(self, jobs: set[str]) -> None:
        """Take jobs out of the queue."""
        if jobs:
            subprocess.run(["scancel", *sorted(jobs)], capture_output=True, check=False)
