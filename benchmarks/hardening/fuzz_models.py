"""Fuzz model folders and adapters: settings, tokenizers, templates, weights, links, pickles, code in the folder.

Each is loaded as `leeway audit` loads it, in a forked process with limits on CPU time and memory. Code in a folder
writes a marker outside the allowed folders, so that it is noticed if it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hardening import mutations
from benchmarks.hardening.attempts import DEAD_S, Attempt, Tally, attempt
from benchmarks.hardening.small_run import small_run
from benchmarks.hardening.table import Line

MEMORY = 3 << 30  # bytes beyond what the parent has mapped
CODE = "import os\nopen({marker!r}, 'w').write('run')\nclass Owned:\n    pass\n"
END = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
TEMPLATES = (
    "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'a' * 9999999999 }}",
    "{% set a = 'a' * 100000 %}{% set b = a * 100000 %}{{ b | length }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "{{ raise_exception('\\x1b[2J' ~ 'no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[99].content }}",
    "{{ nothing.at.all }}",
    "{{ 1 / 0 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ [1] | sort(attribute='__class__') }}",
    "{{ '%s' | format(messages) * 99999 }}",
    "{{ messages | map(attribute='__class__.__init__.__globals__') | list }}",
    "{% for",
    "",
    "{{ messages }}",
    "\x00\x1b[31m",
    "{% generation %}{{ x }}{% endgeneration %}",
    "{% for m in messages %}{{ m.content | tojson }}{% endfor %}" + "x" * 100_000,
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ ('a' * 60 ~ '!') | replace('a', 'a' * 9999) | wordwrap(1) | length }}",
    "{{ messages | batch(999999999999) | list }}",
    "{{ range(99999) | slice(99999) | list | length }}",
    "{{ '{0.__class__}'.format(messages) }}{{ 'x' | center(9999999999) }}",
)
LIMITS = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
SIZES = (0, -1, 1, 3, 10**6, 10**9, 2**62, 1.5, "8", None, [1], True, float("nan"))


class Unpickled:
    """Touches the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=500, help="models and adapters")
    parser.add_argument("--only", choices=("models", "adapters", "templates"), help="one kind")


