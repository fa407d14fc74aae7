"""Metrics of each step: ``metrics.jsonl``, and optionally TensorBoard or W&B."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from secateur.errors import UserError
from secateur.runtime import install_command

__all__ = ["TRACKERS", "Metrics", "Tracker", "check_trackers", "open_trackers"]


class Tracker(Protocol):
    """A service that receives the numbers too."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """A file with a line of JSON for each step, each held-out loss and each event.

    Args:
        path: the file; None to write none.
    """

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self.path, self.trackers = path, trackers

    def resume(self, step: int) -> None:
        """Drop the lines of steps after ``step``, which run again."""
        if self.path is None or not self.path.is_file():
            return
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if entry["step"] <= step:
                lines.append(line + "\n")
        partial = self.path.with_name(f"{self.path.name}.new")
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line; ``entry`` has a ``step``."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        values = {key: float(v) for key, v in entry.items() if key != "step" and isinstance(v, int | float)}
        for tracker in self.trackers:
            tracker.log(entry["step"], values)

    def close(self) -> None:
        """Flush and close the trackers."""
        for tracker in self.trackers:
            tracker.close()


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of these trackers are installed.

    Raises:
        UserError: naming the first missing package.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"`track` {name}: the package is missing; {install_command(name)}")


def open_trackers(names: Sequence[str], folder: Path, title: str, identity: str) -> list[Tracker]:
    """Open trackers; files lie below ``folder``, and a resumed run keeps its ``identity``."""
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

        # A run that resumes after a kill continues the same W&B run.
        self._run = wandb.init(project="secateur", name=title, id=identity, dir=str(folder.parent), resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": _TensorBoard, "wandb": _WandB}  #: name -> class
