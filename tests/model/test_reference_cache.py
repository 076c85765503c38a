"""The reference cache: computed once, the same bits for every user, whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_reference import EXAMPLES, new_tokens, trajectory
from test_stages import text
from test_study import carry, contents
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.data.stream import schedule
from leeway.errors import LeewayError
from leeway.model import reference
from leeway.model.reference import Needed, ReferenceCache, ReferenceStats, ReferenceStore, key
from leeway.objectives import dpo, ipo, kl, kto
from leeway.plan.plan import plan
from leeway.study.load import parse
from leeway.training.trajectory import Trajectory

pytestmark = pytest.mark.slow

SEQUENCES = [Sequence(tuple(range(k, k + 5 + k % 3)), 2 + k % 2) for k in range(40)]


def said(s: Sequence) -> ReferenceStats:
    """Numbers that can be told apart: the ids themselves."""
    ids_M = torch.tensor(s.ids[s.start :], dtype=torch.float32)
    return ReferenceStats(-ids_M, torch.stack([ids_M, ids_M / 8], 1).to(torch.bfloat16))


class CountingModel:
    """Computes them, and counts its calls."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause, self.computed, self.from_states = pause, 0, 0

    def stats(self, sequences: Seq[Sequence], needed: Needed) -> Iterator[tuple[Sequence, ReferenceStats]]:
        for s in sequences:
            self.computed += 1
            time.sleep(self.pause)
            found = said(s)
            yield s, ReferenceStats(found.logp_M if needed.logps else None, found.hidden_MD if needed.states else None)

    def logps(self, sequence: Sequence, hidden_MD: Tensor) -> Tensor:
        self.from_states += 1
        assert torch.equal(hidden_MD[:, 0], torch.tensor(sequence.ids[sequence.start :]).to(hidden_MD.dtype))
        return -hidden_MD[:, 0].float()


STATES = Needed(logps=False, states=True)
LOGPS = Needed(logps=True, states=False)
BOTH = Needed(logps=True, states=True)


def fill(store: ReferenceStore, sequences: Seq[Sequence], needed: Needed, model: CountingModel | None = None) -> int:
    return store.fill(sequences, lambda _: needed, model or CountingModel(), lambda *_: None)


def test_what_is_kept_comes_back_in_the_order_asked_for(tmp_path: Path) -> None:
    assert fill(ReferenceStore(tmp_path), SEQUENCES, BOTH) == sum(len(s.ids) for s in SEQUENCES)
    wanted = [SEQUENCES[k] for k in (7, 0, 39, 7)]
    store, again = ReferenceStore(tmp_path), CountingModel()
    assert fill(store, SEQUENCES, BOTH, again) == again.computed == again.from_states == 0
    assert torch.equal(store.logps(wanted), torch.cat([said(s).logp_M for s in wanted]))
    assert store.states(wanted).dtype == torch.bfloat16
    assert torch.equal(store.states(wanted), torch.cat([said(s).hidden_MD for s in wanted]))


def test_log_probabilities_are_from_states_states_and_not_the_other_way(tmp_path: Path) -> None:
    tokens = sum(len(s.ids) for s in SEQUENCES)
    fill(ReferenceStore(tmp_path / "a"), SEQUENCES[:30], STATES)
    after, store = CountingModel(), ReferenceStore(tmp_path / "a")
    assert fill(store, SEQUENCES, LOGPS, after) == sum(len(s.ids) for s in SEQUENCES[30:])
    assert (after.computed, after.from_states) == (10, 30)
    assert torch.equal(store.logps(SEQUENCES), torch.cat([said(s).logp_M for s in SEQUENCES]))
    assert store.size()[:2] == (40, tokens)
    fill(ReferenceStore(tmp_path / "b"), SEQUENCES[:10], LOGPS)
    assert fill(ReferenceStore(tmp_path / "b"), SEQUENCES, STATES) == tokens


def test_a_sequence_is_its_ids_and_from_where_on_it_is_measured() -> None:
    s = Sequence((1, 2, 3), 1)
    assert len({key(s), key(s.with_prompt()), key(Sequence((1, 2, 3), 2)), key(Sequence((1, 2, 4), 1))}) == 3
    assert key(s) == key(s.with_prompt())  # from the first token on, both
    assert key(s) == key(Sequence((1, 2, 3), 2, 1))  # whatever of it is a target


