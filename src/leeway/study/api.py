"""A study from Python: load it, run it, read what came out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from leeway.report.results import Results
from leeway.study.parse import load
from leeway.study.progress import Reporter
from leeway.study.run import run
from leeway.study.spec import Spec


@dataclass(frozen=True)
class Study:
    """A checked study file."""

    spec: Spec

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Study:
        """From a file or a preset's name, with `key=value` overrides; raises LeewayError with all faults at once."""
        return cls(load(str(path), overrides))

    def run(
        self,
        out: str | Path,
        *,
        quiet: bool = False,
        workers: int | None = 1,
        executor: Literal["local", "ray"] = "local",
    ) -> Results:
        """Run into `out`, going on where one stopped; several workers or `processes` need a `__main__` guard.

        With `executor="ray"` workers are those of a Ray cluster; `workers=None` is as many as there is room for.
        """
        command = f"Study.load({self.spec.name!r}).run({str(out)!r})"
        run(self.spec, Path(out), Reporter(quiet=quiet), command, workers, executor)
        return Results.load(Path(out))
