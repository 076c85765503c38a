"""One trajectory trained by two processes over gloo: what one process computes, to rounding, in the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks_targets
import torch
from ranks_targets import Case
from safetensors.torch import load_file

from leeway.errors import LeewayError
from leeway.model import adapters
from leeway.study.load import parse
from leeway.study.run import Study
from leeway.training import distributed
from leeway.training.distributed import ALONE, TorchDistributed

pytestmark = pytest.mark.slow

BOUNDS = {torch.float64: 1e-6, torch.float32: 5e-6, torch.bfloat16: 0.15}  # as in tests/test_invariances.py

CASES = [
    *(Case(name) for name in ("sft", "dpo", "kl", "cft", "kto")),
    *(Case(name, "full", micro_tokens=1) for name in ("sft", "dpo", "kl", "cft")),  # each example by itself: 3 and 2
    Case("dpo", "dora"),
    Case("dpo", held=True),
    Case("kl", "lora", torch.float32),
    Case("kl", "lora", torch.bfloat16),  # beside it the adapter in float32, as on a GPU
]


RUNS = [Case("dpo", dropout=0.1), Case("cft"), Case("kl", "full")]


@pytest.fixture(scope="module")
def two(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Case, Any], Path]:
    """What two ranks found of every case, and the folder of what they trained."""
    folder, said = tmp_path_factory.mktemp("ranks"), list[Any]()
    cases = [*CASES, Case("kl", "full", model=str(models["llama"]))]  # its output layer is not its embedding
    distributed.run_distributed(2, "cpu", ranks_targets.everything, (cases, RUNS, folder), said.append)
    return dict(said), folder


def test_two_ranks_find_the_gradient_of_one(
    two: tuple[dict[Case, Any], Path], record_property: Callable[[str, object], None]
) -> None:
    """The layers are sharded, the reference is live: an adapter that is off, or a frozen copy in shards."""
    too_far, worst = {}, dict.fromkeys(BOUNDS, 0.0)
    for case, (loss, norm, grad, shards) in two[0].items():
        assert shards
        one = ranks_targets.gradient(case)
        assert not one[3]
        far = max(
            abs(loss - one[0]) / abs(one[0]),
            abs(norm - one[1]) / one[1],
            float((torch.from_numpy(grad) - one[2]).norm() / one[2].norm()),
        )
        worst[case.dtype] = max(worst[case.dtype], far)
        if far > BOUNDS[case.dtype]:
            too_far[case] = far
    measured = "; ".join(f"{str(d)[6:]} {far:.1e}" for d, far in worst.items())
    record_property("measured", f"two ranks = one: loss, norm and gradient in {measured}")
    assert too_far == {}
    assert len(two[0]) == len(CASES) + 1


@pytest.mark.parametrize("case", RUNS, ids=lambda case: case.name)
def test_a_run_resumed_by_two_ranks_is_the_uninterrupted_one(case: Case, two: tuple[dict[Case, Any], Path]) -> None:
    whole, resumed = (two[1] / f"{case.name}-{run}" / "1" for run in ("whole", "resumed"))
    assert state(whole).keys() == state(resumed).keys()
    for name, tensor in state(whole).items():
        assert torch.equal(tensor, state(resumed)[name]), name
    assert len((two[1] / f"{case.name}-whole.jsonl").read_text().splitlines()) == ranks_targets.MARKS[-1]


@pytest.mark.parametrize("case", [c for c in RUNS if not c.dropout], ids=lambda case: case.name)
def test_what_two_ranks_save_is_what_one_saves_and_goes_on_from(
    case: Case, two: tuple[dict[Case, Any], Path], tmp_path: Path
) -> None:
    whole = two[1] / f"{case.name}-whole"
    ranks_targets.trained(case, tmp_path / "alone")
    ranks_targets.trained(case, tmp_path / "on", ALONE, whole)
    alone = state(tmp_path / "alone" / "1")
    for other in (whole / "1", tmp_path / "on" / "1"):
        assert {p.name for p in other.iterdir()} == {p.name for p in (tmp_path / "alone" / "1").iterdir()}
        assert state(other).keys() == alone.keys()
        for name, tensor in state(other).items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-6, atol=1e-9, msg=f"{other} {name}")


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds: what trains, and the optimiser's state."""
    return {**adapters.saved(folder), **load_file(folder / "optimizer.safetensors")}