def test_files_are_of_a_bounded_size_and_say_how_much_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SHARD_BYTES", 40)
    store = ReferenceCache(tmp_path).of("who")
    fill(store, SEQUENCES, BOTH)
    files = list((tmp_path / "who").glob("*.safetensors"))
    assert len(files) > len(reference.BUCKETS)
    sequences, tokens, size = ReferenceCache(tmp_path).size()
    assert (sequences, tokens) == (40, sum(len(s.ids) for s in SEQUENCES))
    assert size == sum(f.stat().st_size for f in files)


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_file_is_computed_again(harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PART_TOKENS", 1)  # several files
    fill(ReferenceStore(tmp_path), SEQUENCES, BOTH)
    path = min(tmp_path.glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes({"flip": bytes(raw), "cut": bytes(raw[: len(raw) // 2]), "empty": b""}[harm])
    store = ReferenceStore(tmp_path)
    assert 0 < fill(store, SEQUENCES, BOTH) < sum(len(s.ids) for s in SEQUENCES)
    assert torch.equal(store.logps(SEQUENCES), torch.cat([said(s).logp_M for s in SEQUENCES]))
    assert fill(ReferenceStore(tmp_path), SEQUENCES, BOTH) == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LeewayError, match="LEEWAY_CACHE_DIR"):
        fill(ReferenceStore(tmp_path / "file" / "who"), SEQUENCES, LOGPS)


SLOW = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_reference_cache import BOTH, SEQUENCES, CountingModel, fill
from leeway.model import reference
reference.PART_TOKENS = 1
print(fill(reference.ReferenceStore(Path({folder!r})), SEQUENCES, BOTH, CountingModel(pause=0.01)))
"""


def asking(folder: Path) -> subprocess.Popen[str]:
    code = SLOW.format(path=sys.path, folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_writers_that_are_killed_leave_nothing_half_done_and_others_share_the_work(tmp_path: Path) -> None:
    """One is killed amid its work, two others finish it together, and what it had done is not asked again."""
    first = asking(tmp_path)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("*.safetensors"))) < 2 and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    kept = ReferenceStore(tmp_path)
    kept.refresh()
    before = kept.size()[1]
    assert 0 < before < sum(len(s.ids) for s in SEQUENCES)
    (tmp_path / ".partial-f-left").write_bytes(b"half")
    both = [asking(tmp_path) for _ in range(2)]
    spent = [int(p.communicate(timeout=100)[0]) for p in both]
    assert before + sum(spent) == sum(len(s.ids) for s in SEQUENCES)
    assert fill(ReferenceStore(tmp_path), SEQUENCES, BOTH) == 0
    assert not list(tmp_path.glob(".partial-*"))
    kept.refresh()
    assert torch.equal(kept.logps(SEQUENCES), torch.cat([said(s).logp_M for s in SEQUENCES]))


def test_whoever_asks_first_the_bits_are_the_same_and_the_second_pays_nothing(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """DPO then IPO, another KL weight, another order of the same examples: nothing is computed anew."""

    def of(objective: object, folder: str, seed: int = 0) -> Trajectory:
        t = trajectory(models["llama"], "lora", objective, kept=tmp_path / folder, budgets=(240, 480))
        t.schedule = schedule(EXAMPLES, lambda _: 30, (240, 480), batch=4, seed=seed)
        return t

    first = of(dpo.Dpo(), "a")
    assert first.precompute_reference() == sum(new_tokens(first))
    assert of(ipo.Ipo(), "a").precompute_reference() == 0
    assert of(dpo.Dpo(beta=0.3), "a", seed=3).precompute_reference() == 0
    mismatched = of(kto.Kto(), "a")
    assert (
        0 < mismatched.precompute_reference() < sum(new_tokens(mismatched))
    )  # its pairs are there; its mismatched ones are new
    heavy = of(kl.Kl(weight=0.5), "b")
    assert heavy.precompute_reference() == sum(new_tokens(heavy))
    assert of(kl.Kl(weight=0.1), "b").precompute_reference() == 0
    after = of(dpo.Dpo(), "b")
    assert 0 < after.precompute_reference() < sum(new_tokens(after))
    for s in (s for example in first._batch(1).rendered for s in example):
        one, two = (t.compared.cached for t in (first, after))
        assert one is not None
        assert two is not None
        assert torch.equal(one.logps([s]), two.logps([s]))


def test_a_study_asks_once_whatever_its_workers_and_plan_says_how_much(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DPO comes first and keeps the states that KL needs; two workers leave the same bytes; a rerun asks nothing."""
    study = text(models, root, "[dpo, {kl: {weight: 0.1}}, {kl-2: {kl: {weight: 0.2}}}]")
    study = study.replace("[300, 600]", "[400, 1200]")
    planned = plan(parse(study, "x"))
    monkeypatch.setattr("leeway.report.build", lambda out, **_: out)  # no page is looked at here
    monkeypatch.setenv("LEEWAY_CACHE_DIR", str(tmp_path / "shared"))
    one = carry(study, tmp_path / "one")
    assert not (one / "cache").exists()
    monkeypatch.delenv("LEEWAY_CACHE_DIR")
    two = carry(study, tmp_path / "two", workers=2)
    assert contents(one) == contents(two)
    for place in (tmp_path / "shared" / "references", two / "cache" / "references"):
        sequences, tokens, size = ReferenceCache(place).size()
        assert (sequences, tokens) == (planned.references.sequences, planned.references.tokens)
        assert size == pytest.approx(planned.references.bytes, abs=1000 * len(list(place.rglob("*.safetensors"))))
    lines = pd.read_parquet(one / "ledger.parquet")
    last = lines[lines.budget == 1200].set_index("objective")
    assert last.reference_tokens.max() == tokens < last.reference_tokens.sum()
    assert last.reference_tokens["kl"] == last.reference_tokens["kl-2"]
    told = json.loads((two / "manifest.json").read_text())["references"]
    assert told == {"sequences": sequences, "tokens": tokens, "bytes": size}
    monkeypatch.setenv("LEEWAY_CACHE_DIR", str(tmp_path / "shared"))
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "shared").rglob("*.safetensors")}
    again = carry(
        study.replace("dpo, {kl: {weight: 0.1}}, {kl-2: {kl: {weight: 0.2}}}", "{kl: {weight: 1}}"), tmp_path / "x"
    )
    assert (again / "rows.parquet").is_file()
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "shared").rglob("*.safetensors")} == stamps
