"""Running a study: stages whose inputs are finished are started, the most urgent first, as far as there is room."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from secateur import progress
from secateur.runtime import core_count
from secateur.study.runner.local import LocalLauncher
from secateur.study.stage import Stage, with_inputs
from secateur.study.store import StageOutcome, Store, key_of

__all__ = ["Launcher", "StudyOutcome", "Survey", "run_stages", "survey"]

_LOOK_EVERY = 1.0  # seconds between looks at what other processes are doing


@dataclass
class StudyOutcome:
    """The outcome of a run of a study."""

    already_done: int = 0  #: stages that were finished before
    ran: int = 0  #: stages that this run ran, failed ones included
    elsewhere: int = 0  #: stages that another process finished during the run
    failed: dict[str, str] = field(default_factory=dict)  #: stage name -> one line
    skipped: list[str] = field(default_factory=list)  #: names of stages whose inputs failed
    not_started: list[str] = field(default_factory=list)  #: names of stages that a failure kept from starting
    stopped: str = ""  #: why the run stopped early; empty if it did not

    def as_dict(self) -> dict[str, Any]:
        """The outcome as plain values, as ``--json`` prints it."""
        return {key: value for key, value in asdict(self).items() if key != "stopped"}

    def summary(self, logs: Path) -> list[str]:
        """The outcome in lines for people."""
        parts = [f"{self.already_done} stages were done before", f"{self.ran - len(self.failed)} run"]
        parts += [f"{self.elsewhere} done by other processes"] if self.elsewhere else []
        lines = [", ".join([*parts, f"{len(self.failed)} failed"])]
        if self.not_started:
            lines.append(
                f"{len(self.not_started)} stages were not started after the failure; keep-going runs those that do "
                "not depend on it"
            )
        return [*lines, f"the log of each stage is in {logs}"] if self.failed else lines


class Launcher(Protocol):
    """What does stages somewhere, several at a time."""

    def room(self, stage: Stage) -> bool:
        """Whether the stage could start now."""
        ...

    def start(self, stage: Stage, after: int) -> None:
        """Start it; ``after`` is the number of its last claim."""
        ...

    def wait(self, seconds: float) -> list[tuple[Stage, StageOutcome]]:
        """Wait for stages to end, so long at most."""
        ...

    def close(self, *, kill: bool) -> None:
        """Give back what is held."""
        ...


@dataclass(frozen=True)
class Survey:
    """Which of some stages are done."""

    done: frozenset[str]  #: fingerprints of those that are finished and whole
    damaged: Mapping[str, str]  #: fingerprint -> what is wrong with it


def survey(stages: list[Stage], store: Store) -> Survey:
    """Look for finished stages and compare each of their files with its hash."""
    found = [stage for stage in stages if store.done(stage)]
    damaged: dict[str, str] = {}
    with progress.track("check finished stages", len(found)) as task, ThreadPoolExecutor(core_count()) as pool:
        for stage, damage in zip(found, pool.map(store.damage, found), strict=True):
            if damage:
                damaged[stage.fingerprint] = damage
            task.advance(1, stage.name)
    return Survey(frozenset(s.fingerprint for s in found) - damaged.keys(), damaged)


def run_stages(
    stages: list[Stage],
    out: Path,
    *,
    jobs: int | None = None,
    device: str = "cpu",
    file: Path | None = None,
    keep_going: bool = False,
) -> StudyOutcome:
    """Run what is not done yet on this machine; stages that are done are not touched.

    Args:
        stages: to run, and with them what they are made from.
        out: the study's directory.
        jobs: stages at once; None for as many as there are cores, or GPUs.
        device: ``cpu`` or ``cuda``.
        file: the study file, which stages of several processes need.
        keep_going: after a failure go on with what does not depend on it; else only what is running goes on.

    Raises:
        UserError: if a stage needs more than the machine has.
    """
    run = Run(with_inputs(stages), Store(out), keep_going=keep_going)
    if not run.waiting:
        return run.outcome
    launcher = LocalLauncher(out, jobs=jobs, device=device, file=file)
    launcher.check(list(run.waiting.values()))
    return run.through(launcher)


class Run:
    """Stages on their way through a launcher."""

    def __init__(self, stages: list[Stage], store: Store, *, keep_going: bool) -> None:
        self.stages, self.store, self.keep_going = stages, store, keep_going
        found = survey(stages, store)
        self.done = set(found.done)
        self.damaged = dict(found.damaged)
        for stage in stages:
            if stage.fingerprint in self.damaged:
                progress.notify(f"{stage.kind} {stage.name}: {self.damaged[stage.fingerprint]}; it is done again")
        self.waiting = {s.fingerprint: s for s in stages if s.fingerprint not in self.done}
        self.outcome = StudyOutcome(already_done=len(self.done))
        self.lost: set[str] = set()  # fingerprints of stages that failed, or whose inputs did
        self.elsewhere: set[str] = set()  # fingerprints of stages that other processes are at

    def through(self, launcher: Launcher) -> StudyOutcome:
        """Run what is waiting."""
        urgency = _critical_paths(self.stages)
        order = sorted(self.waiting.values(), key=lambda stage: -urgency[stage.fingerprint])
        running, killed = 0, True
        work = sum(stage.flops for stage in order)
        try:
            with progress.track("whole study", work) as whole:
                while True:
                    for stage in order:
                        if stage.fingerprint in self.waiting and self._begins(stage, launcher):
                            running += 1
                            self._announce(stage, running)
                    if not running and not self.waiting:
                        break
                    for stage, ended in launcher.wait(_LOOK_EVERY):
                        running -= 1
                        self.ended(stage, ended)
                        whole.advance(stage.flops, f"{len(self.done)} of {len(self.stages)} stages done")
            killed = False
        finally:
            launcher.close(kill=killed)
            progress.close()
        return self.outcome

    @property
    def stopping(self) -> bool:
        """Whether nothing more is to be started."""
        return bool(self.outcome.stopped) or (bool(self.outcome.failed) and not self.keep_going)

    def _begins(self, stage: Stage, launcher: Launcher) -> bool:
        """Start a waiting stage if it can, or find that it need not or cannot be done."""
        fingerprint = stage.fingerprint
        inputs = {used.fingerprint for used in stage.inputs.values()}
        if inputs & self.lost:
            self.drop(stage, self.outcome.skipped)
        elif self.stopping:
            self.drop(stage, self.outcome.not_started)
        elif inputs <= self.done and launcher.room(stage):
            look = self.store.claims.look(key_of(stage))
            if not look.free:
                if fingerprint not in self.elsewhere:
                    progress.notify(f"{stage.kind} {stage.name}: another process is at it; this one waits for it")
                    self.elsewhere.add(fingerprint)
            elif fingerprint not in self.damaged and self.store.done(stage):
                del self.waiting[fingerprint]
                self.done.add(fingerprint)
                self.outcome.elsewhere += 1
            else:
                del self.waiting[fingerprint]
                self.elsewhere.discard(fingerprint)
                launcher.start(stage, look.number)
                return True
        return False

    def drop(self, stage: Stage, names: list[str]) -> None:
        """Give a waiting stage up, and note its name."""
        del self.waiting[stage.fingerprint]
        self.lost.add(stage.fingerprint)
        names.append(stage.name)

    def _announce(self, stage: Stage, running: int) -> None:
        progress.notify(f"[{len(self.done) + running}/{len(self.stages)}] {stage.kind} {stage.name}")

    def ended(self, stage: Stage, ended: StageOutcome) -> None:
        """Take note of what became of a stage that was started."""
        if ended.how == "elsewhere":  # another process was a little faster
            self.waiting[stage.fingerprint] = stage
            return
        self.outcome.ran += 1
        if ended.how == "done":
            self.done.add(stage.fingerprint)
            return
        self.lost.add(stage.fingerprint)
        if ended.how == "stopped":
            self.outcome.stopped = self.outcome.stopped or ended.text
            return
        self.outcome.failed[stage.name] = ended.text
        progress.notify(f"FAILED {stage.kind} {stage.name}: {ended.text}")


def _critical_paths(stages: list[Stage]) -> dict[str, float]:
    """FLOPs of the longest chain that begins with each stage: what should start first."""
    below: dict[str, float] = {}
    for stage in reversed(stages):
        below[stage.fingerprint] = below.get(stage.fingerprint, 0.0) + stage.flops + 1.0
        for used in stage.inputs.values():
            below[used.fingerprint] = max(below.get(used.fingerprint, 0.0), below[stage.fingerprint])
    return below
