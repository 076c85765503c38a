"""trackio: a local dashboard (`trackio show`), or a Hugging Face Space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leeway.integrations.trackers.tracker import STUDY, Point, Status, TrackedStudy


class TrackioTracker:
    """Settings: `project` (default: leeway), `space` (owner/name, created private; default: TRACKIO_SPACE_ID).

    Everything is drawn over optimiser steps. A rate's budget is the metric `tokens`.
    """

    name = "trackio"
    settings = ("project", "space")

    def __init__(self, project: str = "leeway", space: str | None = None) -> None:
        self.project, self.space = project, space
        self._study: TrackedStudy | None = None
        self._runs: dict[str, Any] = {}

    def check(self) -> None:
        import trackio  # noqa: F401

    def open(self, study: TrackedStudy) -> None:
        self._study = study

    def log(self, run: str, points: Sequence[Point]) -> None:
        target = self._run(run)
        for point in points:
            at = {} if point.tokens is None else {"tokens": point.tokens}
            target.log({**at, **point.values}, step=point.step)

    def add_files(self, files: Sequence[Path]) -> None:
        import trackio

        assert self._study
        artefact = trackio.Artifact(f"leeway-{self._study.id}", type="leeway-study")
        for path in files:
            artefact.add_file(str(path), name=path.name)
        self._run(STUDY).log_artifact(artefact)

    def close(self, status: Status) -> None:  # noqa: ARG002
        for run in self._runs.values():
            run.finish()
        self._runs = {}

    def _run(self, name: str) -> Any:
        """Return a trackio run; one that an earlier run of the study began is resumed by its name."""
        import trackio

        assert self._study
        if name not in self._runs:
            self._runs[name] = trackio.init(
                project=self.project,
                name=f"{name}-{self._study.id}",
                group=f"{self._study.name}-{self._study.id}",
                space_id=self.space,
                config={**self._study.config, "trajectory": name},
                resume="allow",
                private=True,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return self._runs[name]


TRACKER = TrackioTracker