def run(options: argparse.Namespace) -> list[Line]:
    """Fuzz; every kind of failure is printed with what was changed."""
    import peft  # noqa: F401 - before the fork
    import torch
    import transformers  # noqa: F401

    from leeway.model.load import load_model

    torch.set_num_threads(1)
    load_model("organism", device="cpu")  # whatever is imported late
    work = options.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    marker = options.folder / "outside" / "marker"
    for folder in (work, marker.parent):
        folder.mkdir(exist_ok=True)
    adapter = small_run(options.folder) / "checkpoints" / "sft" / "s0" / "2000"
    counts = {"templates": min(2 * len(TEMPLATES), options.n // 5), "models": options.n * 2 // 5}
    counts["adapters"] = options.n - sum(counts.values())
    lines = []
    for kind in (k for k in counts if options.only in (None, k)):
        tally = Tally(f"{kind.removesuffix('s')} variants")
        for n in range(counts[kind]):
            rng = random.Random(f"{options.seed}/{kind}/{n}")
            what, call = _case(kind, n, rng, work, adapter, marker)
            tally.add(_forked(call, work), f"{n}: {what}")
            shutil.rmtree(work / "case", ignore_errors=True)
            if marker.exists():
                marker.unlink()
                tally.add(Attempt("pickle", "code of the folder was run", what), f"{n}: {what}")
        lines.append(tally.line())
    return lines


def _case(
    kind: str, n: int, rng: random.Random, work: Path, adapter: Path, marker: Path
) -> tuple[str, Callable[[], object]]:
    """Make one folder; return what is odd about it and what loads it."""
    from leeway.organism import path as organism

    case = work / "case"
    case.mkdir()
    if kind == "adapters":
        model = organism()
        for file in adapter.iterdir():
            shutil.copy(file, case)
        what = _damage_adapter(rng, case, marker)
        return what, lambda: load_adapter(str(model), case)
    for file in organism().iterdir():
        shutil.copy(file, case)
    if kind == "templates":
        text = TEMPLATES[n // 2].replace("MARKER", str(marker)) + (END if n % 2 else "")
        _edit(case / "tokenizer_config.json", lambda c: c.update(chat_template=text))
        (case / "chat_template.jinja").unlink(missing_ok=True)
        what = f"template {text[:60]!r}"
    else:
        what = _damage_model(rng, case, marker)
    return what, lambda: load_whole(case)


def load_whole(folder: Path) -> None:
    """Load a model as an audit and a study do, and answer one prompt."""
    from leeway.audit.models import LocalModel, is_adapter
    from leeway.generation.backend import Request
    from leeway.generation.transformers import TransformersBackend
    from leeway.model.load import load_chat, load_context, load_model, load_stop_ids

    is_adapter(str(folder))
    assert LocalModel(str(folder)).identity
    load_context(str(folder)), load_stop_ids(str(folder))
    model = load_model(str(folder), device="cpu", chat=load_chat(str(folder)))
    backend = TransformersBackend(model, "", 2, "failure", False)
    backend.complete([Request([{"role": "user", "content": "hello"}], 4)], lambda _: None)


def load_adapter(base: str, folder: Path) -> None:
    """Resolve and load an adapter as an audit does."""
    from leeway.audit.models import LocalModel, apply_adapter, own_tokenizer, resolve_models
    from leeway.model.load import load_model

    _, checkpoint, _ = resolve_models(None, base, folder, other_base=True)
    assert isinstance(checkpoint, LocalModel)
    own_tokenizer(checkpoint)
    assert checkpoint.identity
    apply_adapter(load_model(base, device="cpu"), folder)


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_bytes(json.dumps(content, default=str, skipkeys=True).encode("utf-8", "surrogatepass"))


def _mutate(path: Path, rng: random.Random) -> None:
    value = mutations.mutant_value(rng, json.loads(path.read_text()))
    try:
        path.write_bytes(json.dumps(value, default=str, skipkeys=True).encode("utf-8", "surrogatepass"))
    except ValueError:
        path.write_bytes(b"9" * 5_000)


def _damage_model(rng: random.Random, case: Path, marker: Path) -> str:
    ways: dict[str, Callable[[], object]] = {
        "size": lambda: _edit(case / "config.json", lambda c: c.update({rng.choice(LIMITS): rng.choice(SIZES)})),
        "config": lambda: _mutate(case / "config.json", rng),
        "generation": lambda: _mutate(case / "generation_config.json", rng),
        "tokenizer settings": lambda: _mutate(case / "tokenizer_config.json", rng),
        "tokenizer": lambda: _mutate(case / "tokenizer.json", rng),
        "bytes": lambda: _flip(rng, rng.choice(sorted(case.iterdir()))),
        "weights": lambda: _damage_weights(rng, case / "model.safetensors"),
        "code": lambda: _add_code(rng, case, marker),
        "pickle": lambda: _add_pickle(rng, case, marker, "pytorch_model.bin"),
        "link": lambda: _link_out(rng, case),
        "index": lambda: _add_index(rng, case),
        "kind": lambda: _edit(case / "config.json", lambda c: c.update(_odd_kind(rng))),
    }
    name = rng.choice(list(ways))
    ways[name]()
    return f"{name}: {_difference(case)}"


def _damage_adapter(rng: random.Random, case: Path, marker: Path) -> str:
    import peft

    config, weights = case / "adapter_config.json", case / "adapter_model.safetensors"
    keys = sorted(peft.LoraConfig.__dataclass_fields__)
    odd = (*mutations.HOSTILE_VALUES, 10**6, {"(a+)+$": 10**9}, [[0, 10**6]], "gaussian", ["(a+)+$"], "(x+x+)+y")
    ways: dict[str, Callable[[], object]] = {
        "setting": lambda: _edit(config, lambda c: c.update({rng.choice(keys): rng.choice(odd)})),
        "settings": lambda: _mutate(config, rng),
        "kind": lambda: _edit(
            config, lambda c: c.update(peft_type=rng.choice(["LOHA", "X", "PROMPT_TUNING", None, 3, []]))
        ),
        "import": lambda: _edit(config, lambda c: c.update(megatron_config={"a": 1}, megatron_core="antigravity")),
        "bytes": lambda: _flip(rng, rng.choice(sorted(p for p in case.iterdir() if p.is_file()))),
        "weights": lambda: _damage_weights(rng, weights),
        "pickle": lambda: _add_pickle(rng, case, marker, "adapter_model.bin"),
        "code": lambda: _add_code(rng, case, marker),
        "link": lambda: _link_out(rng, case),
    }
    name = rng.choice([*ways, "setting", "setting", "settings"])
    ways[name]()
    return f"{name}: {_difference(case)}"


def _difference(case: Path) -> str:
    """Return a model's or an adapter's settings in short, to reproduce a failure."""
    for name in ("adapter_config.json", "config.json"):
        if (path := case / name).is_file() and not path.is_symlink():
            return path.read_bytes()[:1_500].decode("utf-8", "replace").replace("\n", " ")
    return ""


def _flip(rng: random.Random, path: Path) -> None:
    path.write_bytes(mutations.flipped(rng, path.read_bytes()))


def _odd_kind(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        [
            {"model_type": "nosuch"},
            {"model_type": ["llama"]},
            {"model_type": "bert"},
            {"model_type": "../x"},
            {"architectures": ["Owned"]},
            {"dtype": "float128"},
            {"dtype": "os"},
            {"rope_scaling": {"type": "x", "factor": -1}},
            {"rope_parameters": {"rope_type": "yarn"}},
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            {"quantization_config": {"quant_method": "gptq"}},
            {"quantization_config": 3},
            {"_attn_implementation": "owner/kernel"},
            {"attn_implementation": "owner/kernel"},
            {"hidden_act": "nosuch"},
            {"max_position_embeddings": -1},
            {"max_position_embeddings": "many"},
            {"tie_word_embeddings": "yes"},
            {"eos_token_id": [10**9]},
            {"eos_token_id": "x"},
            {"pad_token_id": -7},
            {"transformers_version": "99"},
            {"torch_dtype": {"a": 1}},
            {"base_model_tp_plan": {"x": "colwise"}},
            {"text_config": {"model_type": "llama"}},
            {"is_encoder_decoder": True},
        ]
    )


def _damage_weights(rng: random.Random, path: Path) -> None:
    """Change the header, a tensor's shape or type, the values, or the kind of file."""
    import torch
    from safetensors.torch import load_file, save_file

    how = rng.randrange(9)
    data = path.read_bytes()
    if how == 0:
        path.write_bytes(struct.pack("<Q", rng.choice([2**63, 2**40, 0, 1])) + data[8:])
    elif how == 1:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("data.pkl", b"\x00" * (64 << 20))
    elif how == 2:
        length = struct.unpack("<Q", data[:8])[0]
        header = mutations.mutant_value(rng, json.loads(data[8 : 8 + length]))
        text = json.dumps(header, default=str, skipkeys=True).encode("utf-8", "surrogatepass")
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    elif how == 3:
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        tensors = load_file(path)
        name = rng.choice(sorted(tensors))
        odd = {
            4: lambda t: t.to(
                rng.choice([torch.int8, torch.float64, torch.bool, torch.complex64, torch.float8_e4m3fn])
            ),
            5: lambda t: t.flatten()[: max(1, t.numel() // 2)].clone(),
            6: lambda t: torch.full_like(t, rng.choice([float("nan"), float("inf"), 1e38])),
            7: lambda t: t.t().contiguous() if t.dim() == 2 else t[None].clone(),
            8: lambda _: torch.zeros((0, 3)),
        }
        tensors[name] = odd[how](tensors[name])
        if rng.random() < 0.3:
            tensors[f"{name}\x1b[31m../x"] = tensors.pop(name)
        save_file(tensors, path)


def _add_code(rng: random.Random, case: Path, marker: Path) -> None:
    """Put code beside the model and name it wherever a loader may look for it."""
    for name in ("modeling_owned.py", "configuration_owned.py", "tokenization_owned.py", "__init__.py", "conftest.py"):
        (case / name).write_text(CODE.format(marker=str(marker)))
    names = dict.fromkeys(("AutoModelForCausalLM", "AutoModel"), "modeling_owned.Owned")
    names |= {"AutoConfig": "configuration_owned.Owned", "AutoTokenizer": ["tokenization_owned.Owned", None]}
    for file in ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
        if (case / file).is_file():
            _edit(case / file, lambda c: c.update(auto_map=names, custom_generate="owned", tokenizer_class="Owned"))
    (case / "custom_generate").mkdir()
    (case / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
    if rng.random() < 0.5 and (case / "config.json").is_file():
        _edit(case / "config.json", lambda c: c.update(model_type="owned"))


def _add_pickle(rng: random.Random, case: Path, marker: Path, name: str) -> None:
    (case / name).write_bytes(pickle.dumps(Unpickled(marker)))
    (case / "training_args.bin").write_bytes(pickle.dumps(Unpickled(marker)))
    (case / "tokenizer.model").write_bytes(pickle.dumps(Unpickled(marker)))
    if rng.random() < 0.6:
        for weights in case.glob("*.safetensors"):
            weights.unlink()
    elif rng.random() < 0.5:
        for weights in case.glob("*.safetensors"):
            weights.write_bytes(pickle.dumps(Unpickled(marker)))


def _link_out(rng: random.Random, case: Path) -> None:
    path = rng.choice(sorted(p for p in case.iterdir() if p.is_file()))
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/etc/passwd", "/proc/self/mem", str(path), "/nowhere", "/", "../../x"]))


def _add_index(rng: random.Random, case: Path) -> None:
    (case / "model.safetensors").rename(case.parent / "elsewhere.safetensors")
    where = rng.choice(["../elsewhere.safetensors", "/etc/passwd", "nowhere.safetensors", "", 3, None, "a\x00b"])
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": where}}
    (case / "model.safetensors.index.json").write_text(json.dumps(rng.choice([index, {}, [], {"weight_map": []}])))


def _forked(call: Callable[[], object], allowed: Path) -> Attempt:
    """Attempt in a child with limits on memory; a child that dies is a crash."""
    end, begin = os.pipe()
    child = os.fork()
    if not child:
        os.close(end)
        code = 1
        try:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            found = attempt(call, allowed)
            os.write(begin, pickle.dumps(found)[:60_000])
            code = 0
        finally:
            os._exit(code)
    os.close(begin)
    with os.fdopen(end, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    if sent:
        found = pickle.loads(sent)
        assert isinstance(found, Attempt)
        return found
    return Attempt("crash", f"the process died with {os.waitstatus_to_exitcode(status)} (limit {DEAD_S} s)")
