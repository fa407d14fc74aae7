"""Measure one model: losses under protocols, then tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING

from secateur.data.documents import OnBadRow
from secateur.data.tokenizer import check_ids, load_tokenizer
from secateur.evaluation.lm_eval.accuracy import check_tasks, language_model, measure_task, report_truncation
from secateur.evaluation.lm_eval.tasks import Task
from secateur.evaluation.loss import Protocol, measure_loss, window_losses
from secateur.evaluation.protocols import SEQLEN, WINDOWS, Text, text_protocol
from secateur.evaluation.results import Measurement
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["measure", "text_protocols"]


def text_protocols(
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    *,
    data: str | None = None,
    on_bad_row: OnBadRow | None = None,
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
    protocols = {
        text.name: text_protocol(
            text,
            tokenizer,
            data=data,
            on_bad_row=on_bad_row,
            positions=max_positions(checkpoint.config),
            windows=windows or WINDOWS,
            seqlen=seqlen or SEQLEN,
            stride=stride,
        )
        for text in texts
    }
    for protocol in protocols.values():
        for ids in protocol.windows:
            check_ids(ids.numpy(), checkpoint.shape.vocabulary, tokenizer, str(checkpoint.directory))
    return protocols


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
        model: of the checkpoint, in evaluation mode, on its device.
        protocols: by the name of the measurement.
        batch: windows, or rows of requests, at once; None for what suits the device.
        done: names to leave out, because their measurements exist.

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
