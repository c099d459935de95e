"""Small models of the families that `mvd_kernels.patch` knows, and what their outputs and gradients are held with."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd_kernels.patch import patch_hf_videomae, patch_reference_vit, patch_timm_vit, unpatch

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
        if self.q_bias is None:  # MAE
            qkv = self.qkv(x)
        else:  # MVD and VideoMAE
            qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias]))
        q, k, v = qkv.view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
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


def without_fused_attention() -> tuple[nn.Module, tuple]:
    """What `timm.layers.set_fused_attn(False)` gives: the way to get at timm's attention weights."""
    model, inputs = timm_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    return model, inputs


Case = tuple[Callable[[], tuple[nn.Module, tuple]], Callable]
MODELS: dict[str, Case] = {
    "timm": (lambda: timm_vit(drop_path_rate=0.2), patch_timm_vit),
    "timm, plain": (lambda: timm_vit(init_values=None, qkv_bias=False, dynamic_img_size=True), patch_timm_vit),
    "timm, dropout": (lambda: timm_vit(attn_drop_rate=0.1, proj_drop_rate=0.1), patch_timm_vit),
    "timm, not fused": (without_fused_attention, patch_timm_vit),
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


def without_patch(model: nn.Module) -> nn.Module:
    return unpatch(copy.deepcopy(model))


def twins(case: str) -> tuple[nn.Module, nn.Module, tuple, Callable]:
    """A patched model and the same without."""
    model, inputs, patch = made(case)
    patch(model.eval())
    return model, without_patch(model), inputs, patch


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


def count_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the operators are called from now on."""
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


def assert_alike(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Norm of the error against that of the tensor; some gradients are zero but for rounding, as of the keys' bias."""
    assert len(actual) == len(expected)
    least = 1e-2 * max(one.double().norm().item() for one in expected)
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = (ours.double() - theirs.double()).norm().item() / max(theirs.double().norm().item(), least)
        assert error <= tolerance, f"result {number} is {error:.1e} off"
