"""Push a checkpoint of a study to the Hugging Face Hub: weights, model card with the study's results, page, ledger.

The page is without prompts and without answers to forbidden ones, unless the full one is asked for; rows are not
pushed. Local paths are shortened to their last part.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shlex
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError, first_line
from leeway.io import write_file, write_json
from leeway.report import formatting, narrative
from leeway.report.exports.model_card import CARD, HUB_ID, base_name, measured_rates, model_card, run_bibliography
from leeway.report.rebuild import page_alone
from leeway.report.results import Results
from leeway.training.checkpoints import OPTIMISER, verified_ledger
from leeway.yaml_config import dump, nearest, tokens
from leeway.yaml_config import load as load_yaml

WEIGHTS_AND_TOKENIZER = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # what training writes
CONFIGS = ("adapter_config.json", "config.json", "tokenizer_config.json")
BASE_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")  # in CONFIGS


def push(
    folder: str | Path,
    repo: str | None,
    objective: str | None = None,
    budget: str | int | None = None,
    seed: int | None = None,
    *,
    public: bool = False,
    full_page: bool = False,
    dry_run: Path | None = None,
) -> str:
    """Push one checkpoint of a run and return its URL; with `dry_run` write that folder instead and return its path.

    The repository is created private unless `public`. `full_page`: the page with all prompts and answers. The token is
    the one of huggingface_hub (`HF_TOKEN`, or a login).
    Raises LeewayError for an unknown checkpoint, a public repository without `public`, no token, or a refusal.
    """
    if repo is None and dry_run is None:
        raise LeewayError("push: no repository", fix="give owner/name, or --dry-run FOLDER")
    results = Results.load(folder)
    line = choose_checkpoint(results, objective, budget, seed)
    if repo is not None and not HUB_ID.fullmatch(repo):
        raise LeewayError(f"{repo}: not the name of a repository", fix="give owner/name")
    if dry_run is not None:
        if dry_run.exists() and (not dry_run.is_dir() or any(dry_run.iterdir())):
            raise LeewayError(f"{dry_run} is not an empty folder", fix="give a new one")
        return str(stage(results, line, dry_run, full_page=full_page).resolve())
    with tempfile.TemporaryDirectory(prefix="leeway-push-") as scratch:
        staged = stage(results, line, Path(scratch), full_page=full_page)
        return _upload(staged, str(repo), public=public, line=line)


def choose_checkpoint(
    results: Results, objective: str | None = None, budget: str | int | None = None, seed: int | None = None
) -> dict[str, Any]:
    """Return the ledger line of a checkpoint: by default the only objective, its largest budget, the first seed."""
    if narrative.external(results.manifest) or results.ledger.empty:
        raise LeewayError(f"{results.folder}: no checkpoint was trained here", fix="push the model where it is")
    lines = formatting.to_records(results.ledger)
    known = sorted({str(line["objective"]) for line in lines})
    if objective is None and len(known) > 1:
        raise LeewayError(f"{results.folder} has several objectives", fix=f"give --objective: {', '.join(known)}")
    lines = [line for line in lines if line["objective"] == (objective or known[0])]
    if not lines:
        what = f"--objective {objective}: {results.folder} has no such objective{nearest(str(objective), known)}"
        raise LeewayError(what, fix=f"one of: {', '.join(known)}")
    for key, wanted, default in (("budget", tokens(budget), max), ("seed", seed, min)):
        found = sorted({int(line[key]) for line in lines})
        if wanted is not None and wanted not in found:
            given = budget if key == "budget" else seed
            what = f"--{key} {given}: {results.folder} has no such checkpoint"
            raise LeewayError(what, fix=f"one of: {', '.join(map(str, found))}")
        lines = [line for line in lines if line[key] == (default(found) if wanted is None else wanted)]
    return lines[0]


def stage(results: Results, line: dict[str, Any], out: Path, *, full_page: bool = False) -> Path:
    """Write what is pushed into `out` and return it. Raises LeewayError if the checkpoint was changed or is gone."""
    source = results.folder / "checkpoints" / line["objective"] / f"s{line['seed']}" / str(line["budget"])
    if not source.is_dir():
        raise LeewayError(f"{source} is not there", fix="run the study again: it trains what is missing")
    verified_ledger(source)
    for path in _files(source):
        if path.name in CONFIGS:
            config = json.loads(path.read_text("utf-8"))
            write_json(out / path.name, {k: base_name(results) if k in BASE_KEYS else v for k, v in config.items()})
        else:
            write_file(out / path.name, path.read_bytes())
    made = {"rates": results.rates(), "contrasts": results.contrasts()}
    measured, description = measured_rates(results, made), narrative.study_description(results)
    own_tokenizer = (source / "tokenizer.json").is_file()
    card = model_card(results, measured, description, line, own_tokenizer, whole_study=True)
    write_file(out / CARD, card)
    for name, table in made.items():
        write_file(out / "study" / f"{name}.csv", formatting.to_csv(table))
    write_file(out / "study" / "study.yaml", _study_text(results))
    write_file(out / "study" / "report.html", page_alone(_portable(results), no_prompts=True, full=full_page))
    write_file(out / "study" / "ledger.parquet", (results.folder / "ledger.parquet").read_bytes())
    write_file(out / "citation.bib", run_bibliography(results))
    return out


def _files(source: Path) -> Sequence[Path]:
    """Return the files of a checkpoint without optimiser state, links and files that training did not write."""
    found = {path for pattern in WEIGHTS_AND_TOKENIZER for path in source.glob(pattern)}
    return sorted(p for p in found if p.name != OPTIMISER and p.is_file() and not p.is_symlink())


def _portable(results: Results) -> Results:
    """Return results whose manifest and study, which the page shows, hold no local path."""
    manifest = _shortened(results.manifest)
    with contextlib.suppress(ValueError):  # a command that no shell would read
        manifest["command"] = shlex.join(_shortened(shlex.split(str(manifest.get("command") or ""))))
    found = copy.copy(results)
    found.manifest, found.study = manifest, _shortened(results.study)
    return found


def _study_text(results: Results) -> str:
    """Return the study file; a local path in it means nothing elsewhere and is shortened, which a comment says."""
    text = (results.folder / "study.yaml").read_text("utf-8")
    study, comment = load_yaml(text), text.split("\n", 1)[0] if text.startswith("# ") else ""
    shortened = _shortened(study)
    if shortened == study:
        return text
    return f"{comment}\n# local paths are shortened to their last part\n".lstrip("\n") + dump(shortened)


def _shortened(value: Any) -> Any:
    """Return settings without local paths, and without a user name or password in an address."""
    if isinstance(value, dict):
        return {k: _shortened(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortened(v) for v in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and value.startswith(("/", "~", "./", "../")) and len(Path(value).parts) > 1:
        return Path(value).name
    return re.sub(r"://[^/\s@]+@", "://", value)


def _upload(staged: Path, repo: str, *, public: bool, line: dict[str, Any]) -> str:
    import httpx
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if get_token() is None:
        raise LeewayError(f"push {repo}: no token of the Hub", fix="set HF_TOKEN, or run `hf auth login`")
    api = HfApi(library_name="leeway", library_version=version("leeway"))
    budget = formatting.format_budget(line["budget"])
    message = f"Leeway: {line['objective']} at {budget} tokens, seed {line['seed']}"
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(url.repo_id).private:  # it existed
            raise LeewayError(f"{url.repo_id} is a public repository", fix="add --public, or give another")
        api.upload_folder(repo_id=url.repo_id, folder_path=staged, commit_message=message)
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        what = f"push {repo}: the Hub refused or did not answer ({first_line(error)[:200]})"
        raise LeewayError(what, fix="check the name, the token's write access and the network") from error
    return str(url)
