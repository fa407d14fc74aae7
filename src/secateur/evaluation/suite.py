"""Suites of held-out losses, perplexities, tasks and costs, and the measurements of a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from transformers import PreTrainedModel

from secateur.data.tokenizer import check_vocabulary, load_tokenizer
from secateur.errors import UserError, did_you_mean
from secateur.evaluation.lm_eval.accuracy import check_tasks, language_model, measure_task, report_truncation
from secateur.evaluation.lm_eval.groups import TaskList, expand
from secateur.evaluation.lm_eval.tasks import METRICS, Task
from secateur.evaluation.loss import Protocol, measure_loss, window_losses
from secateur.evaluation.protocols import PROTOCOLS, SEQLEN, WINDOWS, Text, text_protocol
from secateur.evaluation.results import Measurement
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.progress import track

__all__ = ["SUITES", "Suite", "measure", "text_protocols"]

#: the eight zero-shot tasks of arXiv:2606.14150, in the order of the paper
ZERO_SHOT = ("winogrande", "arc_challenge", "arc_easy", "hellaswag", "piqa", "sciq", "boolq", "openbookqa")
assert set(ZERO_SHOT) == set(METRICS)

SUITES = ("paper", "perplexity", "zero-shot", "cost")


@dataclass(frozen=True)
class Suite:
    """A selection of measurements."""

    loss: bool  #: whether to measure the held-out loss, on text that is named separately
    texts: tuple[Text, ...] = ()  #: for perplexities
    tasks: tuple[str, ...] = ()  #: names in lm-eval: single tasks, groups, tags, patterns
    cost: bool = False  #: whether to measure size, speed and memory

    def task_list(self, where: str = "") -> TaskList:
        """Look up the single tasks and groups that the names stand for.

        Raises:
            UserError: as :func:`secateur.evaluation.lm_eval.groups.expand`.
        """
        return expand(self.tasks, where=_field("suite", where))

    @classmethod
    def parse(cls, text: str, protocol: str = "heldout", *, where: str = "") -> Suite:
        """Parse a list of suites and lm-eval tasks, joined by commas; ``paper`` is loss, perplexity and zero-shot.

        Args:
            text: e.g. ``paper``, ``perplexity,cost`` or ``arc_easy,mmlu``.
            protocol: of the perplexities.
            where: put before the fields ``suite`` and ``protocol`` in errors, e.g. ``evaluation.``; empty for fields in
                backticks.

        Raises:
            UserError: for an empty or repeated name, or an unknown protocol.
        """
        field, names = _field("suite", where), [name.strip() for name in text.split(",")]
        if "" in names or len(set(names)) < len(names):
            raise UserError(f"{field} {text}: has an empty or repeated name; name {', '.join(SUITES)} or lm-eval tasks")
        for name in names:
            if name not in SUITES and difflib.get_close_matches(name, SUITES, cutoff=0.8):
                raise UserError(f"{field} {name}: is not known{did_you_mean(name, SUITES)}")
        if protocol not in PROTOCOLS:
            raise UserError(f"{_field('protocol', where)} {protocol}: is not known{did_you_mean(protocol, PROTOCOLS)}")
        paper = "paper" in names
        tasks = [*(ZERO_SHOT if paper or "zero-shot" in names else ()), *(n for n in names if n not in SUITES)]
        texts = PROTOCOLS[protocol] if paper or "perplexity" in names else ()
        return cls(paper, texts, tuple(dict.fromkeys(tasks)), "cost" in names)


def _field(name: str, where: str) -> str:
    return f"{where}{name}" if where else f"`{name}`"


def text_protocols(
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    *,
    data: str | None = None,
    windows: int | None = None,
    seqlen: int | None = None,
    stride: int | None = None,
) -> dict[str, Protocol]:
    """Cut each text into windows of a checkpoint's own tokens, by name; None is the default of the protocol.

    Raises:
        UserError: if the checkpoint has no tokenizer that fits it, or a text cannot be read.
    """
    if not texts:
        return {}
    tokenizer = load_tokenizer(checkpoint.directory)
    check_vocabulary(tokenizer, checkpoint.shape.vocabulary, str(checkpoint.directory))
    return {
        text.name: text_protocol(
            text,
            tokenizer,
            data=data,
            positions=max_positions(checkpoint.config),
            windows=windows or WINDOWS,
            seqlen=seqlen or SEQLEN,
            stride=stride,
        )
        for text in texts
    }


def measure(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    protocols: Mapping[str, Protocol],
    tasks: Sequence[Task],
    *,
    batch: int | None = None,
    done: Set[str] = frozenset(),
    of: str = "",
) -> Iterator[Measurement]:
    """Measure losses under protocols, then tasks; all processes together.

    Args:
        checkpoint: holds the tokenizer.
        model: of the checkpoint, in evaluation mode, on its device.
        protocols: by the name of the measurement.
        tasks: single tasks.
        batch: windows, or rows of requests, at once; None for what suits the device.
        done: names to leave out, because their measurements exist.
        of: name of the model in progress bars.

    Yields:
        Each measurement as soon as it is finished.

    Raises:
        UserError: if a task cannot be built, lm-eval cannot use the tokenizer, or the model's outputs are NaN or
            infinite.
    """
    label = f"evaluate {of} " if of else "evaluate "
    pending = [task for task in tasks if task.name not in done]
    check_tasks(checkpoint, pending)
    for name, protocol in protocols.items():
        if name not in done:
            with track(label + name, sum(part.numel() for part in protocol.windows)) as progress:
                losses = window_losses(model, protocol, batch=batch, advance=progress.advance)
            yield measure_loss(losses, name)
    harness_model = language_model(checkpoint, model, batch) if pending else None
    for task in pending:
        assert harness_model is not None
        with track(label + task.name, len(task.requests.instances)) as progress:
            measurement = measure_task(harness_model, task, advance=progress.advance)
        report_truncation(harness_model, task)
        yield measurement
