"""Weights & Biases: one W&B run per trajectory in a group of the study; online or offline as W&B is set up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError
from leeway.integrations.trackers.tracker import STUDY, Point, Status, TrackedStudy

KEYLESS = ("offline", "disabled", "dryrun")


class WandbTracker:
    """Settings: `project` (default: leeway), `entity`, `mode` (online or offline; default: WANDB_MODE).

    Training is drawn over optimiser steps, rates over tokens. Offline runs are written to `trackers/wandb`, for
    `wandb sync`. The study's run holds the page and an artefact with the files.
    """

    name = "wandb"
    settings = ("project", "entity", "mode")

    def __init__(self, project: str = "leeway", entity: str | None = None, mode: str | None = None) -> None:
        self.project, self.entity = project, entity
        self.mode: Any = mode or os.environ.get("WANDB_MODE") or "online"
        self._runs: dict[str, Any] = {}
        self._metrics: set[tuple[str, str]] = set()
        self._study: TrackedStudy | None = None

    def check(self) -> None:
        import wandb

        if self.mode not in ("online", *KEYLESS):
            what = f"--track wandb.mode={self.mode}: no such mode"
            raise LeewayError(what, fix="online or offline")
        if self.mode not in KEYLESS and not wandb.login(prompt=False, verify=False):
            fix = "run `wandb login`, set WANDB_API_KEY, or add --track wandb.mode=offline"
            raise LeewayError("--track wandb: no API key of W&B", fix=fix)

    def open(self, study: TrackedStudy) -> None:
        self._study = study

    def log(self, run: str, points: Sequence[Point]) -> None:
        target = self._run(run)
        for point in points:
            axis, at = ("step", point.step) if point.tokens is None else ("tokens", point.tokens)
            for metric in point.values:
                if (run, metric) not in self._metrics:
                    self._metrics.add((run, metric))
                    target.define_metric(metric, step_metric=axis)
            target.log({axis: at, **point.values})

    def add_files(self, files: Sequence[Path]) -> None:
        import wandb

        assert self._study
        run = self._run(STUDY)
        artefact = wandb.Artifact(f"leeway-{self._study.id}", type="leeway-study")
        for path in files:
            artefact.add_file(str(path), name=path.name)
            if path.suffix == ".html":
                run.log({path.stem: wandb.Html(str(path), inject=False)})
        run.log_artifact(artefact)

    def close(self, status: Status) -> None:
        for run in self._runs.values():
            run.finish(exit_code=0 if status == "finished" else 1)
        self._runs = {}

    def _run(self, name: str) -> Any:
        """Return a W&B run; one that an earlier run of the study began is resumed by its id."""
        import wandb

        assert self._study
        if name not in self._runs:
            settings = wandb.Settings(
                root_dir=os.environ.get("WANDB_DIR") or str(self._study.folder),
                console="off",
                disable_git=True,
                disable_code=True,
                silent=True,
                x_disable_stats=name != STUDY,
            )
            self._runs[name] = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,
                id=f"{self._study.id}-{name}",
                name=name,
                group=f"{self._study.name}-{self._study.id}",
                job_type=STUDY if name == STUDY else "trajectory",
                config={**self._study.config, "trajectory": name},
                resume="allow",
                reinit="create_new",
                settings=settings,
            )
        return self._runs[name]


TRACKER = WandbTracker
