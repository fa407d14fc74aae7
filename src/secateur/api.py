"""The Python API: one function for each job, and ``Study``. The command line is an adapter over the same requests.

Every function takes keyword arguments that are the fields of a request dataclass (named in its docstring), which checks
itself and raises :class:`UserError` with the field at fault. A *model* is a checkpoint directory, a Hub name
(``org/name[@revision]``, also ``hf:org/name``), the result of an earlier call, or, for ``prune``, a live
``PreTrainedModel``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from secateur.errors import UserError, refuse_unknown

if TYPE_CHECKING:
    from secateur.comparison.items import Comparisons
    from secateur.data.job import Corpus
    from secateur.evaluation.results import EvaluationResults
    from secateur.forecast.request import RecommendRequest
    from secateur.pruning.mask import Masked
    from secateur.searching.job import SearchResult
    from secateur.training.job import Trained
    from secateur.training.teach import SavedLogits

__all__ = [
    "build_corpus",
    "compare",
    "evaluate",
    "inspect",
    "load_results",
    "mask",
    "prune",
    "recommend",
    "search",
    "shapes",
    "teach",
    "train",
]


T = TypeVar("T")


def prune(model: Any, out: Any = None, *, method: str, **fields: Any) -> Any:
    """Prune a model.

    Args:
        model: a checkpoint directory, a Hub name, or a ``PreTrainedModel``, which is read tensor by tensor and left
            unchanged.
        out: new directory to write; None to get the cut model in memory.
        method: a pruning method, e.g. ``"wanda"``; ``secateur prune --help`` lists them.
        fields: further fields of :class:`~secateur.pruning.request.PruneRequest`: ``ratio`` (one or several),
            ``shape``, ``pattern``, ``params``, ``memory`` or ``latency``; ``calibration`` (a source of text, ids
            [windows, positions], or texts); ``reconstruct`` (steps that tune each pruned block), ``iterations`` (steps
            of pruning), and others.

    Returns:
        With ``out``, a :class:`~secateur.pruning.job.Pruned` (a list of them for several ratios): ``path``, ``plan``,
        ``shape``, ``removed``. Without, the cut ``PreTrainedModel`` with attributes ``plan``, ``masks`` (parameter name
        -> bool tensor, True where kept) and ``report`` (plain values).

    Raises:
        UserError: on a field out of range, or a request that does not fit the model.
    """
    from secateur.pruning.request import PruneRequest

    request = _request(PruneRequest, model=model, out=out, method=method, **fields)
    from secateur.pruning.job import prune_directory, prune_model

    if out is None:
        return prune_model(request)
    results = prune_directory(request)
    return results if isinstance(request.ratio, tuple) else results[0] if results else None


def mask(model: Any, plan: Any, out: Any = None) -> Masked:
    """Set the pruned weights of a sparse model to zero again, after a merge of adapters or a foreign training run.

    Args:
        model: the checkpoint to mask: a directory, a Hub name, or an earlier result.
        plan: the pruned checkpoint whose masks apply, likewise.
        out: new directory to write; None for the name of ``model`` with ``-masked`` behind it.

    Returns:
        A :class:`~secateur.pruning.mask.Masked`: ``path``, ``zeroed`` (weights that were not zero), ``norm_share``.

    Raises:
        UserError: if the plan has no masks, or the model differs from the pruned one in names, sizes or family.
    """
    from secateur.pruning.mask import MaskRequest, mask_checkpoint

    return mask_checkpoint(MaskRequest(model=model, plan=plan, out=out))


def train(out: Any, *, init: Any, tokens: int | str, data: Any, **fields: Any) -> Trained:
    """Train a model on an exact number of tokens, from fresh weights or a checkpoint's.

    Args:
        out: new directory to write; an interrupted run there is resumed.
        init: ``"scratch"`` (with ``like``, a checkpoint or config.json of the shape), or a checkpoint.
        tokens: the budget: ``50_000_000``, ``"50M"`` ...
        data: ``"shards:DIR"``, or the result of :func:`build_corpus`.
        fields: further fields of :class:`~secateur.training.request.TrainRequest`: ``recipe`` (a ``Recipe``, a mapping
            or a YAML file), ``teacher`` (a checkpoint, or the result of :func:`teach`), ``device``, and others.

    Returns:
        A :class:`~secateur.training.job.Trained`: ``path``, ``curve``, ``heldout_loss`` (nats per token), ``flops``.

    Raises:
        UserError: on a field out of range, too little data, or models that do not fit together.
        RunError: if the run broke or was stopped; calling again resumes it.
    """
    from secateur.training.request import TrainRequest

    request = _request(TrainRequest, out=out, init=init, tokens=tokens, data=str(data), **fields)
    from secateur.training import job

    return job.train(request)


def teach(teacher: Any, data: Any, out: Any, **fields: Any) -> SavedLogits:
    """Save a teacher's likeliest next ids on a slice of tokens, so that students train on them without it.

    Args:
        teacher: a checkpoint directory, a Hub name, or an earlier result.
        data: ``"shards:DIR"``, the folder, or the result of :func:`build_corpus`.
        out: new directory to write; an interrupted run there is resumed.
        fields: further fields of :class:`~secateur.training.teach_request.TeachRequest`: ``tokens``, ``skip``,
            ``top_k``, ``sequence``, ``device``, and others.

    Returns:
        A :class:`~secateur.training.teach.SavedLogits`, which :func:`train` takes as ``teacher``.

    Raises:
        UserError: on a field out of range, too little data, or a teacher that does not fit the data.
    """
    from secateur.training.teach_request import TeachRequest

    request = _request(TeachRequest, teacher=teacher, data=data, out=out, **fields)
    from secateur.training import teach as job

    return job.teach(request)


def evaluate(models: Any, *, data: Any = None, **fields: Any) -> list[EvaluationResults]:
    """Measure held-out loss, perplexity, tasks and cost of one model or several, all in the same way.

    Args:
        models: a model, or a sequence of them.
        data: held-out text: a source, ``tokens:FILE.npy``, ``shards:DIR``, or the result of :func:`build_corpus`.
        fields: further fields of :class:`~secateur.evaluation.request.EvaluateRequest`: ``suite`` (names of suites,
            tasks and groups), ``tasks_data``, ``windows``, ``out``, ``names``, and others.

    Returns:
        The results of each model, in order.

    Raises:
        UserError: on a field out of range, or text, tasks or models that cannot be had.
    """
    from secateur.evaluation.request import EvaluateRequest

    several = isinstance(models, Sequence) and not isinstance(models, str)
    data = data if data is None else str(data)
    request = _request(EvaluateRequest, models=tuple(models) if several else (models,), data=data, **fields)
    from secateur.evaluation import job
    from secateur.progress import notify

    results, notes = job.evaluate(request)
    for note in notes:
        notify(f"note: {note}")
    return results


def compare(a: Any, b: Any, margin: float = 0.02) -> Comparisons:
    """Compare two evaluated models item by item.

    Args:
        a: results of one model from :func:`evaluate`, a results file, or a sequence of either, one for each seed.
        b: the same of the other model, seeds in the same order.
        margin: losses (nats per token) whose difference lies within it count as equal; 0: equality is never a verdict.

    Returns:
        One comparison for each figure that both have; ``verdict`` is that of the held-out loss.

    Raises:
        UserError: if figures were measured in different ways, or there are none in common.
    """
    from secateur.comparison.items import compare_results

    sides = load_results(a), load_results(b)
    comparisons = compare_results(*sides, margin)
    if not comparisons:
        names = ", ".join(result.model for side in sides for result in side)
        raise UserError(f"{names}: hold no measurement; evaluate them with `data` or a `suite`")
    return comparisons


def load_results(results: Any) -> list[EvaluationResults]:
    """Read results of :func:`evaluate`: objects or files, one or several."""
    from secateur.evaluation.results import EvaluationResults

    several = isinstance(results, Iterable) and not isinstance(results, str | EvaluationResults)
    return [
        entry if isinstance(entry, EvaluationResults) else EvaluationResults.load(Path(str(entry).strip()))
        for entry in (results if several else [results])
    ]


def build_corpus(source: str, out: Any, *, tokenizer: Any, **fields: Any) -> Corpus:
    """Encode text as token shards to train on: repeated documents left out, the rest shuffled, some held out.

    Args:
        source: ``text:PATH``, ``stdlib``, ``python``, ``hf:NAME[:config]``, or ids in ``arrow:DIR``,
            ``array_record:DIR``.
        out: new directory to write; an interrupted run there is resumed.
        tokenizer: a directory with a tokenizer, a checkpoint, or a Hub name.
        fields: further fields of :class:`~secateur.data.request.CorpusRequest`: ``holdout``, ``documents``, ...

    Returns:
        A :class:`~secateur.data.job.Corpus`: ``path``, ``tokens`` of each split, ``record``.

    Raises:
        UserError: if the source or the tokenizer cannot be read.
    """
    from secateur.data.request import CorpusRequest

    request = _request(CorpusRequest, source=source, out=out, tokenizer=tokenizer, **fields)
    from secateur.data import job

    return job.build(request)


def inspect(model: Any, *, context: int | None = None) -> Any:
    """Describe a checkpoint: shape, parameters, sparsity, damage, FLOPs and KV cache.

    Args:
        context: window that FLOPs per token are averaged over; None for 2048, or the model's limit if less.

    Returns:
        An :class:`~secateur.evaluation.inspection.Inspection`.

    Raises:
        UserError: if the checkpoint cannot be read.
    """
    from secateur.evaluation.inspection import InspectRequest, inspect_checkpoint

    return inspect_checkpoint(InspectRequest(model=model, context=context))


def shapes(model: Any, **fields: Any) -> Any:
    """Count parameters, FLOPs and KV cache of a model and of what it would be pruned to, from config.json alone.

    Args:
        model: a config.json, a directory that has one, or a Hub name.
        fields: fields of :class:`~secateur.pruning.preview.ShapesRequest`: ``ratio`` (one or several), ``of``,
            ``shape``, ``axes``, ``method``, ``context``.

    Returns:
        A :class:`~secateur.pruning.preview.Preview`: ``before`` and ``outputs``, descriptions as plain values.

    Raises:
        UserError: if there is no such configuration, or no legal shape near the target.
    """
    from secateur.pruning.preview import ShapesRequest, preview_shapes

    return preview_shapes(_request(ShapesRequest, model=model, **fields))


def search(model: Any, out: Any, *, budget: int | str, data: Any, **fields: Any) -> SearchResult:
    """Cut a model to several shapes at a goal, retrain them by successive halving, and rank the last few.

    Args:
        model: a checkpoint directory, a Hub name, or an earlier result.
        out: new directory to write; an interrupted search there is resumed.
        budget: tokens of all trainings together, at most: ``"200M"`` ...
        data: ``"shards:DIR"``, or the result of :func:`build_corpus`, with a held-out split.
        fields: further fields of :class:`~secateur.searching.request.SearchRequest`: ``params``, ``active_params`` or
            ``memory``; ``method``, ``calibration``, ``candidates``, ``finalists``, ``recipe``, ``teacher``, and others.

    Returns:
        A :class:`~secateur.searching.job.SearchResult`: ``path``, ``content`` (of ``search.json``). It stands for the
        checkpoint of the best finalist.

    Raises:
        UserError: on a field out of range, a goal that fewer than two shapes reach, or too small a budget.
        RunError: if a training broke or was stopped; calling again resumes it.
    """
    from secateur.searching.request import SearchRequest

    request = _request(SearchRequest, model=model, out=out, budget=budget, data=str(data), **fields)
    from secateur.searching import job

    return job.search(request)


def recommend(*, ratio: float, tokens: int | str, **fields: Any) -> Mapping[str, Any]:
    """Say which path pays at a budget, by published figures or by a study of your own.

    Args:
        ratio: share of the parent to remove.
        tokens: budget after pruning: ``"50B"`` ...
        fields: further fields of :class:`~secateur.forecast.request.RecommendRequest`: ``params`` or ``model``,
            ``method``, ``parent``, ``study``, and others.

    Returns:
        Plain values: ``question``, ``recommendation``, ``cases``, ``evidence``, ``findings``, ``costs``.

    Raises:
        UserError: if fields contradict each other, or no evidence bears on the question.
    """
    from secateur.forecast.request import RecommendRequest

    return run_recommendation(_request(RecommendRequest, ratio=ratio, tokens=tokens, **fields))


def run_recommendation(request: RecommendRequest) -> dict[str, Any]:
    """Answer a request, and write the pilot study where it names a file."""
    from secateur.forecast.recommend import recommend as answer_question
    from secateur.report.advice_prose import explain

    answer = answer_question(request)
    pilot = None
    if request.pilot is not None:
        from secateur.study.pilot import write_pilot

        like = None if request.like is None else Path(request.like)
        pilot = write_pilot(Path(request.pilot), answer.question, answer.cases, like)
    return {**explain(answer.record()), "pilot": pilot}


def _request(cls: type[T], **fields: Any) -> T:
    """Make a request, and refuse unknown fields with the nearest name."""
    refuse_unknown(fields, [field.name for field in dataclasses.fields(cls)])  # type: ignore[arg-type]
    return cls(**fields)
