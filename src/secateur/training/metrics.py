"""What a run tells of each step: ``metrics.jsonl``, and TensorBoard or W&B where asked."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from secateur.errors import UserError

__all__ = ["TRACKERS", "Metrics", "Tracker", "check_trackers", "open_trackers"]


class Tracker(Protocol):
    """Somewhere else to send numbers to."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """A file with a line of JSON for each step, each held-out loss and each event.

    Args:
        path: of the file; None to write none.
        trackers: are sent the numbers as well.
    """

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self.path, self.trackers = path, trackers

    def resume(self, step: int) -> None:
        """Drop what was written of steps after ``step``: they are run again."""
        if self.path is None or not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if entry["step"] <= step:
                kept.append(line + "\n")
        partial = self.path.with_name(f"{self.path.name}.new")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line; ``step`` is among its values."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        values = {key: float(v) for key, v in entry.items() if key != "step" and isinstance(v, int | float)}
        for tracker in self.trackers:
            tracker.log(entry["step"], values)

    def close(self) -> None:
        """Send what trackers still hold."""
        for tracker in self.trackers:
            tracker.close()


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of these trackers are installed.

    Raises:
        UserError: if one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name}: the package is missing; pip install {name}")


def open_trackers(names: Sequence[str], folder: Path, title: str, identity: str) -> list[Tracker]:
    """The trackers of these names; their files lie below ``folder``, and a run is the same one by its ``identity``."""
    return [TRACKERS[name](folder / name, title, identity) for name in names]


class _TensorBoard:
    def __init__(self, folder: Path, title: str, identity: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, title: str, identity: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        # A run that goes on after a kill is the same run there.
        self._run = wandb.init(project="secateur", name=title, id=identity, dir=str(folder.parent), resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": _TensorBoard, "wandb": _WandB}  #: name -> what opens it
