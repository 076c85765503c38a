"""MLflow: a parent run of the study with the files, and a nested run per trajectory; on a server or in a folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError
from leeway.integrations.trackers.tracker import STUDY, Point, Status, TrackedStudy

MAX_METRICS = 1000  # metrics per request
MAX_PARAMS, MAX_PARAM_LENGTH = 100, 500  # a longer value is in study.yaml, which is attached


class MlflowTracker:
    """Settings: `uri` (default: MLFLOW_TRACKING_URI, else the folder `trackers/mlruns`), `experiment` (leeway).

    Everything is drawn over optimiser steps. A rate's budget is the metric `tokens`.
    """

    name = "mlflow"
    settings = ("uri", "experiment")

    def __init__(self, uri: str | None = None, experiment: str = "leeway") -> None:
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.experiment = experiment
        self._client: Any = None
        self._study: TrackedStudy | None = None
        self._resumed: set[str] = set()

    def check(self) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder of files, without a database
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a failed call is made again at the next poll
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        try:
            MlflowClient(tracking_uri=self.uri or "file:.")
        except MlflowException as error:
            what = f"--track mlflow.uri={self.uri}: MLflow cannot use it ({str(error).splitlines()[0][:120]})"
            raise LeewayError(what, fix="give http://…, a folder as file:///…, or install mlflow in full") from error

    def open(self, study: TrackedStudy) -> None:
        from mlflow.tracking import MlflowClient

        uri = self.uri or (study.folder / "mlruns").resolve().as_uri()
        self._client, self._study = MlflowClient(tracking_uri=uri), study

    def log(self, run: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now, target = int(1000 * time.time()), self._run(run)
        metrics = [Metric(name, value, now, p.step) for p in points for name, value in _values(p).items()]
        for k in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(target, metrics=metrics[k : k + MAX_METRICS])

    def add_files(self, files: Sequence[Path]) -> None:
        run = self._run(STUDY)
        for path in files:
            self._client.log_artifact(run, str(path))

    def close(self, status: Status) -> None:
        for run in self._resumed:
            self._client.set_terminated(run, status="FINISHED" if status == "finished" else "KILLED")

    def _run(self, name: str) -> str:
        """Return the id of an MLflow run, created at first use and remembered for later runs of the study."""
        assert self._study
        memory = self._study.memory
        if name not in memory:
            found = self._client.get_experiment_by_name(self.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(self.experiment)
            tags = {"leeway.study": self._study.name, "leeway.run": self._study.id}
            if name != STUDY:
                tags["mlflow.parentRunId"] = self._run(STUDY)
            run_name = f"{self._study.name}-{self._study.id}" if name == STUDY else name
            memory[name] = self._client.create_run(experiment, tags=tags, run_name=run_name).info.run_id
            self._resumed.add(memory[name])
            if name == STUDY:
                self._log_params(memory[name])
        elif memory[name] not in self._resumed:
            self._client.update_run(memory[name], status="RUNNING")
            self._resumed.add(memory[name])
        return memory[name]

    def _log_params(self, run: str) -> None:
        from mlflow.entities import Param

        assert self._study
        params = [Param(key, text) for key, text in _flat(self._study.config) if len(text) <= MAX_PARAM_LENGTH]
        for k in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run, params=params[k : k + MAX_PARAMS])


def _values(point: Point) -> dict[str, float]:
    return point.values if point.tokens is None else {"tokens": float(point.tokens), **point.values}


def _flat(settings: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings as `optim.lr`, value; keys that MLflow would refuse are skipped, since study.yaml is attached."""
    for key, value in settings.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            yield from _flat(value, name)
        elif all(c.isalnum() or c in "_-. /" for c in name):
            yield name, value if isinstance(value, str) else json.dumps(value)


TRACKER = MlflowTracker
