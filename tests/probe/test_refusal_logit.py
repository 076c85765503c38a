"""The refusal logit by one padded pass over a tree, by a window and from a block on: all equal plain forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from probe_contexts import OPENINGS, TEXTS, adapted, enumerated_logit, tiny_context, tiny_prompts

from leeway.data.chat import Chat, Sequence
from leeway.errors import LeewayError
from leeway.model.forward import hidden_at_measured
from leeway.model.load import load_model
from leeway.model.packing import Flat
from leeway.probe.hooks import ablate_everywhere, addition
from leeway.probe.pair import ModelPair
from leeway.probe.passes import Pass, PromptBatch
from leeway.probe.refusal_logit import OpeningTree, refusal_logits

CPU = torch.device("cpu")
Record = Callable[[str, object], None]


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_tree_window_and_later_blocks_equal_plain_passes(
    kind: str, models: dict[str, Path], record_property: Record
) -> None:
    """The longest prompt is longer than the tiny Gemma 2's sliding window of 64 tokens."""
    model = load_model(str(models[kind]), device="cpu", dtype="float32")
    context = tiny_context(ModelPair.of(model))
    side, tree = context.pair.checkpoint, context.tree
    assert max(map(len, tree.nodes)) >= 2
    tail, window = len(tree.tokens), context.positions.window
    worst = {"tree": 0.0, "window": 0.0, "block": 0.0}
    for chosen, batch in context.batches(context.prompts.of("test", "harmful")):
        assert batch.width > 64
        assert batch.start > 0
        run, blockwise = context.run(side, batch, window=True), context.run(side, batch, blockwise=True)
        hidden_BLD, _ = run.whole()
        blockwise.whole()
        logit_B = refusal_logits(model, tree, hidden_BLD)
        plain = [enumerated_logit(model, tree, ids) for ids in context.ids(chosen)]
        worst["tree"] = max(worst["tree"], float((logit_B - torch.tensor(plain)).abs().max()))
        some = list(range(0, len(chosen), 3))
        joined = context.run(side, batch.rows(some).joined())
        for layer in range(len(side.blocks)):
            moved_D = torch.linspace(-2, 2, hidden_BLD.shape[-1])
            for site in ("attn", "mlp", "resid"):

                def late(x_BQD: torch.Tensor, moved_D: torch.Tensor = moved_D) -> torch.Tensor:
                    """Move the window, which ends before the openings' tokens, whatever stands before it."""
                    end = x_BQD.shape[1] - tail
                    found = x_BQD.clone()
                    found[:, end - window : end] += moved_D
                    return found

                whole_BLD, _ = Pass(model, side.blocks, batch).whole({(layer, site): late})
                again_BQD = run.again([{(layer, "resid"): lambda x: x}, {(layer, site): late}])[1]
                part_BQD = run.only(some).again([{(layer, site): late}])[0]
                assert not torch.allclose(whole_BLD, hidden_BLD)
                whole_B, again_B, part_B = (refusal_logits(model, tree, h) for h in (whole_BLD, again_BQD, part_BQD))
                gaps = again_B - whole_B, part_B - whole_B[some]
                worst["window"] = max(worst["window"], *(float(gap.abs().max()) for gap in gaps))
            later_BLD, stream_BKD = blockwise.from_block(layer, (layer, "input"))
            assert torch.equal(stream_BKD, blockwise.input_of(layer))
            state_BKD = stream_BKD[some]
            both_VBKD = joined.from_state(layer, state_BKD, [{}, {(layer, "input"): lambda x: x + 1}])
            later_B, some_B = (refusal_logits(model, tree, h) for h in (later_BLD, both_VBKD[0]))
            gaps = later_B - logit_B, some_B - logit_B[some]
            worst["block"] = max(worst["block"], *(float(gap.abs().max()) for gap in gaps))
            assert not torch.allclose(both_VBKD[0], both_VBKD[1])
    record_property("measured", f"refusal logit, {kind}: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    assert {k: v for k, v in worst.items() if v > 2e-5} == {}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_hooked_decoder_equals_the_fused_one(kind: str, models: dict[str, Path]) -> None:
    model = adapted(models[kind], "lora")
    blocks = ModelPair.of(model).checkpoint.blocks
    ids = [model.chat.prompt_ids([{"role": "user", "content": t}]) for t in TEXTS]
    fused_TD = hidden_at_measured(model, Flat.of([[Sequence(i, 1)] for i in ids], CPU))
    batch = PromptBatch.of(ids, None, CPU)
    hidden_BLD, _ = Pass(model, blocks, batch).whole({(0, "attn"): lambda x: x})
    hooked_TD = torch.cat([h[batch.width - len(i) : -1] for h, i in zip(hidden_BLD, ids, strict=True)])
    torch.testing.assert_close(model.head.logits(fused_TD), model.head.logits(hooked_TD), rtol=1e-5, atol=1e-5)


def test_edits_outside_the_window_need_a_whole_pass(models: dict[str, Path]) -> None:
    """A direction ablated everywhere is not a window's edit: both passes must not be taken for each other."""
    model = load_model(str(models["llama"]), device="cpu", dtype="float32")
    context = tiny_context(ModelPair.of(model))
    side = context.pair.checkpoint
    _, batch = next(context.batches(context.prompts.of("test", "harmful")))
    unit_D = torch.nn.functional.normalize(torch.ones(model.lm.config.hidden_size), dim=0)
    run = context.run(side, batch, window=True)
    run.whole()
    edits = ablate_everywhere(side.blocks, unit_D)
    whole_BLD, kept = context.run(side, batch).whole(record={(1, "resid"): slice(None)}, everywhere=edits)
    assert float((kept[1, "resid"] @ unit_D).abs().max()) < 1e-5
    window = slice(batch.width - context.positions.window, None)
    assert not torch.allclose(run.again([edits])[0], whole_BLD[:, window], atol=1e-4)
    for own in (edits, {(0, "input"): addition(unit_D)}):  # the common start takes part
        edited_BLD, _ = context.run(side, batch).whole(everywhere=own)
        joined_BKD, _ = context.run(side, batch.joined()).whole(own)
        real_BL = batch.sees_BLK[:, batch.width - 1, batch.start :]
        torch.testing.assert_close(edited_BLD[real_BL], joined_BKD[:, batch.start :][real_BL], rtol=1e-4, atol=1e-5)
        rest_BLD, _ = context.run(side, batch).whole(own)
        assert not torch.allclose(rest_BLD[real_BL], edited_BLD[real_BL], atol=1e-4)


def test_openings_are_disjoint_paths_of_tokens() -> None:
    chat = Chat(tiny.tokenizer(tiny.PLAIN))
    tree = OpeningTree.of(chat, ("Sorry", "Sorry, I", "I cannot"))
    texts = {chat.decode([tree.steps[k][1] for k in path]) for path in tree.paths}
    assert texts == {"Sorry", "I cannot"}  # the second begins with the first
    assert tree.sees().shape == (len(tree.tokens), len(tree.tokens))
    assert len(tiny_prompts().of("test", "harmful")) == len(TEXTS)
    assert OpeningTree.of(chat, OPENINGS).hash != tree.hash


def test_a_tokenizer_without_the_openings_is_told_so() -> None:
    with pytest.raises(LeewayError, match="no refusal opening takes at most 4 of the model's tokens"):
        OpeningTree.of(Chat(tiny.tokenizer(tiny.PLAIN)), ("Incomprehensibilities",))
