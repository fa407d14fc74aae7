"""Run a study: start stages whose inputs are finished, the longest chain first, as long as there is room."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from secateur import progress
from secateur.formatting import plural
from secateur.runtime import core_count
from secateur.study.pace import study_progress
from secateur.study.runner.local import LocalLauncher
from secateur.study.stage import Stage, critical_paths, with_inputs
from secateur.study.store import StageOutcome, Store, key_of
from secateur.training.watchdog import stop_on_signals

__all__ = ["Launcher", "StudyOutcome", "Survey", "run_stages", "survey"]

_POLL_SECONDS = 1.0  # between looks at the stages of other processes
_REPORT_SECONDS = 5.0  # between estimates of the study's progress
_STOPPING = "training runs finish their steps and save"


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
        parts = [f"{plural(self.already_done, 'stage')} done before", f"{self.ran - len(self.failed)} run"]
        parts += [f"{self.elsewhere} done by other processes"] if self.elsewhere else []
        lines = [", ".join([*parts, f"{len(self.failed)} failed"])]
        if self.not_started and not self.stopped:
            lines.append(
                f"{plural(len(self.not_started), 'stage')} not started after the failure; keep-going runs those that "
                "do not depend on it"
            )
        return [*lines, f"the log of each stage is in {logs}"] if self.failed else lines


class Launcher(Protocol):
    """Runs stages, several at once."""

    slots: int  #: processes at once

    def room(self, stage: Stage) -> bool:
        """Whether the stage could start now."""
        ...

    def start(self, stage: Stage, after: int) -> None:
        """Start the stage; ``after`` is the number of its last lease."""
        ...

    def wait(self, seconds: float) -> list[tuple[Stage, StageOutcome]]:
        """Wait up to ``seconds`` for stages to end; return those that did."""
        ...

    def stop(self) -> None:
        """Have stages that train save and end, and others end at once."""
        ...

    def close(self, *, kill: bool) -> None:
        """End the launcher's processes."""
        ...


@dataclass(frozen=True)
class Survey:
    """Which stages are finished, and which of these are damaged."""

    done: frozenset[str]  #: fingerprints of finished stages without damage
    damaged: Mapping[str, str]  #: fingerprint -> the damage


def survey(stages: list[Stage], store: Store) -> Survey:
    """Find the finished stages and check the hash of each of their files."""
    finished = [stage for stage in stages if store.done(stage)]
    damaged: dict[str, str] = {}
    with progress.track("check finished stages", len(finished)) as task, ThreadPoolExecutor(core_count()) as pool:
        for stage, damage in zip(finished, pool.map(store.damage, finished), strict=True):
            if damage:
                damaged[stage.fingerprint] = damage
            task.advance(1, stage.name)
    return Survey(frozenset(s.fingerprint for s in finished) - damaged.keys(), damaged)


def run_stages(
    stages: list[Stage],
    out: Path,
    *,
    jobs: int | None = None,
    device: str = "cpu",
    file: Path | None = None,
    keep_going: bool = False,
) -> StudyOutcome:
    """Run the stages that are not done, and their inputs, on this machine.

    Args:
        jobs: stages at once; None for one for each core, or GPU.
        file: the study file, which stages of several processes need.
        keep_going: after a failure, start the stages that do not depend on it; otherwise start no more.

    Raises:
        UserError: if a stage needs more than the machine has.
    """
    run = Run(with_inputs(stages), Store(out), keep_going=keep_going)
    if not run.waiting:
        return run.outcome
    launcher = LocalLauncher(out, jobs=jobs, device=device, file=file)
    launcher.check(list(run.waiting.values()))
    return run.execute(launcher)


