"""Models of others on our operators: the same results, parameters and behaviour, and all of it can be undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from patch_models import MODELS, TOLERANCE, assert_alike, count_calls, made, reference, run, timm, timm_vit, videomae
from torch import nn

from mvd_kernels import layers
from mvd_kernels.patch import PatchError, patch_hf_videomae, patch_reference_vit, patch_timm_vit, unpatch


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("case", MODELS)
def test_results_and_gradients_are_the_same(case, precision, training) -> None:
    model, inputs, patch = made(case)
    model.train(training)
    if precision == "bf16":
        model, inputs = model.bfloat16(), tuple(one.bfloat16() if one.is_floating_point() else one for one in inputs)
    expected = run(model, inputs, precision == "autocast")
    state = torch.get_rng_state()
    patch(model)
    assert torch.equal(torch.get_rng_state(), state), "patching draws random numbers"
    actual = run(model, inputs, precision == "autocast")
    tolerance = TOLERANCE[torch.float32 if precision == "fp32" else torch.bfloat16]
    assert_alike(actual, expected, tolerance)


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    return count_calls(monkeypatch)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("timm", {"attention": 2, "add_layer_norm": 2}),
        ("timm, dropout", {"add_layer_norm": 2}),
        ("reference", {"attention": 3, "add_layer_norm": 3, "embed_visible_tubes": 1}),
        ("VideoMAEModel", {"attention": 2, "add_layer_norm": 2}),
        ("VideoMAEForPreTraining", {"attention": 4, "add_layer_norm": 4, "embed_visible_tubes": 1}),
    ],
)
def test_the_operators_run(case, expected, calls) -> None:
    model, inputs, patch = made(case)
    patch(model)
    calls.clear()
    model.train()(*inputs)
    assert calls == expected
    unpatch(model)
    calls.clear()
    model(*inputs)
    assert calls == {}


@pytest.mark.parametrize("case", MODELS)
def test_parameters_stay_and_the_patch_can_be_undone(case) -> None:
    model, inputs, patch = made(case)
    model.eval()
    classes = [type(module) for module in model.modules()]
    state, modes = model.state_dict(keep_vars=True), [module.training for module in model.modules()]
    expected = run(model, inputs)
    report = patch(model)
    patched = [type(module) for module in model.modules()]
    assert patched != classes and all(issubclass(a, b) for a, b in zip(patched, classes, strict=True))
    assert [one.__name__ for one in patched] == [one.__name__ for one in classes]
    assert patch(model).rows == report.rows and [type(module) for module in model.modules()] == patched
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[key] is state[key] for key in state)
    assert unpatch(model) is model and [type(module) for module in model.modules()] == classes
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), expected, strict=True))
    assert all(vars(module).get("forward") is None for module in model.modules())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_and_separate(duplicate, calls) -> None:
    model, inputs, patch = made("timm")
    patch(model.eval())
    twin = duplicate(model)
    expected = model(*inputs)
    calls.clear()
    assert torch.equal(twin(*inputs), expected) and calls == {"attention": 2, "add_layer_norm": 2}
    with torch.no_grad():
        twin.blocks[0].attn.proj.weight.zero_()
    assert torch.equal(model(*inputs), expected) and not torch.equal(twin(*inputs), expected)
    unpatch(twin)
    assert type(twin.blocks[0]) is timm.models.vision_transformer.Block is not type(model.blocks[0])


@pytest.mark.parametrize("case", ["timm", "VideoMAEForPreTraining", "reference"])
def test_activation_checkpointing(case) -> None:
    model, inputs, patch = made(case)
    model.train()
    patch(model)
    expected = run(model, inputs)
    if case == "timm":
        model.set_grad_checkpointing()
    elif case == "reference":
        model.encoder.use_checkpoint = True
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_alike(run(model, inputs), expected, 1e-6)


def test_what_the_operators_do_not_do_runs_the_original(calls) -> None:
    model, (image,), patch = made("timm")
    patch(model.eval())
    x, mask = model.patch_embed(image), torch.rand(4, 4) > 0.3
    mask.fill_diagonal_(True)
    calls.clear()
    for arguments in ({"attn_mask": mask}, {"is_causal": True}):
        expected = unpatch(copy.deepcopy(model)).blocks[0](x, **arguments)
        torch.testing.assert_close(model.blocks[0](x, **arguments), expected)
    assert "attention" not in calls


def test_attentions_and_hidden_states_of_hugging_face(calls) -> None:
    torch.manual_seed(0)
    model, (clip,) = videomae("VideoMAEModel", attn_implementation="eager")
    model.eval()
    expected = model(clip, output_attentions=True, output_hidden_states=True)
    patch_hf_videomae(model)
    calls.clear()
    actual = model(clip, output_attentions=True, output_hidden_states=True)
    assert len(actual.attentions) == 2 and len(actual.hidden_states) == 3 and "attention" not in calls
    for name in ("attentions", "hidden_states"):
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_masks_that_do_not_fit_go_to_the_original(calls) -> None:
    model, (clip, mask), patch = made("VideoMAEForPreTraining")
    patch(model.eval())
    calls.clear()
    embeddings = model.videomae.embeddings
    ragged = mask.clone()
    ragged[0, 1], ragged[1, 0] = True, False  # 2 and 4 visible
    assert torch.equal(embeddings(clip, ragged), unpatch(copy.deepcopy(embeddings))(clip, ragged))
    with pytest.raises(ValueError, match="Input image size"):
        embeddings(clip[..., :8], mask)
    with pytest.raises(IndexError):
        embeddings(clip, mask[:, :7])
    assert "embed_visible_tubes" not in calls


# ---- the report ----


def reasons(report) -> set[tuple[str, str]]:
    return {(row.part, row.note) for row in report.left}


def test_the_report_says_what_and_why() -> None:
    model, _, patch = made("timm, dropout")
    report = patch(model)
    assert [(row.name, row.part) for row in report.swapped] == [
        (name, part)
        for block in (0, 1)
        for name, part in ((f"blocks.{block}.attn", "attention"), (f"blocks.{block}", "add + LayerNorm"))
    ]
    assert report.swapped[0].note == "attention dropout 0.1 is active in training, which runs the original"
    lines = str(report).splitlines()
    assert lines[0] == "VisionTransformer: 4 swapped, 1 left" and len(lines) == 4
    assert lines[1].split()[:5] == ["blocks.*.attn", "2x", "attention", "->", "fused:"]


@pytest.mark.parametrize(
    ("changes", "part", "sentence"),
    [
        ({"qk_norm": True}, "attention", "it has q_norm: LayerNorm"),
        ({"num_heads": 4}, "attention", "head width 8 is not a multiple of 16 up to 128"),
        ({"norm_layer": timm.layers.RmsNorm}, "add + LayerNorm", "its second norm is RmsNorm"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "add + LayerNorm", "it has no ls1"),
    ],
)
def test_what_is_left_in_timm(changes, part, sentence) -> None:
    torch.manual_seed(0)
    model, inputs = timm_vit(**changes)
    expected = model.eval()(*inputs)
    report = patch_timm_vit(model)
    assert any(kind == part and sentence in note for kind, note in reasons(report)), str(report)
    torch.testing.assert_close(model(*inputs), expected)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_other_vits_of_timm_are_left(name) -> None:
    with torch.device("meta"):
        report = patch_timm_vit(timm.create_model(name, depth=1) if "eva" in name else timm.models.Beit(depth=1))
    assert not report.swapped and {row.part for row in report.left} == {"attention", "add + LayerNorm", "embedding"}


def test_other_arithmetic_under_the_same_names_is_left() -> None:
    torch.manual_seed(0)
    model, inputs = reference(post_norm=True)
    expected = model.eval()(*inputs)
    report = patch_reference_vit(model)
    notes = {row.note for row in report.left if row.part == "add + LayerNorm" and row.name.startswith("encoder")}
    assert len(notes) == 1 and "it computes something else than its names promise" in notes.pop()
    torch.testing.assert_close(model(*inputs), expected)
    assert any(row.part == "head + loss" and "linear_smooth_l1" in row.note for row in report.left)


@pytest.mark.parametrize("patch", [patch_timm_vit, patch_hf_videomae, patch_reference_vit])
def test_models_that_are_not_known(patch) -> None:
    with pytest.raises(PatchError, match=r"^Sequential has no .*Nothing was changed\.$"):
        patch(nn.Sequential(nn.Linear(3, 3)))


def test_layers_have_a_forward_and_nothing_else() -> None:
    """What Hugging Face's kernelize asks of a layer; bound as it does, they compute the same."""
    for name in layers.__all__:
        own = {key for key in vars(getattr(layers, name)) if not key.startswith("__")}
        assert own == {"forward"}, name
    model, inputs, _ = made("timm, dropout")
    expected = run(model.eval(), inputs)
    for block in model.blocks:
        block.forward = layers.TimmBlock.forward.__get__(block)
        block.attn.forward = layers.TimmAttention.forward.__get__(block.attn)
    assert_alike(run(model, inputs), expected, TOLERANCE[torch.float32])
    run(model.train(), inputs)  # dropout: the original, found from the class


def test_torch_compile() -> None:
    model, inputs, patch = made("timm")
    patch(model.eval())
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs), model(*inputs))