def test_examples_are_dealt_out_and_every_rank_takes_as_many_passes() -> None:
    class Length(tuple[int, ...]):
        ids = property(lambda self: self)

    batch = [[Length(range(n))] for n in (5, 1, 4, 2, 3)]

    def cut(examples: Any) -> list[Any]:
        return [[e] for e in examples]

    shares = [list(TorchDistributed(r, 2).share(batch, cut)) for r in (0, 1)]  # type: ignore[arg-type]
    assert [[(len(m[0][0]), w) for m, w in share] for share in shares] == [
        [(1, 1.0), (3, 1.0), (5, 1.0)],
        [(2, 1.0), (4, 1.0), (2, 0.0)],
    ]
    few = [list(TorchDistributed(r, 7).share(batch, cut)) for r in range(7)]  # type: ignore[arg-type]
    assert [[w for _, w in share] for share in few] == [[1.0]] * 5 + [[0.0]] * 2
    assert len({TorchDistributed(r, 7).seed(3) for r in range(7)}) == 7
    assert ALONE.seed(3) == 3


def test_the_first_failure_of_a_rank_is_raised_and_ends_all() -> None:
    with pytest.raises(LeewayError, match="one rank cannot go on; mend it"):
        distributed.run_distributed(2, "cpu", ranks_targets.fails, (), lambda _: None)


def test_a_death_says_more_than_what_the_others_say_of_it() -> None:
    gone, wrong = RuntimeError("connection closed by peer"), LeewayError("a loss is not finite")
    with pytest.raises(LeewayError, match=r"rank 1 was killed \(probably out of memory\); run the same command again"):
        distributed._raise_first(gone, [1, -9])
    with pytest.raises(LeewayError, match="rank 0 was killed"):
        distributed._raise_first(None, [1, 0])
    for failure, codes in ((wrong, [1, -9]), (gone, [1, 0])):
        with pytest.raises(type(failure), match=str(failure)):
            distributed._raise_first(failure, codes)
    distributed._raise_first(None, [0, 0])


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LeewayError, match="2 ranks need one GPU each, 1 visible; set processes: 1, or device"):
        distributed.check(2, "cuda")
    distributed.check(2, "cpu")
    distributed.check(1, "cuda")


STUDY = """
name: small
model: {model}
device: cpu
processes: {processes}
task: {{files: {{train: {root}/train.jsonl, test: {root}/test.jsonl}}}}
objectives: [dpo]
budgets: [200, 400]
optim: {{lr: 3.0e-3, batch: 4, warmup_steps: 2, micro_tokens: 60}}
evals:
  capability: [{{name: files, max_new_tokens: 4}}]
  persona: {{source: organism, traits: [narcissism], limit: 4}}
"""


def test_a_study_by_two_processes_runs_to_its_report(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    ledgers, files = [], []
    for processes in (1, 2):
        out, text = tmp_path / str(processes), STUDY.format(model=models["llama"], root=root, processes=processes)
        (tmp_path / "study.yaml").write_text(text)
        results = Study.load(tmp_path / "study.yaml").run(out)
        assert (out / "report.html").is_file()
        ledgers.append(results.ledger)
        files.append({str(f.relative_to(out)) for f in (out / "checkpoints").rglob("*")})
        steps = (out / "steps" / "dpo-s0.jsonl").read_text().splitlines()
        assert len(steps) == ledgers[-1]["step"].max()
    one, two = (ledger.drop(columns="adapter_hash") for ledger in ledgers)
    assert one.equals(two)
    assert files[0] == files[1]
    assert set(ledgers[0]["adapter_hash"]).isdisjoint(ledgers[1]["adapter_hash"])  # dropout is another draw


@pytest.mark.parametrize(
    ("also", "fault"),
    [
        ("optim: {lr: tuned}", "processes: a sweep of learning rates runs in one process; give optim.lr a rate"),
        ("reference: cached", "processes: a cached reference is computed in one process; give reference: live"),
        ("device: cuda:1", "processes: 2 processes need a GPU each, and cuda:1 is one; give device: cuda"),
    ],
)
def test_processes_go_where_they_can(also: str, fault: str, root: Path) -> None:
    text = STUDY.format(model="organism", root=root, processes=2)
    key = also.split(":", maxsplit=1)[0]
    kept = [line for line in text.splitlines() if not line.startswith(f"{key}:")]
    with pytest.raises(LeewayError, match=fault):
        parse("\n".join([*kept, also]), "test")
