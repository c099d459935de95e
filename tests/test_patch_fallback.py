"""Patched models in other people's hands: hooks, replaced parts, other forwards. All as without the patch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from patch_models import (
    HEADS,
    TOLERANCE,
    WIDTH,
    RefAttention,
    assert_alike,
    count_calls,
    made,
    run,
    timm,
    twins,
    without_patch,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from mvd_kernels.patch import PatchError, unpatch

# The parts of a first block and of an embedding that a fused forward leaves out; the others are called, as ever.
LEFT_OUT = {
    "timm": ("blocks.0.attn.q_norm", "blocks.0.attn.attn_drop", "blocks.0.norm2"),
    "timm, not fused": ("blocks.0.attn.attn_drop",),
    "reference": ("encoder.blocks.0.attn.attn_drop", "encoder.blocks.0.norm2", "encoder.patch_embed.proj"),
    "reference, gammas, one bias, dropout": ("encoder.blocks.0.attn.qkv", "encoder.patch_embed"),
    "VideoMAEForPreTraining": ("videomae.encoder.layer.0.layernorm_after", "videomae.embeddings.patch_embeddings"),
}


# ---- what is done to a part ----


class Wrapped(nn.Module):
    """What PEFT's layers are: another class around the module, whose attributes it passes on."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name) if name == "base_layer" else getattr(self.base_layer, name)

    def forward(self, *args: object, **kwargs: object) -> object:
        return scaled(self.base_layer(*args, **kwargs))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def scaled(output: object) -> object:
    if isinstance(output, tuple):
        return (scaled(output[0]), *output[1:])
    return None if output is None else 1.5 * output


def replaced(model: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, make(model.get_submodule(name)))


def subclassed(part: nn.Module) -> nn.Module:
    """Of the same name, as CLIP's LayerNorm has."""
    kind = type(part)
    part.__class__ = type(
        kind.__name__, (kind,), {"forward": lambda self, *args, **kwargs: scaled(kind.forward(self, *args, **kwargs))}
    )
    return part


def with_forward(part: nn.Module) -> None:
    theirs = part.forward
    part.forward = lambda *args, **kwargs: scaled(theirs(*args, **kwargs))


def on_weight(change: Callable[[nn.Module], object]) -> Callable[[nn.Module, str], None]:
    """Of parts with a weight; others have nothing to change."""

    def apply(model: nn.Module, name: str) -> None:
        part = model.get_submodule(name)
        if isinstance(vars(part)["_parameters"].get("weight"), nn.Parameter):
            change(part)

    return apply


def on_part(change: Callable[[nn.Module], object]) -> Callable[[nn.Module, str], None]:
    return lambda model, name: change(model.get_submodule(name))


