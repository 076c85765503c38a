"""TensorBoard: event files, one folder per trajectory, in `trackers/tensorboard` of the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leeway.integrations.trackers.tracker import STUDY, Point, Status, TrackedStudy


class TensorBoardTracker:
    """Setting: `dir`, the folder for the events. Training is drawn over optimiser steps, rates over tokens.

    TensorBoard has no files: the study's run has the study file as text, and says where the page is.
    """

    name = "tensorboard"
    settings = ("dir",)

    def __init__(self, dir: str | None = None) -> None:  # noqa: A002 - the setting's name
        self.dir = dir
        self._root = Path()
        self._writers: dict[str, Any] = {}

    def check(self) -> None:
        from torch.utils import tensorboard  # noqa: F401 - raises without the package

    def open(self, study: TrackedStudy) -> None:
        self._root = Path(self.dir).expanduser() / f"{study.name}-{study.id}" if self.dir else study.folder / self.name

    def log(self, run: str, points: Sequence[Point]) -> None:
        writer = self._writer(run)
        for point in points:
            for name, value in point.values.items():
                writer.add_scalar(name, value, point.step if point.tokens is None else point.tokens)
        writer.flush()

    def add_files(self, files: Sequence[Path]) -> None:
        writer = self._writer(STUDY)
        for path in files:
            text = path.read_text("utf-8") if path.suffix == ".yaml" else str(path.resolve())
            writer.add_text(
                path.name, "\n".join(f"    {line}" for line in text.splitlines())
            )  # as it is, not as Markdown
        writer.flush()

    def close(self, status: Status) -> None:  # noqa: ARG002
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _writer(self, run: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if run not in self._writers:
            self._writers[run] = SummaryWriter(str(self._root / run))
        return self._writers[run]


TRACKER = TensorBoardTracker
