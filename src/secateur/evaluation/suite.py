"""What to measure: a suite of held-out losses, perplexities, tasks and costs, and the figures of one model."""

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

#: the eight zero-shot tasks of arXiv:2606.14150, in its order
ZERO_SHOT = ("winogrande", "arc_challenge", "arc_easy", "hellaswag", "piqa", "sciq", "boolq", "openbookqa")
assert set(ZERO_SHOT) == set(METRICS)

SUITES = ("paper", "perplexity", "zero-shot", "cost")


@dataclass(frozen=True)
class Suite:
    """What to measure."""

    loss: bool  #: the held-out loss, on text that is named apart
    texts: tuple[Text, ...] = ()  #: perplexities
    tasks: tuple[str, ...] = ()  #: names of lm-eval: single tasks, groups, tags, patterns
    cost: bool = False  #: what the model costs to run

    def task_list(self, where: str = "--") -> TaskList:
        """The single tasks that the names stand for.

        Raises:
            UserError: as :func:`secateur.evaluation.lm_eval.groups.expand`.
        """
        return expand(self.tasks, where=f"{where}suite")

    @classmethod
    def parse(cls, text: str, protocol: str = "heldout", *, where: str = "--") -> Suite:
        """Read a list of suites and lm-eval tasks, joined by commas; ``paper`` is loss, perplexity and zero-shot.

        Args:
            text: e.g. ``paper``, ``perplexity,cost`` or ``arc_easy,mmlu``.
            protocol: of the perplexities.
            where: what errors put before ``suite`` and ``protocol``, which is where they were asked for.

        Raises:
            UserError: for an empty or repeated name, or an unknown protocol.
        """
        names = [name.strip() for name in text.split(",")]
        if "" in names or len(set(names)) < len(names):
            raise UserError(
                f"{where}suite {text}: has an empty or repeated name; name {', '.join(SUITES)} or lm-eval tasks"
            )
        for name in names:
            if name not in SUITES and difflib.get_close_matches(name, SUITES, cutoff=0.8):
                raise UserError(f"{where}suite {name}: is not known{did_you_mean(name, SUITES)}")
        if protocol not in PROTOCOLS:
            raise UserError(f"{where}protocol {protocol}: is not known{did_you_mean(protocol, PROTOCOLS)}")
        paper = "paper" in names
        tasks = [*(ZERO_SHOT if paper or "zero-shot" in names else ()), *(n for n in names if n not in SUITES)]
        texts = PROTOCOLS[protocol] if paper or "perplexity" in names else ()
        return cls(paper, texts, tuple(dict.fromkeys(tasks)), "cost" in names)


def text_protocols(
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    *,
    data: str | None = None,
    windows: int | None = None,
    seqlen: int | None = None,
    stride: int | None = None,
) -> dict[str, Protocol]:
    """The windows of each text in a checkpoint's own tokens, by name; None stands for the protocol's own.

    Raises:
        UserError: if the checkpoint has no tokenizer that fits it, or a text cannot be had.
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
    """Losses under protocols and figures of tasks, one after the other; all processes together.

    Args:
        checkpoint: with the tokenizer.
        model: of the checkpoint, in evaluation mode, on its device.
        protocols: by the names that their measurements get.
        tasks: single ones.
        batch: windows, or rows of requests, at once; None for what suits the device.
        done: names of what is there already.
        of: what the model is called while it is measured.

    Raises:
        UserError: if a task cannot be had, the tokenizer does not serve, or the model puts out NaN or infinity.
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
