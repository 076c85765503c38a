"""lm-eval tasks on our own models: item scores give lm-eval's aggregate, and its own Hugging Face model the numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leeway.errors import LeewayError
from leeway.evals import lm_eval as ours
from leeway.evals.eval import is_retryable
from leeway.evals.lm_eval import LmEval, isolated
from leeway.generation.transformers import TransformersBackend
from leeway.model.load import load_model

needs = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs leeway[lm-eval]")
pytestmark = pytest.mark.filterwarnings("ignore")

CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{q}}}} ="
doc_to_choice: "{{{{c}}}}"
doc_to_target: "{{{{a}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
SAY = """
task: own_say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
output_type: generate_until
test_split: test
fewshot_split: train
doc_to_text: "{{{{q}}}} ="
doc_to_target: "{{{{c[a]}}}}"
generation_kwargs: {{until: ["e", "\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""
DOCS = [
    {"q": f"{a} + {b}", "c": [str(a + b), str(a + b + 1), "Yes no"], "a": (a + b) % 2} for a in range(4) for b in (1, 3)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCS)))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "say.yaml").write_text(SAY.format(data=data, metric="exact_match"))
    lost = CHOICE.format(data=folder / "none.jsonl").replace("own_choice", "own_lost")
    own = CHOICE.format(data=data).replace("own_choice", "own_prompt") + "num_fewshot: 0\n"
    (folder / "prompt.yaml").write_text(own)
    (folder / "lost.yaml").write_text(lost)
    return str(folder)


@pytest.fixture(scope="module")
def backend(models: dict[str, Path]) -> TransformersBackend:
    return TransformersBackend(load_model(str(models["llama"]), device="cpu"), batch=5)


