"""The study file: all errors at once, the nearest known key, presets that parse."""

from __future__ import annotations

from pathlib import Path

import pytest

from leeway.errors import LeewayError
from leeway.study.load import PRESETS, load, parse, preset_text
from leeway.study.spec import Spec

GOOD = """
name: x
model: organism
task: {name: organism}
objectives: [sft, dpo]
budgets: [1k, 2k]
evals: {capability: [organism]}
"""

AT = "endpoint: 'http://h/v1'"
ZULU = "evals.jailbreak={attacks: [zulu], translator:"


def fault(text: str, *overrides: str) -> str:
    with pytest.raises(LeewayError) as found:
        parse(text, "x.yaml", overrides)
    head, *faults = str(found.value).split("\n")
    assert not faults or head == f"x.yaml: {len(faults)} faults"  # several are one a line
    return str(found.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_and_come_back_from_their_own_yaml(name: str) -> None:
    spec = parse(preset_text(name), name)
    assert parse(spec.to_yaml(), name).hash == spec.hash


def test_budgets_may_be_written_with_units() -> None:
    assert parse(GOOD, "x", ("budgets=[500, 1.1k, 0.01M]",)).budgets == (500, 1100, 10_000)


def test_all_errors_at_once_with_the_nearest_known_key() -> None:
    message = fault(GOOD + "seedz: [1]\noptim: {lrr: 1, batch: 0}\nadapter: {rank: 3}\n")
    for part in (
        "unknown key 'seedz'; did you mean 'seeds'?",
        "'optim.lrr'; did you mean 'lr'?",
        "optim.batch",
        "unknown key 'adapter.rank'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("budgets=[2k,1k]", "must rise; write [1000, 2000]"),
        ("budgets=[1k,1k]", "must rise"),
        ("budgets=[1.0005k]", "budgets"),
        ("budgets=[-5]", "budgets"),
        ("objectives=[sft,sft]", "'sft' is listed twice"),
        ("data=x", "unknown key 'data'; did you mean 'task'?"),
        ("lr=1e-4", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("optim.learning_rate=1e-4", "unknown key 'optim.learning_rate'; did you mean 'optim.lr'?"),
        ("adapter.rank=8", "unknown key 'adapter.rank'; did you mean 'adapter.r'?"),
        ("attacks=[dan]", "unknown key 'attacks'; did you mean 'evals.jailbreak.attacks' or 'probe.attacks'?"),
        ("batch=8", "unknown key 'batch'; did you mean 'optim.batch' or 'evals.batch'?"),
        ("objectives=[simmpo]", "no objective 'simmpo'; did you mean 'simpo'?"),
        ("objectives=[sff]", "no objective 'sff'; did you mean 'sft'?"),
        ("objectives=[{orpo: {wieght: 1}}]", "no setting 'wieght'; did you mean 'weight'?"),
        ("objectives=[{ip: {p: 2}}]", "p is 2"),
        ("objectives=[{kl: {direction: up}}]", "reverse or forward"),
        ("objectives=sft", "give a list"),
        ("controls.learning=3", "controls.learning: give a mapping (items, general), not 3"),
        ("controls.learning={item: 3}", "unknown key 'controls.learning.item'; did you mean 'items'?"),
        ("controls.learning.general=-1", "controls.learning.general: input should be greater than 0, not -1"),
        ("task={name: gsm9k}", "task.name"),
        ("task={files: {train: a}}", "task.files.test is missing"),
        ("task=files", "files needs data files: give {files: {train: …, test: …}}"),
        ("task={name: gsm8k, files: {train: a, test: b}}", "files: task gsm8k does not use it"),
        ("task={name: organism, revision: abc}", "revision: task organism does not use it"),
        ("revision=abc", "revision is a commit of a hub model, and organism is on this machine; leave it out"),
        ("task={name: gsm8k, unsupported: leave-out}", "unsupported: task gsm8k reads no files"),
        ("task=openended", "no task 'openended'"),
        (
            "evals={capability: [{name: gsm8k, extraction: parity}]}",
            "no extraction rule 'parity' (it has: ",
        ),
        ("evals={capability: [{name: supergpqa-engineering, shots: 2}]}", "2 shots are not supported; it takes 0 or 5"),
        ("evals={capability: [{name: organism, shots: 1}]}", "1 shots are not supported; it takes 0"),
        ("evals={}", "nothing is measured"),
        ("evals={jailbreak: {attacks: [zulu]}}", "zulu needs a translator"),
        ("evals={jailbreak: {judge: organism}}", "use judge: keywords"),
        ("evals={capability: [files]}", "files needs task"),
        ("seeds=[0,0]", "seeds: 0 is listed twice"),
        ("seeds=[true]", "seeds.0"),
        ("optim.lr=.inf", "optim.lr"),
        ("objectives=[{kl: {weight: .nan}}]", "weight is nan"),
        ("evals={capability: [organism, organism]}", "'organism' is listed twice"),
        ("evals={persona: {traits: [narcissism, narcissism]}}", "'narcissism' is listed twice"),
        ("budgets=100", "give a list, such as [100]"),
        ("pairs=corrupted", "give a mapping (from, "),
        ("pairs={from: thin-air}", "pairs.from"),
        ("budgets=[true]", "budgets.0: true is not a number of tokens"),
        ("optim.batch=true", "optim.batch: true is not a valid value; quote it if it is text"),
        ("name=false", "name: false is not a valid value; quote it if it is text"),
        ("name=2024-13-01", "month must be in 1..12"),
        ("seeds=[-1]", "seeds.0: input should be greater than or equal to 0"),
        ("seeds=[9223372036854775808]", "seeds.0: input should be less than 9223372036854775808"),
        ("objectives=[{alias: x, kind: sfx}]", "{'alias': 'x', 'kind': 'sfx'} is not an objective: write"),
        ("objectives=[{alias: x, kind: sft}]", "is not an objective: write"),
        ("objectives=[{alias: x, kind: sft, settings: {}, start: null, reference: start}]", "is not an objective"),
        (f"objectives=[{{{'a' * 65}: {{sft: {{}}}}}}]", "has 65 characters; at most 64"),
        ("objectives=[{dpo: {start: {from: sft, budget: 1k}}}]", "write {my-dpo: {dpo: {}, start: …}}"),
        ("objectives=[{dpo: {}, start: {from: sft, budget: 1k}}]", "write {my-dpo: {dpo: {}, start: …}}"),
        ("objectives=[{dpo: {reference: base}}]", "write {my-dpo: {dpo: {}, reference: …}}"),
        ("objectives=[{a: {dpo: {}, start: }}]", "a: its start is empty"),
        ("objectives=[{a: {dpo: {}, reference: base}}]", "reference: base needs a start"),
        (
            "objectives=[sft, {a: {cft: {}, start: {from: sft, budget: 1k}}}]",
            "start it from the base model or from cft",
        ),
        ("objectives=[cft, {a: {dpo: {}, start: {from: cft, budget: 1k}}}]", "from an objective without them"),
        ('objectives=[{a: {dpo: {}, start: {adapter: ""}}}]', "a: start.adapter '' is not a folder"),
        ("optim={lr: 1e-4, tune: {items: 3}}", "tune is for lr: tuned"),
        ("optim={lr: 1, lr: 2}", "'lr' is given twice"),
        ("pairs={filter: model}", "filter: model is for from: unsafe"),
        ("pairs={from: sampled-errors, filter: model}", "filter: model is for from: unsafe"),
        ("pairs={from: corrupted, samples: 2}", "samples is for answers that are generated"),
        ("evals.capability=[{name: openended, judge_model: {model: x}}]", "give source"),
        ("evals.capability=[{name: legal, judge_model: {model: x}}]", "legal needs source, or task: legal"),
        (
            "evals.persona={self_report: {model: x, concurrency: 2}}",
            "concurrency needs an endpoint, and x is local",
        ),
        ("evals.persona={self_report: {model: x, max_calls: 2}}", "max_calls needs an endpoint"),
        ("evals.persona={self_report: {model: x, key_env: K}}", "key_env needs an endpoint"),
        (
            f"evals.persona={{self_report: {{model: x, {AT}, revision: y}}}}",
            "revision needs a local model",
        ),
        (f"{ZULU} {{from: nllb, model: {{model: x, {AT}}}}}}}", "nllb runs on this machine; leave endpoint out"),
        (f"{ZULU} {{from: cache, file: f, model: x}}}}", "from: cache uses no model"),
        (f"{ZULU} {{from: model}}}}", "from: model needs model"),
        ("evals.jailbreak={translator: {from: nllb}}", "translator is for attacks: zulu, which is not listed"),
        ("evals.jailbreak={turns: 3}", "turns is for attacks: crescendo_led, which is not listed"),
        ("evals.jailbreak={temperature: 0.5}", "temperature has no effect with samples: 0"),
        ("evals={thinking: true, capability: ['lm-eval:arc_easy']}", "thinking: lm-eval tasks are answered without a"),
        ("evals.jailbreak={at: [1, 5]}", "at: 5 tries need as many sampled answers, samples is 0; give samples: 5"),
        ("evals.jailbreak={samples: 4, at: 5}", "at: 5 tries need as many sampled answers, samples is 4"),
        ("evals.jailbreak={samples: 4, at: [2, 2]}", "evals.jailbreak.at"),
        ("evals.jailbreak={prompts: organism, judge: organism, perplexity: true}", "no effect with judge: organism"),
        ("evals.jailbreak={judge: {name: finetuned, model: x}}", "finetuned uses no model; leave model out"),
        (f"evals.jailbreak={{judge: {{name: wildguard, model: {{model: x, {AT}}}}}}}", "wildguard is a local model"),
        ("evals.jailbreak={judge: {name: wildguard, model: {model: x, max_new_tokens: 9}}}", "leave endpoint and"),
        ("evals.alignment=first-plot", "answers are rated by a model; give judge_model"),
        ("evals.alignment=[organism, first-plot]", "organism is judged exactly; give it alone"),
        ("evals.alignment={questions: organism, judge_model: x}", "leave judge_model and judge_prompts out"),
        (
            "evals.alignment={questions: organism, samples: 2, temperature: 0}",
            "2 samples at temperature 0 are all equal",
        ),
        ("evals.sycophancy=world", "evals.sycophancy.items"),
        ("evals.backend=vlm", "evals.backend: 'vlm' is neither transformers nor vllm"),
        ("evals.backend={vllm: {args: [--dtype=half]}}", "evals.backend.vllm: args: --dtype is set by the study"),
        ("evals.backend={vllm: {args: [-v], endpoint: 'http://x'}}", "endpoint names a running one; leave one out"),
        ("evals.backend={vllm: {endpoint: 'x:8000'}}", "'x:8000' is not an address"),
        ("evals.backend={vllm: {port: 1}}", "unknown key 'evals.backend.vllm.port'"),
        ("nonsense", "is not an override"),
        ("name.x=1", "override"),
    ],
)
def test_errors_name_the_place_and_the_fix(override: str, part: str) -> None:
    assert part in fault(GOOD, override)


@pytest.mark.parametrize("backend", ["transformers", "vllm", "{vllm: }", "{vllm: {endpoint: 'http://x:1/v1'}}"])
def test_the_backend_is_written_as_it_is_read(backend: str) -> None:
    spec = parse(GOOD, "x", (f"evals.backend={backend}",))
    assert (spec.evals.backend.vllm is None) == (backend == "transformers")
    assert parse(spec.to_yaml(), "x").hash == spec.hash


def test_an_error_does_not_hide_others() -> None:
    message = fault(GOOD + "seedz: [1]\n", "budgets=[2k,1k]", "seeds=[0,0]", "objectives=[sft,sft]")
    for part in ("did you mean 'seeds'?", "must rise", "seeds: 0 is listed twice", "'sft' is listed twice"):
        assert part in message


def test_aliases_run_an_objective_twice() -> None:
    spec = parse(
        GOOD,
        "x",
        ("objectives=[orpo, {orpo-0.2: {orpo: {weight: 0.2}}}, {kl: {weight: 1.0, direction: forward}}]",),
    )
    assert [o.alias for o in spec.objectives] == ["orpo", "orpo-0.2", "kl"]
    assert [getattr(o.build(), "weight", None) for o in spec.objectives] == [0.05, 0.2, 1.0]


def test_scientific_notation_is_a_number_at_every_place() -> None:
    assert parse(GOOD, "x", ("optim.lr=1e-3",)).optim.lr == 1e-3
    assert parse(GOOD, "x", ("optim.lr={sft: 1e-4, dpo: 5E-5}",)).optim.lr == {"sft": 1e-4, "dpo": 5e-5}
    assert parse(GOOD + "optim: {lr: {sft: 1e-4, dpo: 5e-5}}\n", "x").optim.lr == {"sft": 1e-4, "dpo": 5e-5}
    tune = parse(GOOD, "x", ("optim={lr: tuned, tune: {lrs: [1e-4, .5, +2.e-4, 3]}}",)).optim.tune
    assert tune.lrs == (1e-4, 0.5, 2e-4, 3.0)
    assert parse(GOOD, "x", ("budgets=[1e3, 2k]",)).budgets == (1000, 2000)


@pytest.mark.parametrize("name", ["1e5", "1.5", "0x1", "2024-01-02", "no", "x1e5", "1e", "12"])
def test_a_name_that_looks_like_something_else_comes_back_as_a_name(name: str) -> None:
    spec = parse(GOOD.replace("name: x", f"name: '{name}'"), "x")
    assert spec.name == name
    assert parse(spec.to_yaml(), "x").hash == spec.hash


def test_a_repeated_key_is_named_with_its_line() -> None:
    assert "x.yaml, line 8: 'budgets' is given twice; correct that line" in fault(GOOD + "budgets: [3k]\n")
    assert "line 8: 'r' is given twice" in fault(GOOD + "adapter: {r: 1, r: 1}\n")


def test_the_resolved_study_and_the_one_that_workers_get_are_the_study() -> None:
    staged = "objectives=[sft, {a: {dpo: {beta: 0.2}, start: {from: sft, budget: 1k}, reference: base}}]"
    for overrides in ((), (staged,), ("optim.lr=tuned", "optim.tune.items=3"), ("pairs={from: unsafe, samples: 2}",)):
        spec = parse(GOOD, "x", overrides)
        assert parse(spec.to_yaml(), "x").hash == spec.hash
        assert Spec.model_validate(spec.model_dump(mode="json", by_alias=True)) == spec


def test_full_training_in_bfloat16_is_refused() -> None:
    assert "too coarse for adapter.kind: full" in fault(GOOD, "adapter.kind=full", "dtype=bfloat16")
    assert parse(GOOD, "x", ("adapter.kind=full", "dtype=float32")).weight_dtype == "float32"


@pytest.mark.parametrize(
    ("files", "kind", "objective", "part"),
    [
        ({}, "lora", "dpo", "holds no weights: give the folder of a saved adapter"),
        ({"adapter_model.safetensors": ""}, "lora", "dpo", "holds no weights"),
        ({"model.safetensors": ""}, "lora", "dpo", "holds whole weights, and an adapter would be trained"),
        (
            {"adapter_model.safetensors": "", "adapter_config.json": "{}"},
            "full",
            "dpo",
            "holds an adapter, and whole weights would be trained",
        ),
        (
            {"adapter_model.safetensors": "", "adapter_config.json": "{"},
            "lora",
            "dpo",
            "adapter_config.json is damaged",
        ),
        ({"adapter_model.safetensors": "", "adapter_config.json": "{}"}, "lora", "cft", "has no control tokens"),
        (
            {"adapter_model.safetensors": "", "adapter_config.json": '{"trainable_token_indices": [300, 301]}'},
            "lora",
            "dpo",
            "has trained control tokens",
        ),
    ],
)
def test_a_start_folder_is_checked(files: dict[str, str], kind: str, objective: str, part: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    start = f"objectives=[{{a: {{{objective}: {{}}, start: {{adapter: {tmp_path}}}}}}}]"
    assert part in fault(GOOD, start, f"adapter.kind={kind}")


def test_broken_yaml_is_named_by_its_line() -> None:
    assert "x.yaml, line 3" in fault("name: x\nmodel: [a\ntask: }\n")
    assert "not a study" in fault("[1, 2]")


def test_an_unknown_study_suggests_a_preset() -> None:
    with pytest.raises(LeewayError, match="did you mean 'real-data'"):
        load("real_data")


def test_the_hash_sees_every_setting() -> None:
    spec = parse(GOOD, "x")
    assert spec.hash != parse(GOOD, "x", ("optim.clip=2",)).hash
    assert isinstance(spec, Spec)


def test_settings_that_are_used_are_accepted() -> None:
    overrides = (
        "evals.jailbreak={prompts: organism, judge: [organism, keywords], perplexity: true, samples: 2, temperature: 0.5}",  # noqa: E501
        f"evals.persona={{self_report: {{model: x, {AT}, max_calls: 2, concurrency: 2}}}}",
    )
    spec = parse(GOOD, "x", overrides)
    assert [s.model for s in spec.evals.model_refs()] == ["x"]
    assert parse(spec.to_yaml(), "x").hash == spec.hash  # every default written out is still a default


def test_a_task_may_be_written_by_its_name() -> None:
    assert parse(GOOD, "x", ("task=gsm8k",)).task.name == "gsm8k"