WAYS: dict[str, Callable[[nn.Module, str], None]] = {
    "forward hook": on_part(lambda part: part.register_forward_hook(lambda module, args, output: scaled(output))),
    "forward pre-hook": on_part(lambda part: part.register_forward_pre_hook(lambda module, args: scaled(args))),
    "backward hook": on_part(lambda part: part.register_full_backward_hook(lambda module, to, of: scaled(to))),
    "backward pre-hook": on_part(lambda part: part.register_full_backward_pre_hook(lambda module, of: scaled(of))),
    "wrapped": lambda model, name: replaced(model, name, Wrapped),
    "subclassed": lambda model, name: replaced(model, name, subclassed),
    "forward": on_part(with_forward),
    "parametrization": on_weight(lambda part: parametrize.register_parametrization(part, "weight", Doubled())),
    "pruning": on_weight(lambda part: prune.random_unstructured(part, "weight", 0.5)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", LEFT_OUT)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_what_is_done_to_a_part_has_its_effect(case, way) -> None:
    """One at a time to those that are left out, and to all others of the same block and embedding at once."""
    model, inputs, patch = made(case)
    patch(model.eval())
    places = [name.rsplit(".", 1)[0] for name in LEFT_OUT[case]]
    lists = [name for name, one in model.named_modules() if isinstance(one, nn.ModuleList)]
    called = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[0] in places and name not in (*LEFT_OUT[case], *lists)
    ]
    for names in (*([name] for name in LEFT_OUT[case]), called):
        ours, theirs = copy.deepcopy(model), without_patch(model)
        for one in (theirs, ours):
            torch.manual_seed(0)
            for name in names:
                WAYS[way](one, name)
        try:
            assert_alike(run(ours, inputs), run(theirs, inputs), TOLERANCE[torch.float32])
        except AssertionError as error:
            raise AssertionError(f"{way} of {name}: {error}") from error


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    return count_calls(monkeypatch)


# ---- a part's place taken by another ----


@pytest.mark.parametrize("case", ["timm", "reference", "VideoMAEModel"])
@pytest.mark.parametrize(
    "norm",
    [
        nn.Identity,
        lambda: nn.RMSNorm(WIDTH),
        lambda: nn.LayerNorm(WIDTH, eps=0.5),
        lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
        lambda: nn.LayerNorm(WIDTH, bias=False),
    ],
    ids=["Identity", "RMSNorm", "another", "no weight", "no bias"],
)
def test_a_norm_that_is_replaced_is_used(case, norm) -> None:
    ours, theirs, inputs, _ = twins(case)
    for model in (ours, theirs):
        torch.manual_seed(0)
        for name in [name for name, _ in model.named_modules()]:
            if name.endswith(("norm2", "layernorm_after")):
                replaced(model, name, lambda _: norm())
    assert_alike(run(ours, inputs), run(theirs, inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize("case", ["timm", "reference", "VideoMAEModel"])
def test_a_forward_that_all_norms_of_a_class_get_is_used(case, monkeypatch) -> None:
    ours, theirs, inputs, _ = twins(case)
    for kind in {type(one) for one in theirs.modules() if isinstance(one, nn.LayerNorm)}:
        monkeypatch.setattr(kind, "forward", lambda self, x, forward=kind.forward: scaled(forward(self, x)))
    assert_alike(run(ours, inputs), run(theirs, inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize("case", ["timm", "reference"])
def test_a_scale_that_is_set_counts_where_the_original_reads_it(case) -> None:
    """timm's fused attention does not: it hands no scale to torch."""
    ours, theirs, inputs, _ = twins(case)
    for model in (ours, theirs):
        for part in model.modules():
            if hasattr(part, "scale"):
                part.scale *= 2
    assert_alike(run(ours, inputs), run(theirs, inputs), TOLERANCE[torch.float32])


def test_patching_again_takes_what_is_there_now(calls) -> None:
    ours, _, inputs, patch = twins("timm")
    for block in ours.blocks:
        block.norm2 = nn.LayerNorm(WIDTH)  # of another class than timm's
    calls.clear()
    expected = ours(*inputs)
    assert calls == {"attention": 2}
    patch(ours)
    calls.clear()
    torch.testing.assert_close(ours(*inputs), expected)
    assert calls == {"attention": 2, "add_layer_norm": 2}


def test_dropout_that_is_active_in_evaluation() -> None:
    """Monte Carlo dropout: only the dropouts are in training mode."""
    ours, theirs, inputs, _ = twins("reference, gammas, one bias, dropout")
    for model in (ours, theirs):
        for one in model.modules():
            one.training = isinstance(one, nn.Dropout)
    assert_alike(run(ours, inputs), run(theirs, inputs), TOLERANCE[torch.float32])


def test_a_hook_that_is_gone_leaves_no_trace(calls) -> None:
    ours, _, inputs, _ = twins("timm")
    handles = [block.norm2.register_forward_hook(lambda *_: None) for block in ours.blocks]
    calls.clear()
    ours(*inputs)
    assert calls == {"attention": 2}
    for handle in handles:
        handle.remove()
    ours(*inputs)
    assert calls == {"attention": 4, "add_layer_norm": 2}


def test_hooks_on_all_modules_see_all_that_the_original_calls() -> None:
    ours, theirs, inputs, _ = twins("timm")
    seen = []
    for model in (ours, theirs):
        with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__)):
            model(*inputs)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] and seen.count("LayerNorm") == 2 * 5
    counts = []
    for model in (ours, theirs):
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
        counts.append(counter.get_flop_counts())
    assert counts[0] == counts[1]


# ---- the attention weights, however they are read ----


@pytest.mark.parametrize("method", ["fx", "hook"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_attention_extract_of_timm(method, late) -> None:
    """Where attention is not fused, as it must not be for this, said before patching or after it."""
    model, inputs, patch = made("timm" if late else "timm, not fused")
    report = patch(model.eval())
    notes = {row.note for row in report.left if row.part == "attention"}
    assert notes == (set() if late else {"its fused_attn is False, which asks for the attention weights"})
    for block in model.blocks:
        block.attn.fused_attn = False
    theirs = timm.utils.AttentionExtract(without_patch(model), method=method)(*inputs)
    ours = timm.utils.AttentionExtract(model, method=method)(*inputs)
    assert len(ours) == 2 and list(ours) == list(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_attention_weights_by_a_hook_on_their_dropout(late) -> None:
    model, inputs, patch = made("reference")
    if late:
        patch(model.eval())
    seen = []
    attn = model.encoder.blocks[0].attn
    attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    report = patch(model.eval())
    left = [(row.name, row.note) for row in report.left if row.part == "attention"]
    assert left == [("encoder.blocks.0.attn", "attn_drop has a hook, which only a call of it runs")]
    seen.clear()
    model(*inputs)
    assert len(seen) == 1 and seen[0].shape == (2, HEADS, 3, 3)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_attention_weights_by_a_forward_in_the_place_of_the_class(late, monkeypatch) -> None:
    """As notebooks do it: the class gets a forward that computes the same and stores the weights beside."""
    model, inputs, patch = made("reference")
    theirs = RefAttention.forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        q, k, _ = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        self.weights = (q @ k.mT * self.scale).softmax(-1)
        return theirs(self, x)

    if late:
        patch(model.eval())
    monkeypatch.setattr(RefAttention, "forward", forward)
    report = patch(model.eval()) if not late else None
    model(*inputs)
    assert all(block.attn.weights.shape == (2, HEADS, 3, 3) for block in model.encoder.blocks)
    assert late or {row.note for row in report.left if row.part == "attention"} == {
        "its forward has been replaced by someone else"
    }


def test_attention_that_stores_its_weights_is_left() -> None:
    class Storing(RefAttention):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return super().forward(x)

    model, inputs, patch = made("reference")
    attn = model.encoder.blocks[0].attn
    attn.__class__ = Storing
    report = patch(model.eval())
    left = [(row.name, row.note) for row in report.left if row.part == "attention"]
    assert left == [("encoder.blocks.0.attn", "its forward stores seen, which a fused one does not compute")]
    model(*inputs)
    assert attn.seen.shape == (2, 3, WIDTH)


@pytest.mark.parametrize("implementation", ["eager", "own"])
def test_attention_implementations_of_hugging_face(implementation) -> None:
    """`eager` gives the weights to whoever calls the module; another one may be the user's."""
    interfaces = pytest.importorskip("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    model, inputs, patch = made("VideoMAEModel")
    patch(model.eval())
    expected = model(*inputs)[0]
    attn, used = model.encoder.layer[0].attention.attention, []

    def own(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        used.append(module)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), q @ k.mT

    interfaces.register("own", own)
    model.config._attn_implementation = implementation
    torch.testing.assert_close(model(*inputs)[0], expected)
    assert len(used) == (2 if implementation == "own" else 0)
    assert attn(torch.randn(1, 3, WIDTH))[1].shape == (1, HEADS, 3, 3)
    notes = {row.note for row in patch(model).left if row.part == "attention"}
    assert notes == {f"its attention implementation is {implementation!r}, not 'sdpa'"}


# ---- adapters ----


class LowRank(nn.Linear):
    """A Linear with an addition that is zero at first, as loralib's: no probe can see it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.down, self.up = nn.Linear(self.in_features, 2, bias=False), nn.Linear(2, self.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("case", ["timm", "reference, gammas, one bias, dropout"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_low_rank_adaptation_of_the_projection(case, late) -> None:
    model, inputs, patch = made(case)
    if late:
        patch(model.eval())
    called = [
        f"{name}.qkv"
        for name, one in model.named_modules()
        if hasattr(one, "qkv") and getattr(one, "q_bias", None) is None
    ]
    for name in called:
        replaced(model, name, lambda qkv: LowRank(WIDTH, 3 * WIDTH))
    if not late:
        report = patch(model.eval())
        left = {row.note for row in report.left if row.part == "attention"}
        assert left == (set() if case == "timm" else {"its qkv is LowRank of test_patch_fallback, not a plain Linear"})
    with torch.no_grad():
        for one in model.modules():
            if isinstance(one, LowRank):
                one.up.weight.normal_()
    assert_alike(run(model, inputs), run(without_patch(model), inputs), TOLERANCE[torch.float32])


# ---- other classes ----


def test_a_class_derived_from_a_patched_one_is_not_taken_away() -> None:
    model, inputs, patch = made("timm")
    patch(model.eval())
    block = model.blocks[0]
    derived = type("Derived", (type(block),), {})
    block.__class__ = derived
    expected = model(*inputs)
    torch.testing.assert_close(copy.deepcopy(model)(*inputs), expected)
    with pytest.raises(PatchError, match=r"^blocks\.0 cannot be unpatched: it got another class .* undo that first$"):
        unpatch(model)
    assert type(block) is derived and [row.name for row in patch(model).left] == ["blocks.0", "patch_embed"]
    block.__class__ = derived.__bases__[0]
    assert type(unpatch(model).blocks[0]) is timm.models.vision_transformer.Block