class Run:
    """One run of a study's stages through a launcher."""

    def __init__(self, stages: list[Stage], store: Store, *, keep_going: bool) -> None:
        self.stages, self.store, self.keep_going = stages, store, keep_going
        finished = survey(stages, store)
        self.done = set(finished.done)
        self.damaged = dict(finished.damaged)
        for stage in stages:
            if stage.fingerprint in self.damaged:
                progress.notify(f"{stage.kind} {stage.name}: {self.damaged[stage.fingerprint]}; it will be run again")
        self.waiting = {s.fingerprint: s for s in stages if s.fingerprint not in self.done}
        self.outcome = StudyOutcome(already_done=len(self.done))
        self.unavailable: set[str] = set()  # fingerprints of stages that failed, or whose inputs did
        self.elsewhere: set[str] = set()  # fingerprints of stages that other processes are running
        self.started, self.reported = time.time(), 0.0  # times, in seconds since the epoch

    def execute(self, launcher: Launcher) -> StudyOutcome:
        """Run the waiting stages."""
        urgency = critical_paths(self.stages)
        order = sorted(self.waiting.values(), key=lambda stage: -urgency[stage.fingerprint])
        running, interrupted = 0, True
        try:
            with stop_on_signals(_STOPPING) as stop, progress.track("whole study", 1.0) as whole:
                while True:
                    if stop.is_set and not self.outcome.stopped:
                        self.outcome.stopped = "stopped by a signal; run the same command to resume"
                        launcher.stop()
                    for stage in order:
                        if stage.fingerprint in self.waiting and self._start_if_ready(stage, launcher):
                            running += 1
                            self._announce(stage, running)
                    if not running and not self.waiting:
                        break
                    for stage, outcome in launcher.wait(_POLL_SECONDS):
                        running -= 1
                        self.record_outcome(stage, outcome)
                    self.report_progress(whole, launcher.slots)
            interrupted = False
        finally:
            launcher.close(kill=interrupted)
            progress.close()
        return self.outcome

    def report_progress(self, task: progress.ProgressTask, jobs: int) -> None:
        """Show the share of the study's FLOPs that is done and the time that the rest takes; a few times a minute.

        Args:
            jobs: processes at once.
        """
        if time.time() - self.reported < _REPORT_SECONDS:
            return
        self.reported = time.time()
        state = study_progress(self.stages, self.store, self.done, jobs, self.started)
        task.set(state.share, str(state), state.seconds_left)

    @property
    def stopping(self) -> bool:
        """Whether no more stages may start."""
        return bool(self.outcome.stopped) or (bool(self.outcome.failed) and not self.keep_going)

    def _start_if_ready(self, stage: Stage, launcher: Launcher) -> bool:
        """Start a waiting stage if its inputs and the launcher allow; drop it if it is done or cannot be run."""
        fingerprint = stage.fingerprint
        inputs = {used.fingerprint for used in stage.inputs.values()}
        if inputs & self.unavailable:
            self.drop(stage, self.outcome.skipped)
        elif self.stopping:
            self.drop(stage, self.outcome.not_started)
        elif inputs <= self.done and launcher.room(stage):
            lease = self.store.leases.state(key_of(stage))
            if not lease.free:
                if fingerprint not in self.elsewhere:
                    progress.notify(f"{stage.kind} {stage.name}: another process is running it; this one waits")
                    self.elsewhere.add(fingerprint)
            elif fingerprint not in self.damaged and self.store.done(stage):
                del self.waiting[fingerprint]
                self.done.add(fingerprint)
                self.outcome.elsewhere += 1
            else:
                del self.waiting[fingerprint]
                self.elsewhere.discard(fingerprint)
                launcher.start(stage, lease.number)
                return True
        return False

    def drop(self, stage: Stage, names: list[str]) -> None:
        """Give up a waiting stage and add its name to ``names``."""
        del self.waiting[stage.fingerprint]
        self.unavailable.add(stage.fingerprint)
        names.append(stage.name)

    def _announce(self, stage: Stage, running: int) -> None:
        progress.notify(f"[{len(self.done) + running}/{len(self.stages)}] {stage.kind} {stage.name}")

    def record_outcome(self, stage: Stage, outcome: StageOutcome) -> None:
        """Record how a stage ended."""
        if outcome.state == "elsewhere":  # another process acquired the lease first
            self.waiting[stage.fingerprint] = stage
            return
        self.outcome.ran += 1
        if outcome.state == "done":
            self.done.add(stage.fingerprint)
            return
        self.unavailable.add(stage.fingerprint)
        if outcome.state == "stopped":
            self.outcome.stopped = self.outcome.stopped or outcome.text
            return
        self.outcome.failed[stage.name] = outcome.text
        progress.notify(f"FAILED {stage.kind} {stage.name}: {outcome.text}")
