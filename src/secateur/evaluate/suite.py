"""What to measure: a suite of held-out losses, perplexities, tasks and costs, and the figures of one model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from secateur.checkpoint import Checkpoint
from secateur.errors import UserError, did_you_mean
from secateur.evaluate.accuracy import language_model, measure_task
from secateur.evaluate.loss import Protocol, measure_loss, window_losses
from secateur.evaluate.protocols import PROTOCOLS, Text
from secateur.evaluate.results import Measurement
from secateur.evaluate.tasks import METRICS, Task
from secateur.progress import task as shown

__all__ = ["LOSS", "SUITES", "Suite", "measure"]

LOSS = "loss"  #: the measurement on --data

#: the eight zero-shot tasks of arXiv:2606.14150, in its order
ZERO_SHOT = ("winogrande", "arc_challenge", "arc_easy", "hellaswag", "piqa", "sciq", "boolq", "openbookqa")
assert set(ZERO_SHOT) == set(METRICS)

SUITES = ("paper", "perplexity", "zero-shot", "cost")


@dataclass(frozen=True)
class Suite:
    """What to measure."""

    loss: bool  #: the held-out loss, on text that is named apart
    texts: tuple[Text, ...] = ()  #: perplexities
    tasks: tuple[str, ...] = ()  #: accuracies
    cost: bool = False  #: what the model costs to run

    @classmethod
    def parse(cls, text: str, protocol: str = "heldout") -> Suite:
        """Read a list of suites and lm-eval tasks, joined by commas; ``paper`` is loss, perplexity and zero-shot.

        Args:
            text: e.g. ``paper``, ``perplexity,cost`` or ``arc_easy,mmlu_anatomy``.
            protocol: of the perplexities.

        Raises:
            UserError: for an empty or repeated name, or an unknown protocol.
        """
        names = [name.strip() for name in text.split(",")]
        if "" in names or len(set(names)) < len(names):
            raise UserError(f"--suite {text}: has an empty or repeated name; name {', '.join(SUITES)} or lm-eval tasks")
        for name in names:
            if name not in SUITES and difflib.get_close_matches(name, SUITES, cutoff=0.8):
                raise UserError(f"--suite {name}: is not known{did_you_mean(name, SUITES)}")
        if protocol not in PROTOCOLS:
            raise UserError(f"--protocol {protocol}: is not known{did_you_mean(protocol, PROTOCOLS)}")
        paper = "paper" in names
        tasks = [*(ZERO_SHOT if paper or "zero-shot" in names else ()), *(n for n in names if n not in SUITES)]
        texts = PROTOCOLS[protocol] if paper or "perplexity" in names else ()
        return cls(paper, texts, tuple(dict.fromkeys(tasks)), "cost" in names)


def measure(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    protocols: Mapping[str, Protocol],
    tasks: Sequence[Task],
    *,
    batch: int | None = None,
) -> list[Measurement]:
    """Losses under protocols and accuracies on tasks; all processes together.

    Args:
        checkpoint: with the tokenizer.
        model: of the checkpoint, in evaluation mode, on its device.
        protocols: by the names that their measurements get.
        tasks: zero-shot.
        batch: windows, or rows of requests, at once; None for what suits the device.

    Raises:
        UserError: if a task cannot be had, the tokenizer does not serve, or the model puts out NaN or infinity.
    """
    found = []
    for name, protocol in protocols.items():
        with shown(f"evaluate {name}", sum(part.numel() for part in protocol.windows)) as progress:
            losses = window_losses(model, protocol, batch=batch, advance=progress.advance)
        found.append(measure_loss(losses, name))
    asked = language_model(checkpoint, model, batch) if tasks else None
    for task in tasks:
        assert asked is not None
        with shown(f"evaluate {task.name}", len(task.requests.harness.instances)) as progress:
            found.append(measure_task(asked, task, checkpoint.directory, advance=progress.advance))
    return found
