"""Models of others on our operators: the same results, parameters and behaviour, and all of it can be undone."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd_kernels import layers
from mvd_kernels.patch import PatchError, patch_hf_videomae, patch_reference_vit, patch_timm_vit, unpatch

timm = pytest.importorskip("timm")
WIDTH, HEADS = 32, 2
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


# ---- stand-ins for the networks of the repositories: their attribute names and shapes ----


class RefAttention(nn.Module):
    def __init__(self, dropout: float, split: bool) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, (WIDTH // HEADS) ** -0.5
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=not split)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(WIDTH)) if split else None for _ in range(2))
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q * self.scale @ k.mT).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class RefMlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class RefBlock(nn.Module):
    def __init__(self, dropout: float = 0.0, gamma: bool = False, split: bool = True, post_norm: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = RefAttention(dropout, split), RefMlp()
        self.drop_path = nn.Dropout(0.1)  # draws as theirs do: in training only
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.randn(WIDTH)) if gamma else None for _ in range(2))
        self.post_norm = post_norm

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + self.mlp(x))
        first, second = (1 if one is None else one for one in (self.gamma_1, self.gamma_2))
        x = x + self.drop_path(first * self.attn(self.norm1(x)))
        return x + self.drop_path(second * self.mlp(self.norm2(x)))


class RefTubes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_size, self.tubelet_size = (16, 16), 2
        self.proj = nn.Conv3d(3, WIDTH, (2, 8, 8), stride=(2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class RefEncoder(nn.Module):
    def __init__(self, **block) -> None:
        super().__init__()
        self.patch_embed = RefTubes()
        self.pos_embed = torch.randn(1, 8, WIDTH)
        self.blocks = nn.ModuleList(RefBlock(**block) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Identity()

    def forward_features(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.pos_embed.type_as(x).detach()
        x = x[~mask].reshape(len(x), -1, WIDTH)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.forward_features(x, mask))


class RefDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([RefBlock()]), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class RefPretrainer(nn.Module):
    def __init__(self, **block) -> None:
        super().__init__()
        self.encoder, self.decoder = RefEncoder(**block), RefDecoder()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.decoder(self.encoder(x, mask))


# ---- the models ----

MASK = torch.tensor([[True, False, True, True, False, True, False, True], [True] * 4 + [False] * 3 + [True]])


def reference(**block) -> tuple[nn.Module, tuple]:
    return RefPretrainer(**block), (torch.randn(2, 3, 4, 16, 16), MASK)


def timm_vit(**changes) -> tuple[nn.Module, tuple]:
    settings = {"embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 5, "init_values": 0.5} | changes
    return timm.models.VisionTransformer(16, 8, **settings), (torch.randn(2, 3, 16, 16),)


def videomae(name: str, **changes) -> tuple[nn.Module, tuple]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 64}
    sizes |= {"image_size": 16, "patch_size": 8, "num_frames": 4, "num_labels": 5}
    sizes |= {f"decoder_{key}": value for key, value in sizes.items() if "hidden" in key or "heads" in key}
    config = transformers.VideoMAEConfig(**sizes | {"decoder_intermediate_size": 64} | changes)
    clip = torch.randn(2, 4, 3, 16, 16)
    masked = (MASK,) if name == "VideoMAEForPreTraining" else ()
    return getattr(transformers, name)(config), (clip, *masked)


Case = tuple[Callable[[], tuple[nn.Module, tuple]], Callable]
MODELS: dict[str, Case] = {
    "timm": (lambda: timm_vit(drop_path_rate=0.2), patch_timm_vit),
    "timm, plain": (lambda: timm_vit(init_values=None, qkv_bias=False, dynamic_img_size=True), patch_timm_vit),
    "timm, dropout": (lambda: timm_vit(attn_drop_rate=0.1, proj_drop_rate=0.1), patch_timm_vit),
    "reference": (reference, patch_reference_vit),
    "reference, gammas, one bias, dropout": (
        lambda: reference(gamma=True, split=False, dropout=0.1),
        patch_reference_vit,
    ),
    **{
        name: (lambda name=name: videomae(name), patch_hf_videomae)
        for name in ("VideoMAEModel", "VideoMAEForVideoClassification", "VideoMAEForPreTraining")
    },
}


def made(case: str) -> tuple[nn.Module, tuple, Callable]:
    torch.manual_seed(0)
    build, patch = MODELS[case]
    model, inputs = build()
    with torch.no_grad():  # else some biases and tokens are zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, inputs, patch


def run(model: nn.Module, inputs: tuple, autocast: bool = False) -> list[Tensor]:
    """Outputs and gradients of all parameters, with the same random numbers every time."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(*inputs)
    outputs = [output] if isinstance(output, Tensor) else [one for one in output.values() if isinstance(one, Tensor)]
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(2)
    weights = [torch.randn(one.shape).to(one.dtype) for one in outputs]
    return [*outputs, *torch.autograd.grad(outputs, used, weights)]


def assert_alike(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Norm of the error against that of the tensor; some gradients are zero but for rounding, as of the keys' bias."""
    assert len(actual) == len(expected)
    least = 1e-2 * max(one.double().norm().item() for one in expected)
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = (ours.double() - theirs.double()).norm().item() / max(theirs.double().norm().item(), least)
        assert error <= tolerance, f"result {number} is {error:.1e} off"


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
    """How often the operators were called."""
    counts: dict[str, int] = {}

    def count(module: str, name: str) -> None:
        operator = getattr(sys.modules[module], name)

        def counted(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return operator(*args, **kwargs)

        monkeypatch.setattr(sys.modules[module], name, counted)

    for family in ("timm", "reference", "hf_videomae"):
        count(f"mvd_kernels.patch.{family}", "attention")
        if family != "timm":
            count(f"mvd_kernels.patch.{family}", "embed_visible_tubes")
    count("mvd_kernels.patch._core", "add_layer_norm")
    return counts


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


def test_someone_who_watches_a_norm_sees_it() -> None:
    model, inputs, patch = made("timm")
    patch(model.eval())
    expected, seen = model(*inputs), []
    model.blocks[0].norm2.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(*inputs), expected)
    assert len(seen) == 1


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
