"""Embedding of visible tubes: every implementation against the plain one in fp64, its gradients, layouts and errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_checks import CUDA, IMPLEMENTATIONS, LANGUAGES, assert_close, pairwise, running
from torch import Tensor, nn

from mvd_kernels import embed_visible_tubes, use_impl
from mvd_kernels.embed_visible_tubes import _reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = [torch.float32, torch.bfloat16]


def make_video(kind: str, size: tuple[int, int, int, int], device: str) -> Tensor:
    """A clip of `size` (B, T, H, W): "bytes", "float32" or "bfloat16"."""
    batch, frames, height, width = size
    if kind == "bytes":
        return torch.randint(256, (batch, frames, height, width, 3), dtype=torch.uint8).to(device)
    return torch.randn(batch, 3, frames, height, width).to(getattr(torch, kind)).to(device)


def make_index(batch: int, tokens: int, visible: int, device: str) -> Tensor:
    return torch.stack([torch.randperm(tokens)[:visible].sort().values for _ in range(batch)] or [torch.empty(0)]).to(
        device, torch.int64
    )[:batch]


def make_arguments(
    device: str,
    dtype: torch.dtype,
    kind: str = "bytes",
    size: tuple[int, int, int, int] = (2, 4, 8, 12),
    tube: tuple[int, int] = (2, 4),
    visible: int = 3,
    width: int = 13,
    pos_shape: str = "1NC",
) -> dict[str, Tensor | tuple[float, ...] | None]:
    torch.manual_seed(0)
    t, p = tube
    tokens = size[1] // t * (size[2] // p) * (size[3] // p)
    shape = {"NC": (tokens, width), "1NC": (1, tokens, width), "BNC": (size[0], tokens, width)}.get(pos_shape)
    arguments = {
        "video": make_video(kind, size, device),
        "weight": (torch.randn(width, 3, t, p, p) / (3 * t * p * p) ** 0.5).to(dtype).to(device),
        "bias": torch.randn(width).to(dtype).to(device),
        "pos": torch.randn(shape).to(dtype).to(device) if shape else None,
        "visible_index": make_index(size[0], tokens, visible, device),
    }
    return arguments | ({"mean": MEAN, "std": STD} if kind == "bytes" else {})


def in_fp64(arguments: dict) -> dict:
    return {
        name: one.detach().double() if isinstance(one, Tensor) and one.is_floating_point() else one
        for name, one in arguments.items()
    }


def differentiate(
    function: Callable[..., Tensor], arguments: dict, wanted: tuple[str, ...], grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    arguments = dict(arguments)
    for name in wanted:
        arguments[name] = arguments[name].detach().requires_grad_()
    out = function(**arguments)
    found = torch.autograd.grad(out, [arguments[name] for name in wanted], grad.to(out.dtype))
    return out, dict(zip(wanted, found, strict=True))


def check(arguments: dict, function: Callable[..., Tensor] = embed_visible_tubes) -> None:
    """Output and all gradients against the reference in fp64."""
    wanted = tuple(name for name, one in arguments.items() if isinstance(one, Tensor) and one.is_floating_point())
    weight, index = arguments["weight"], arguments["visible_index"]
    grad = torch.randn(*index.shape, len(weight), device=weight.device).to(weight.dtype)
    out, found = differentiate(function, arguments, wanted, grad)
    with use_impl("reference"):
        expected, oracles = differentiate(embed_visible_tubes, in_fp64(arguments), wanted, grad)
    assert out.dtype == weight.dtype
    assert_close(out, expected, weight[0].numel(), roundings=3, name="output")
    for name in wanted:
        assert found[name].dtype == arguments[name].dtype
        got, want = found[name], oracles[name]
        if name == "weight":
            got, want = got.flatten(1), want.flatten(1)
        length = {"video": len(weight), "weight": index.numel(), "bias": index.numel(), "pos": len(index)}[name]
        if name == "video":
            # Rows of few pixels: errors stand against the clip's largest. The product is in the weight's dtype.
            got, want = got.to(weight.dtype if got.dtype == torch.float32 else got.dtype).flatten(), want.flatten()
        assert_close(got, want, length, roundings=3, name=name)


# ---- what it means ----


def test_is_a_convolution_followed_by_a_gather():
    torch.manual_seed(0)
    arguments = make_arguments("cpu", torch.float64, size=(2, 4, 8, 12))
    pixels = (arguments["video"].double() / 255 - torch.tensor(MEAN, dtype=torch.float64)) / torch.tensor(
        STD, dtype=torch.float64
    )
    every = (
        nn.functional.conv3d(pixels.permute(0, 4, 1, 2, 3), arguments["weight"], arguments["bias"], stride=(2, 4, 4))
        .flatten(2)
        .transpose(1, 2)
        + arguments["pos"]
    )
    index = arguments["visible_index"][:, :, None].expand(-1, -1, 13)
    torch.testing.assert_close(embed_visible_tubes(**arguments), every.gather(1, index))
    torch.testing.assert_close(embed_visible_tubes(**arguments | {"visible_index": None}), every)


def test_gradcheck_of_the_reference():
    arguments = make_arguments("cpu", torch.float64, "float64", size=(1, 2, 4, 4), tube=(2, 2), visible=2, width=3)
    names = ("video", "weight", "bias", "pos")
    inputs = [arguments[name].requires_grad_() for name in names]
    rest = (arguments["visible_index"], (), ())
    assert torch.autograd.gradcheck(lambda *values: _reference(*values, *rest), inputs)


# ---- all implementations ----


@pairwise(kernels=IMPLEMENTATIONS, dtype=DTYPES, kind=["bytes", "float32", "bfloat16"])
def test_forward_and_backward(kernels, dtype, kind):
    check(make_arguments(kernels, dtype, kind))


SIZES = [
    {"size": (1, 2, 4, 4), "visible": 1},  # one token of one
    {"size": (3, 2, 8, 28), "visible": 7, "width": 17, "pos_shape": "BNC"},
    {"size": (2, 1, 14, 28), "tube": (1, 14), "visible": 2, "pos_shape": "NC"},  # images, patches of 14
    {"size": (1, 2, 16, 32), "tube": (2, 16), "visible": 2, "width": 40, "pos_shape": "none"},
    {"size": (1, 1, 18, 18), "tube": (1, 18), "visible": 1},  # more than sixteen pixels, and not twice that
    {"size": (2, 3, 6, 6), "tube": (3, 3), "visible": 4, "width": 1},
]


@pairwise(kernels=IMPLEMENTATIONS, dtype=DTYPES, kind=["bytes", "float32"], change=SIZES)
def test_sizes(kernels, dtype, kind, change):
    check(make_arguments(kernels, dtype, kind, **change))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bytes", "float16"])
def test_half_precision_of_triton(kind):
    with use_impl("triton"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        check(make_arguments(device, torch.float16, kind))


def test_without_bias_and_positions(language):
    check(make_arguments(language, torch.float32) | {"bias": None, "pos": None})
    check(make_arguments(language, torch.bfloat16) | {"bias": None, "pos": None})


def test_positions_in_fp32_beside_bf16_weights(language):
    arguments = make_arguments(language, torch.bfloat16)
    check(arguments | {"pos": arguments["pos"].float() + 1e-4, "bias": arguments["bias"].float()})


def test_bytes_by_default_are_divided_by_255_only(language):
    arguments = make_arguments(language, torch.float32) | {"mean": None, "std": None}
    check(arguments)
    floats = arguments["video"].permute(0, 4, 1, 2, 3).float() / 255
    out = embed_visible_tubes(**arguments)
    assert_close(embed_visible_tubes(**arguments | {"video": floats}), out.double(), 96, name="float clip")
    shifted = embed_visible_tubes(**arguments | {"mean": MEAN, "std": None})
    same = embed_visible_tubes(
        **arguments | {"video": floats - torch.tensor(MEAN, device=language)[:, None, None, None]}
    )
    assert_close(shifted, same.double(), 96, name="mean alone")


@pytest.mark.parametrize("layout", ["crop", "planes", "flipped order of frames and rows"])
def test_bytes_of_any_layout(kernels, layout):
    arguments = make_arguments(kernels, torch.float32)
    video = arguments["video"]
    if layout == "crop":
        larger = torch.randint(256, (2, 6, 11, 17, 3), dtype=torch.uint8, device=kernels)
        arguments["video"] = larger[:, 1:5, 2:10, 3:15]
    elif layout == "planes":
        arguments["video"] = video.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    else:
        arguments["video"] = video.transpose(1, 2).contiguous().transpose(1, 2)
    assert not arguments["video"].is_contiguous()
    out = embed_visible_tubes(**arguments)
    again = embed_visible_tubes(**arguments | {"video": arguments["video"].contiguous()})
    assert torch.equal(out, again)
    check(arguments)


@pytest.mark.parametrize("layout", ["crop", "channels last", "frames first"])
def test_floats_of_any_layout(kernels, layout):
    arguments = make_arguments(kernels, torch.float32, "float32")
    video = arguments["video"]
    if layout == "crop":
        arguments["video"] = torch.randn(2, 3, 6, 11, 17, device=kernels)[:, :, 1:5, 2:10, 3:15]
    elif layout == "channels last":
        arguments["video"] = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    else:
        arguments["video"] = video.transpose(1, 2).contiguous().transpose(1, 2)
    assert not arguments["video"].is_contiguous()
    check(arguments)


def test_offsets_beyond_32_bits():
    """Channels so far apart that the third begins beyond 2^31 bytes; nothing else of that memory is touched."""
    apart, shape = 2**30 + 512, (1, 2, 16, 16, 3)
    device = "cuda" if CUDA else "cpu"
    memory = torch.empty(3 * apart, dtype=torch.uint8, device=device)
    video = memory.as_strided(shape, (512, 256, 16, 1, apart)).copy_(torch.randint(256, shape, dtype=torch.uint8))
    weight = torch.randn(16, 3, 2, 16, 16, device=device)
    with use_impl("triton"):
        out, again = embed_visible_tubes(video, weight), embed_visible_tubes(video.contiguous(), weight)
    assert torch.equal(out, again)


def test_strided_weights_positions_and_indices(language):
    arguments = make_arguments(language, torch.float32)
    weight = arguments["weight"].flip(0).permute(2, 3, 4, 0, 1).contiguous().permute(3, 4, 0, 1, 2)
    pos = arguments["pos"].transpose(1, 2).contiguous().transpose(1, 2)
    index = arguments["visible_index"].t().contiguous().t()
    check(
        arguments
        | {"weight": weight, "pos": pos, "visible_index": index, "bias": torch.randn(26, device=language)[::2]}
    )


@pairwise(implementation=LANGUAGES, kind=["bytes", "float32"], empty=["batch", "tokens"])
def test_nothing_to_embed(implementation, kind, empty):
    size = (0, 4, 8, 12) if empty == "batch" else (2, 4, 8, 12)
    with running(implementation) as device:
        arguments = make_arguments(device, torch.float32, kind, size=size, visible=3 if empty == "batch" else 0)
        wanted = tuple(name for name in ("video", "weight", "bias", "pos") if arguments[name].is_floating_point())
        shape = (*arguments["visible_index"].shape, 13)
        out, found = differentiate(embed_visible_tubes, arguments, wanted, torch.zeros(shape, device=device))
    assert tuple(out.shape) == shape
    for name, gradient in found.items():
        assert gradient.shape == arguments[name].shape
        assert not gradient.any(), name


def test_a_token_that_is_there_twice(kernels):
    arguments = make_arguments(kernels, torch.float32, "float32")
    arguments["visible_index"] = torch.tensor([[5, 5, 0], [5, 1, 5]], device=kernels)
    check(arguments)


@pytest.mark.parametrize("value", [1e4, 1e-41, float("nan"), float("inf")])
def test_extreme_pixels_stay_in_their_tokens(kernels, value):
    arguments = make_arguments(kernels, torch.float32, "float32")
    index = torch.tensor([[0, 1, 4], [1, 2, 3]], device=kernels)
    arguments |= {"visible_index": index, "bias": None, "pos": None}
    arguments["video"][0, 1, 1, 3, 5] = value  # clip 0, first tubes: row 0, column 1, so token 1
    out = embed_visible_tubes(**arguments)
    if value in (1e4, 1e-41):
        check(arguments)
    else:
        wrong = ~out.isfinite().all(2)
        assert wrong.tolist() == [[False, True, False], [False, False, False]]
        assert not out[0, 1].isfinite().any()


def test_nan_of_weights_and_positions_stays_in_its_place(kernels):
    arguments = make_arguments(kernels, torch.float32)
    arguments["weight"][3, 0, 0, 0, 0] = float("nan")
    token = int(arguments["visible_index"][1, 2])
    arguments["pos"][0, token] = float("nan")
    out = embed_visible_tubes(**arguments)
    want = torch.zeros_like(out, dtype=torch.bool)
    want[..., 3] = True
    want[arguments["visible_index"] == token] = True
    assert torch.equal(out.isnan(), want)


@pytest.mark.parametrize("wanted", [("video",), ("weight",), ("bias",), ("pos",), ("video", "pos"), ("weight", "bias")])
def test_gradients_that_are_not_needed_are_not_computed(language, wanted):
    arguments = make_arguments(language, torch.float32, "float32")
    every = ("video", "weight", "bias", "pos")
    grad = torch.randn(2, 3, 13, device=language)
    _, all_gradients = differentiate(embed_visible_tubes, arguments, every, grad)
    _, some = differentiate(embed_visible_tubes, arguments, wanted, grad)
    for name in wanted:
        assert torch.equal(some[name], all_gradients[name]), name
    operator = torch.ops.mvd_kernels.embed_visible_tubes_backward
    needed = [name in wanted for name in every]
    found = operator(grad, arguments["video"], arguments["weight"], arguments["visible_index"], [], [], needed, 1)
    assert len(found) == len(wanted)


def test_results_are_the_same_bits_every_time(kernels):
    arguments = make_arguments(kernels, torch.bfloat16, "float32", visible=9)
    arguments["visible_index"][1, :4] = 2
    grad = torch.randn(2, 9, 13, device=kernels)
    wanted = ("video", "weight", "bias", "pos")
    first, gradients = differentiate(embed_visible_tubes, arguments, wanted, grad)
    second, again = differentiate(embed_visible_tubes, arguments, wanted, grad)
    assert torch.equal(first, second)
    for name in wanted:
        assert torch.equal(gradients[name], again[name]), name


def test_autocast(language):
    arguments = make_arguments(language, torch.float32)
    wanted, grad = ("weight", "bias", "pos"), torch.randn(2, 3, 13, device=language)
    with torch.autocast(language, torch.bfloat16):
        out, found = differentiate(embed_visible_tubes, arguments, wanted, grad)
    arguments["weight"] = arguments["weight"].bfloat16()
    expected, gradients = differentiate(embed_visible_tubes, arguments, wanted, grad)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    for name in wanted:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], gradients[name].float()), name


def test_no_graph_without_gradients(language):
    arguments = make_arguments(language, torch.float32)
    arguments["weight"].requires_grad_()
    with torch.no_grad():
        assert embed_visible_tubes(**arguments).grad_fn is None


def test_other_dtypes_of_clips_and_positions_are_cast():
    arguments = make_arguments("cpu", torch.float32, "float64")
    check(arguments)
    check(arguments | {"pos": arguments["pos"].double()})


# ---- torch ----


@pytest.mark.parametrize("kind", ["bytes", "float32"])
def test_opcheck(language, kind):
    arguments = make_arguments(language, torch.float32, kind)
    for name in ("video", "weight", "bias", "pos"):
        if arguments[name].is_floating_point():
            arguments[name].requires_grad_()
    mean, std = (list(MEAN), list(STD)) if kind == "bytes" else ([], [])
    tensors = tuple(arguments[name] for name in ("video", "weight", "bias", "pos", "visible_index"))
    torch.library.opcheck(torch.ops.mvd_kernels.embed_visible_tubes.default, (*tensors, mean, std))


def test_compiles_into_one_graph():
    arguments = make_arguments("cpu", torch.float32, "float32")
    compiled = torch.compile(embed_visible_tubes, fullgraph=True)
    check(arguments, compiled)
    check(make_arguments("cpu", torch.float32, visible=5), compiled)


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"video": torch.zeros(2, 4, 8, 12, 3, dtype=torch.int32)}, r"video is torch.int32 \[2, 4, 8, 12, 3\] on cpu"),
        ({"video": torch.zeros(2, 3, 4, 8, 12, dtype=torch.uint8)}, r"must be \[B, T, H, W, 3\] on cpu"),
        ({"video": torch.zeros(2, 4, 8, 12, 3)}, r"video is torch.float32 .*must be \[B, 3, T, H, W\] on cpu"),
        ({"video": torch.zeros(2, 4, 8, 3, dtype=torch.uint8)}, r"video is torch.uint8 \[2, 4, 8, 3\]"),
        ({"video": torch.zeros(2, 5, 8, 12, 3, dtype=torch.uint8)}, "frames 5, which is not a multiple of .* 2"),
        ({"video": torch.zeros(2, 4, 9, 12, 3, dtype=torch.uint8)}, "height 9, which is not a multiple of .* 4"),
        ({"video": torch.zeros(2, 4, 8, 10, 3, dtype=torch.uint8)}, "width 10, which is not a multiple of .* 4"),
        ({"video": torch.zeros(2, 3, 4, 8, 12)}, "mean and std are for uint8 clips; this one is torch.float32"),
        ({"weight": torch.zeros(13, 96)}, r"weight is torch.float32 \[13, 96\] .*\[D, 3, t, p, p\]"),
        ({"weight": torch.zeros(13, 3, 2, 4, 2)}, r"weight is torch.float32 \[13, 3, 2, 4, 2\]"),
        ({"weight": torch.zeros(13, 3, 2, 4, 4, device="meta")}, "video is torch.uint8 .* on meta"),
        ({"bias": torch.zeros(12)}, r"bias is torch.float32 \[12\] on cpu; it must be floating point \[13\] on cpu"),
        (
            {"pos": torch.zeros(11, 13)},
            r"pos is torch.float32 \[11, 13\] .*\[12, 13\] or \[1, 12, 13\] or \[2, 12, 13\]",
        ),
        ({"pos": torch.zeros(3, 12, 13)}, r"pos is torch.float32 \[3, 12, 13\]"),
        ({"visible_index": torch.zeros(2, 3)}, r"visible_index is torch.float32 \[2, 3\] .*torch.int64 \[2, tokens\]"),
        ({"visible_index": torch.zeros(3, 3, dtype=torch.int64)}, r"visible_index is torch.int64 \[3, 3\]"),
        pytest.param(
            {"visible_index": torch.full((2, 3), 12)},
            "visible_index holds 12; .*at least 0 and below 12",
            marks=pytest.mark.cpp,
        ),
        pytest.param({"visible_index": torch.full((2, 3), -1)}, "visible_index holds -1", marks=pytest.mark.cpp),
        ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\); it must be three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, r"std is \(1.0, 0.0, 1.0\); all three must be above 0"),
    ],
)
def test_error_sentences(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        embed_visible_tubes(**make_arguments("cpu", torch.float32) | change)


def test_tokens_that_do_not_exist_are_nan_on_triton():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = make_arguments(device, torch.float32, "float32")
    grad = torch.randn(2, 3, 13, device=device)
    with use_impl("triton"):
        right = embed_visible_tubes(**arguments)
        arguments["visible_index"][0, 2], arguments["visible_index"][1, 0] = 12, -1
        out, found = differentiate(embed_visible_tubes, arguments, ("video", "pos"), grad)
    kept = arguments["visible_index"][0, :2].tolist() + arguments["visible_index"][1, 1:].tolist()
    assert found["pos"][0].any(1).nonzero().flatten().tolist() == sorted(set(kept))
    assert out[0, 2].isnan().all()
    assert out[1, 0].isnan().all()
    assert torch.equal(out[0, :2], right[0, :2])
    assert torch.equal(out[1, 1:], right[1, 1:])
