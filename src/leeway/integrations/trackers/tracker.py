"""The protocol of a tracker, the trackers that Leeway has, and the options that choose them (`--track`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from leeway.errors import LeewayError
from leeway.plugins import NAME, entry_points_of, load_entry_point
from leeway.yaml_config import nearest

GROUP = "leeway.trackers"
BUILT_IN = {"wandb": "wandb", "mlflow": "mlflow", "tensorboard": "tensorboard", "trackio": "trackio"}  # name: package
ATTRIBUTES = ("name", "settings", "check", "open", "log", "add_files", "close")
TRACK = "--track"
PAGES = ("redacted", "full")  # of the setting `page`, which every tracker has; the first is the default
REDACTED_PAGE = "trackers/report.html"  # in the run directory
Status = Literal["finished", "stopped"]
TrackOptions = Sequence[str | Mapping[str, Mapping[str, Any] | None]]


@dataclass(frozen=True)
class Point:
    """Values at one optimiser step; `tokens` is the budget of a checkpoint (0 for the base), None in training."""

    step: int
    values: dict[str, float]
    tokens: int | None = None


@dataclass(frozen=True)
class TrackedStudy:
    """What a tracker knows of a run. `memory` is kept between runs into the same folder, to continue what is there."""

    name: str
    id: str  # of this run directory
    folder: Path  # for files of trackers that write files
    config: dict[str, Any]  # the study file
    memory: dict[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Receives a run. Any exception is counted, shown as one line, and the call is made again later.

    A study is one group of tracker runs: one per trajectory (`sft-s0`), one of the base model (`base`), and one of the
    study (`STUDY`), which gets the files. `settings` are the names that `--track NAME.SETTING=VALUE` may have; the
    class is called with those given (`page` belongs to all trackers and is not passed). Names of metrics hold only
    letters, digits and `_./:-`.
    """

    name: str
    settings: tuple[str, ...]

    def check(self) -> None:
        """Raise LeewayError for user errors such as a missing key. Called before training."""

    def open(self, study: TrackedStudy) -> None:
        """Connect; called again after a failure."""

    def log(self, run: str, points: Sequence[Point]) -> None:
        """Add points to a tracker run, which is created at its first point."""

    def add_files(self, files: Sequence[Path]) -> None:
        """Attach files to the study: the page, the tables of rates and ledger, the study file."""

    def close(self, status: Status) -> None:
        """End all tracker runs, and wait until everything is sent."""


STUDY = "study"  # the tracker run that gets the files


@dataclass(frozen=True)
class TrackerConfig:
    """A tracker to use, with its settings; `full_page`: send the page with forbidden prompts and answers."""

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    full_page: bool = False

    def load(self) -> Tracker:
        """Return the tracker; raise LeewayError for an unknown setting, or a package that cannot be imported."""
        if self.name in BUILT_IN:
            made = import_module(f"leeway.integrations.trackers.{self.name}").TRACKER
        else:
            made = load_entry_point(_installed()[self.name], "tracker", ATTRIBUTES)
        for key in self.settings:
            if key not in made.settings:
                what = f"{TRACK} {self.name}.{key}: no such setting{nearest(key, made.settings)}"
                raise LeewayError(what, fix=f"it has {', '.join((*made.settings, 'page'))}")
        tracker: Tracker = made(**self.settings)
        return tracker


def _installed() -> dict[str, EntryPoint]:
    return entry_points_of(GROUP, "tracker", BUILT_IN)


def parse_track(track: TrackOptions) -> list[TrackerConfig]:
    """Return trackers from `wandb`, `mlflow.uri=http://…` or `{"mlflow": {"uri": …}}`, checked as far as is quick.

    Raises LeewayError for an unknown name or setting, a missing package, or credentials in a URL.
    """
    chosen: dict[str, dict[str, str]] = {}
    for entry in track:
        for name, settings in _entries(entry):
            own = chosen.setdefault(name, {})
            if repeated := next((k for k in settings if k in own), None):
                raise LeewayError(f"{TRACK} {name}.{repeated} is given twice", fix="give it once")
            own.update(settings)
    configs = [TrackerConfig(name, own, _full_page(name, own.pop("page", PAGES[0]))) for name, own in chosen.items()]
    for config in configs:
        _check(config)
    return configs


def _entries(entry: str | Mapping[str, Mapping[str, Any] | None]) -> Iterable[tuple[str, dict[str, str]]]:
    if not isinstance(entry, str):
        return [(str(name), {str(k): str(v) for k, v in (own or {}).items()}) for name, own in entry.items()]
    name, dot, setting = entry.partition(".")
    key, equals, value = setting.partition("=")
    if dot and not (key and equals):
        raise LeewayError(f"{TRACK} {entry}: no value", fix=f"write {TRACK} {name}.{key or 'setting'}=value")
    return [(name, {key: value} if dot else {})]


def _full_page(name: str, page: str) -> bool:
    if page not in PAGES:
        what = f"{TRACK} {name}.page={page}: no such page{nearest(page, PAGES)}"
        raise LeewayError(what, fix="redacted (without forbidden prompts and the answers to them) or full")
    return page == "full"


def _check(config: TrackerConfig) -> None:
    if config.name not in BUILT_IN:
        installed = _installed()
        if config.name not in installed:
            near = nearest(config.name, [*BUILT_IN, *installed])
            what = f"{TRACK} {config.name}: no such tracker{near}"
            raise LeewayError(what, fix=f"one of: {', '.join([*BUILT_IN, *installed])}")
        assert re.fullmatch(NAME, config.name)
    elif find_spec(BUILT_IN[config.name]) is None:
        what = f"{TRACK} {config.name}: {BUILT_IN[config.name]} is not installed"
        raise LeewayError(what, fix=f"pip install 'leeway[{config.name}]'")
    else:
        config.load()
    for key, value in config.settings.items():
        if re.search(r"://[^/\s]*@", value):
            what = f"{TRACK} {config.name}.{key}: the address holds a password or user name"
            raise LeewayError(what, fix="leave it out, and set the environment variable that the tracker reads")


def without_trackers(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments without `--track`, for the manifest: it changes no result, and may be private."""
    kept, skip = list[str](), False
    for argument in arguments:
        if not skip and argument != TRACK and not argument.startswith(f"{TRACK}="):
            kept.append(argument)
        skip = not skip and argument == TRACK
    return kept
