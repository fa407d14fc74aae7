"""A study for Python users: plan it, run it, inspect it, report it. The command line is a thin layer over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import REQUEUE, RunError, UserError, did_you_mean, refuse_unknown, spell
from secateur.files import refuse_file
from secateur.formatting import plural
from secateur.model.quantisation import require_quantiser
from secateur.progress import notify
from secateur.study.cluster import ClusterRequest, ClusterSchedule, simulate
from secateur.study.declarations import count_finished, read_declarations, record_question
from secateur.study.explain import Explanation, explain_stage
from secateur.study.grid import left_out
from secateur.study.pace import measure_pace
from secateur.study.parents import check_positions, check_tokenizers, clip_sequence
from secateur.study.plan import FLOPS_PER_SECOND, StudyPlan, plan_study, shared_controls, step_warnings
from secateur.study.planner import stages_of
from secateur.study.question import count_together, resolve_question
from secateur.study.resolve import resolve
from secateur.study.runner.scheduler import StudyOutcome, run_stages, survey
from secateur.study.shipped import find_study
from secateur.study.spec import StudySpec, load_study, sets_sequence
from secateur.study.stage import VERSIONS, Stage, unique, with_inputs
from secateur.study.status import StudyStatus, study_status
from secateur.study.store import Store

if TYPE_CHECKING:
    from secateur.comparison.records import StudyQuestion, StudyResults
    from secateur.report.judgement import Judgement
    from secateur.study.power import StudyPower
    from secateur.study.runner.slurm import Slurm

__all__ = ["RunPreview", "Study"]

_LISTING = "`study status`"  # the command that lists all stages


@dataclass(frozen=True)
class RunPreview:
    """What a run would do: ``stages`` are those that it would run, each with the reason."""

    study: str
    out: Path
    already_done: int
    stages: tuple[Explanation, ...]

    def as_dict(self) -> dict[str, Any]:
        """The preview as plain values, as ``--json`` prints it."""
        rows = [{"kind": s.kind, "name": s.name, "state": s.state, "reason": s.reason} for s in self.stages]
        return {"study": self.study, "out": str(self.out), "already_done": self.already_done, "would_run": rows}

    def __str__(self) -> str:
        head = f"{self.study} in {self.out}: {plural(self.already_done, 'stage')} done, {len(self.stages)} to run"
        return "\n".join([head, *(f"{s.kind:8}  {s.name}  {s.reason}" for s in self.stages)])


@dataclass(frozen=True)
class Study:
    """A study file, its stages and the folder that holds their results.

    Example:
        >>> study = Study.load("demo")
        >>> print(study.plan())
        >>> study.run()
        >>> study.report()

    Attributes:
        file: the study file.
        spec: its content.
        stages: all stages, each after its inputs; cells that share a stage list it once each.
        store: the results on disk.
        question: the question that the file declares, with the comparisons that decide it; None if it declares none.
        notes: values that differ from the file's defaults.
    """

    file: Path
    spec: StudySpec
    stages: list[Stage]
    store: Store
    question: StudyQuestion | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, name_or_path: str | Path, out: str | Path | None = None) -> Study:
        """Read a study file and plan its stages. Nothing is run or written.

        Args:
            name_or_path: a study file, or the name of a shipped study such as ``demo``.
            out: folder of the stages; ``runs/NAME`` unless given.

        Raises:
            UserError: if the file is missing or invalid, the study cannot be planned, or ``out`` is a file.
        """
        file = find_study(name_or_path)
        spec = load_study(file)
        folder = Path(out or f"runs/{spec.name}")
        refuse_file(folder)
        note = None
        try:
            resolved = resolve(spec)
            if not sets_sequence(file):
                spec, note = clip_sequence(spec, resolved.parents)
            check_positions(spec, resolved.parents)
            stages = stages_of(spec, resolved)
            omissions = left_out(spec, {name: parent.shape for name, parent in resolved.parents.items()})
            question = resolve_question(spec.question, stages) if spec.question else None
        except UserError as error:
            raise UserError(f"{file}: {spell(str(error), str)}") from None
        return cls(file, spec, stages, Store(folder), question, (*([note] if note else []), *omissions))

    @property
    def out(self) -> Path:
        """The folder of stages, logs and the report."""
        return self.store.out

    def plan(self, flops_per_second: float = FLOPS_PER_SECOND) -> StudyPlan:
        """Sum up what the study runs and costs, with the speed of its training stages that are finished.

        Raises:
            UserError: if the corpus has the ids of another tokenizer than a local checkpoint.
        """
        self._check_tokenizers()
        stages = unique(self.stages)
        pace = measure_pace(stages, self.store, {stage.fingerprint for stage in stages if self.store.done(stage)})
        return plan_study(self.spec.name, self.stages, flops_per_second, pace if pace.speed else None, self.notes)

    def simulate(self, **fields: Any) -> ClusterSchedule:
        """Simulate the run of the whole study on a cluster.

        Args:
            fields: fields of :class:`~secateur.study.cluster.ClusterRequest`: ``cluster``, ``mfu``, ``price``.

        Raises:
            UserError: if a field is out of range, or a stage needs more devices than the cluster has.
        """
        return simulate(self.spec.name, self.stages, ClusterRequest(**fields))

    def power(self, **fields: Any) -> StudyPower:
        """Compute how many seeds and held-out documents tell a difference, and what the seeds cost.

        Args:
            fields: fields of :class:`~secateur.study.power.PowerRequest`: ``pilot``, or ``seed_sd`` and
                ``document_sd``; ``margin``, ``power``, and others.

        Raises:
            UserError: if a field is out of range, the spread is not known, or 100 seeds are too few with any text.
        """
        from secateur.study.power import PowerRequest, plan_power

        refuse_unknown(fields, [field.name for field in dataclasses.fields(PowerRequest)])
        together = count_together(self.question, self.stages)
        return plan_power(self.spec, resolve(self.spec), self.question, together, PowerRequest(**fields))

    def run(
        self,
        jobs: int | None = None,
        device: str | None = None,
        only: Iterable[str] = (),
        keep_going: bool = False,
        slurm: Slurm | None = None,
    ) -> StudyOutcome:
        """Run the stages that are not done. A run that was interrupted resumes. The question is recorded first.

        Args:
            jobs: stages at once; None for one for each core, or GPU.
            device: ``auto``, ``cpu`` or ``cuda``; the study's ``compute.device`` unless given.
            only: patterns of stage names, as ``wanda-*/P-R``; their inputs are run too. Empty for all stages.
            keep_going: after a failure, run every stage that does not depend on the failed one.
            slurm: submit jobs with these resources instead of running on this machine.

        Raises:
            UserError: if nothing matches a pattern, the machine lacks what a stage needs, or the corpus fails.
            RunError: if a signal stopped the run; the same call resumes it.
        """
        stages = self._select(only)
        if self.spec.evaluation.measurements.tasks:
            from secateur.evaluation.lm_eval.harness import import_harness

            import_harness("lm_eval")  # a missing package is reported now, not after hours of training
        for weights in self.spec.evaluation.weights:
            require_quantiser(weights)
        self._check_tokenizers()
        for note in (*self.notes, *shared_controls(self.stages), *step_warnings(stages)):
            notify(note)
        runs = sum(stage.kind in ("train", "reconstruct") for stage in stages)
        notify(f"{self.spec.name}: {plural(len(stages), 'stage')} ({plural(runs, 'training run')}) in {self.out}")
        record_question(self.store, self.question, self.stages)
        outcome = self._launch(stages, jobs, device or self.spec.compute.device, keep_going, slurm)
        for line in outcome.summary(self.out / "logs"):
            notify(line)
        if "corpus" in outcome.failed:
            raise UserError(f"{self.file}: corpus: {outcome.failed['corpus']}")
        if outcome.stopped:
            done = outcome.already_done + outcome.ran
            raise RunError(f"{outcome.stopped} ({done} of {plural(len(stages), 'stage')} done)", REQUEUE)
        return outcome

    def _launch(
        self, stages: list[Stage], jobs: int | None, device: str, keep_going: bool, slurm: Slurm | None
    ) -> StudyOutcome:
        if slurm:
            from secateur.study.runner.slurm import run_on_slurm

            return run_on_slurm(stages, self.out, self.file, options=slurm, device=device, keep_going=keep_going)
        from secateur.runtime import pick_device

        device = pick_device(device)
        return run_stages(stages, self.out, jobs=jobs, device=device, file=self.file, keep_going=keep_going)

    def preview(self, only: Iterable[str] = ()) -> RunPreview:
        """List the stages that :meth:`run` would run, with reasons. Nothing is run or written."""
        stages = self._select(only)
        finished = survey(stages, self.store)
        pending = tuple(
            explain_stage(stage, self.stages, self.store, finished.damaged.get(stage.fingerprint))
            for stage in stages
            if stage.fingerprint not in finished.done
        )
        return RunPreview(self.spec.name, self.out, len(finished.done), pending)

    def status(self) -> StudyStatus:
        """Look up the state of each stage."""
        return study_status(self.spec.name, self.stages, self.store)

    def explain(self, stage: str) -> list[Explanation]:
        """Say why a stage is done or not, and what differs from the most similar finished one.

        Args:
            stage: its name, its kind and name, or its fingerprint. A name may fit several kinds: each is explained.

        Raises:
            UserError: if the study has no such stage.
        """
        stages = unique(self.stages)
        matches = [s for s in stages if stage in (s.name, f"{s.kind} {s.name}", s.fingerprint)]
        if not matches:
            with_kind = stage.partition(" ")[0] in VERSIONS
            names = {f"{s.kind} {s.name}" if with_kind else s.name for s in stages}
            raise UserError(f"{stage}: no stage of {self.file}{did_you_mean(stage, names, _LISTING)}")
        damage = [self.store.damage(s) if self.store.done(s) else None for s in matches]
        return [explain_stage(s, self.stages, self.store, d) for s, d in zip(matches, damage, strict=True)]

    def results(self) -> StudyResults:
        """Collect the records of the finished stages; missing values are None.

        Raises:
            UserError: if not even the corpus is finished.
        """
        from secateur.study.collect import collect

        results = collect(self.spec, self.stages, self.store, self.file.read_text(encoding="utf-8"))
        return replace(
            results,
            question=self.question,
            declarations=read_declarations(self.store),
            stages_done=count_finished(self.store, self.stages),
        )

    def judgement(self) -> Judgement:
        """Compare the pruned models of the results with their from-scratch twins."""
        from secateur.report.judgement import judge

        return judge(self.results())

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report of the results and return the path of its page.

        Args:
            out: folder; the study's own unless given.

        Raises:
            UserError: if ``out`` is a file, or not even the corpus is finished.
        """
        from secateur.report.page import build_report

        folder = Path(out or self.out)
        refuse_file(folder)
        return build_report(self.judgement(), folder)

    def _check_tokenizers(self) -> None:
        try:
            check_tokenizers(self.spec)
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from None

    def _select(self, only: Iterable[str]) -> list[Stage]:
        """Stages whose names match one of the patterns, with their inputs; all without patterns."""
        stages, patterns = unique(self.stages), tuple(only)
        if not patterns:
            return stages
        names = {stage.name for stage in stages}
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"`only`: no stage matches {pattern!r}{did_you_mean(pattern.strip('*'), names, _LISTING)}"
                )
        return with_inputs(s for s in stages if any(fnmatchcase(s.name, pattern) for pattern in patterns))