def theirs(backend: TransformersBackend, task: str, include: str, **other: Any) -> dict[str, Any]:
    """The same task on lm-eval's own Hugging Face model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=backend.model.lm, tokenizer=backend.model.chat.tokenizer, batch_size=4)
    with isolated():
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=TaskManager(include_path=include, include_defaults=False),
            bootstrap_iters=0,
            **other,
        )
    return found


@needs
@pytest.mark.parametrize(
    ("task", "metric"), [("own_choice", "acc"), ("own_choice", "acc_norm"), ("own_say", "exact_match")]
)
def test_without_chat_the_scores_are_lm_eval_s_own(
    backend: TransformersBackend, tasks: str, task: str, metric: str, record_property: Any
) -> None:
    ticks: list[int] = []
    e = LmEval(task, metric=metric, chat=False, include_path=tasks)
    rows = e.run(backend, ticks.append)
    found = theirs(backend, task, tasks)
    samples = {s["doc_id"]: s for s in found["samples"][task]}
    assert [r.item_id for r in rows] == [f"lm-eval:{task}/{n}" for n in range(len(DOCS))]
    assert [r.score for r in rows] == [float(samples[n][metric]) for n in range(len(DOCS))]
    assert sum(r.score for r in rows) / len(rows) == pytest.approx(found["results"][task][f"{metric},none"])
    assert sum(ticks) == len(e) == len(DOCS)
    if task == "own_say":
        assert [r.response for r in rows] == [samples[n]["resps"][0][0] for n in range(len(DOCS))]
        return
    numbers = [json.loads(r.judge_raw)["filtered"] for r in rows]
    apart = max(
        abs(float(a[0]) - float(b[0]))
        for n in range(len(DOCS))
        for a, b in zip(numbers[n], samples[n]["filtered_resps"], strict=True)
    )
    record_property("measured", f"lm-eval: log-likelihood against its own Hugging Face model: {apart:.1e} (1e-4)")
    assert apart < 1e-4


@needs
def test_in_chat_log_likelihoods_are_those_of_the_rendered_ids(backend: TransformersBackend, tasks: str) -> None:
    rows = LmEval("own_choice", include_path=tasks).run(backend, lambda _: None)
    model = backend.model
    for row, doc in zip(rows, DOCS, strict=True):
        prompt = model.chat.prompt_ids([{"role": "user", "content": f"{doc['q']} ="}])
        assert row.prompt == model.chat.prompt_text([{"role": "user", "content": f"{doc['q']} ="}])
        raw = json.loads(row.judge_raw)["filtered"]
        totals = []
        for choice, (total, _) in zip(doc["c"], raw, strict=True):  # type: ignore[call-overload]
            answer = model.chat.ids(choice)
            with torch.no_grad():
                logp = model.lm(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            by_hand = sum(float(logp[len(prompt) - 1 + k, i]) for k, i in enumerate(answer))
            assert float(total) == pytest.approx(by_hand, abs=1e-4)
            totals.append(by_hand)
        assert row.score == float(int(np.argmax(totals)) == doc["a"])
        assert row.response == doc["c"][int(np.argmax(totals))]  # type: ignore[index]


@needs
def test_shots_prefix_and_limit(backend: TransformersBackend, tasks: str) -> None:
    shots = LmEval("own_choice", shots=2, include_path=tasks, limit=3)
    marked = TransformersBackend(backend.model, prefix="Yes ", batch=5)
    rows = shots.run(marked, lambda _: None)
    again = shots.run(TransformersBackend(backend.model, prefix="Yes ", batch=2), lambda _: None)
    assert len(rows) == len(shots) == 3
    assert [(r.item_id, r.score, r.prompt) for r in rows] == [(r.item_id, r.score, r.prompt) for r in again]
    assert all(r.prompt.count("[user]") == 3 and r.prompt.count("[user]\nYes ") == 1 for r in rows)
    assert all(r.prompt.count(f"{DOCS[int(r.item_id.rsplit('/')[-1])]['q']} =") >= 1 for r in rows)
    assert {r.item_id for r in rows} < {f"lm-eval:own_choice/{n}" for n in range(len(DOCS))}
    others = [
        LmEval("own_choice", include_path=tasks, limit=3),
        LmEval("own_choice", shots=2, include_path=tasks),
        LmEval("own_choice", shots=2, include_path=tasks, limit=3, metric="acc_norm"),
        LmEval("own_choice", shots=2, include_path=tasks, limit=3, chat=False),
    ]
    assert len({e.hash for e in [shots, *others]}) == 5
    assert LmEval("own_choice", shots=2, include_path=tasks, limit=3).hash == shots.hash
    with pytest.raises(LeewayError, match="which a prefix needs"):
        others[3].run(marked, lambda _: None)


@needs
def test_the_random_numbers_of_others_are_left_alone(backend: TransformersBackend, tasks: str) -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    LmEval("own_choice", include_path=tasks).run(backend, lambda _: None)
    drawn = random.random(), float(np.random.random()), float(torch.rand(()))
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert drawn == (random.random(), float(np.random.random()), float(torch.rand(())))


@needs
def test_what_cannot_be_scored_says_why(backend: TransformersBackend, tasks: str, monkeypatch: Any) -> None:
    rows = LmEval("own_say", metric="f1", include_path=tasks).run(backend, lambda _: None)
    assert all(math.isnan(r.score) for r in rows)
    assert {r.unscored_reason for r in rows} == {"lm-eval: own_say computes no f1 per item (it has: exact_match)"}
    monkeypatch.setattr(ours.HarnessBackend, "loglikelihood", lambda _self, pairs: [(math.nan, False)] * len(pairs))
    rows = LmEval("own_choice", include_path=tasks).run(backend, lambda _: None)
    assert {r.unscored_reason for r in rows} == {"no answer: the model's logits are not finite"}
    assert not any(is_retryable(r.unscored_reason) for r in rows)


@needs
@pytest.mark.parametrize("task", ["own_choice", "own_say"])
def test_a_model_without_numbers_has_no_answers(models: dict[str, Path], tasks: str, task: str) -> None:
    model = load_model(str(models["llama"]), device="cpu")
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.fill_(math.nan)
    rows = LmEval(task, include_path=tasks).run(TransformersBackend(model, batch=3), lambda _: None)
    assert {r.unscored_reason for r in rows} == {"no answer: the model's logits are not finite"}
    assert all(math.isnan(r.score) and not is_retryable(r.unscored_reason) for r in rows)


@needs
def test_what_does_not_fit_is_an_error(models: dict[str, Path], tasks: str) -> None:
    model = load_model(str(models["llama"]), device="cpu")
    model.context = 8
    with pytest.raises(LeewayError, match="exceeds its context of 8"):
        LmEval("own_choice", include_path=tasks).run(TransformersBackend(model), lambda _: None)


@dataclass
class Api:
    identity: str = "api"
    template_hash: str = "t"


@needs
def test_a_backend_without_a_model_and_a_task_without_data(tasks: str) -> None:
    with pytest.raises(LeewayError, match="needs the model itself, and Api has none"):
        LmEval("own_choice", include_path=tasks).run(Api(), lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(LeewayError, match="lm-eval:own_lost cannot be run"):
        _ = LmEval("own_lost", include_path=tasks).hash
    with pytest.raises(LeewayError, match="lm-eval:own_prompt has its own prompt and takes no shots"):
        _ = LmEval("own_prompt", shots=2, include_path=tasks).hash


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(LeewayError, match=r"lm-eval is not installed .*pip install 'leeway\[lm-eval\]'"):
        _ = LmEval("arc_easy").hash
