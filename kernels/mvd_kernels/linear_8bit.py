"""Linear layers of frozen networks in 8 bits: a scale for every token and for every output channel, bias, GELU.

Shapes: R tokens (all dimensions of x but the last), C columns of the input, D of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvd_kernels import shapes
from mvd_kernels._checks import FLOAT, OPTIONAL, Checks, describe
from mvd_kernels._dispatch import autocast_dtype, extension
from mvd_kernels._operator import Operator, has_tangent
from mvd_kernels._triton import autotune, cdiv, interpreting, launch, power_of_2, tl, triton

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}  # what the largest entry of a row becomes
SMALLEST = 1e-30  # a row's largest entry counts as this at least, so that 1 / it is finite
MOST_COLUMNS = 2**16  # sums of products of 8 bits stay within 32 bits
FP8_CAPABILITY = (8, 9)
_ROWS = {
    "weight.values": ("int8 or float8_e4m3fn", "D+ C+"),
    "weight.scale": (torch.float32, "D"),
    "x": (FLOAT, "... C"),
    "bias": (FLOAT, "D", OPTIONAL),
}
_CHECKS = Checks(**_ROWS)


class QuantizedWeight(NamedTuple):
    """A weight in 8 bits, as `quantize_weight` gives it: `values * scale[:, None]` is the weight, rounded."""

    values: Tensor
    """int8 or float8_e4m3fn [D, C]"""
    scale: Tensor
    """float32 [D]"""
    packed: Tensor | None = None
    """`values` in the order in which the CPU reads them; where it is missing every call on the CPU makes it"""


# ---- what it gives ----


def _outputs(
    x: Tensor, values: Tensor, scale: Tensor, packed: Tensor | None, bias: Tensor | None, gelu: bool
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


# ---- reference ----


def quantize_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[..., C] -> values [..., C] in `dtype`, scale fp32 [...]; NaN is the scale of a row with NaN or infinity.

    The kernels do these operations in this order, each rounded to fp32: their values are the same, not just close.
    """
    rows = rows.float()
    largest = rows.abs().amax(-1, keepdim=True)
    largest = largest.where(largest < torch.inf, torch.nan).clamp(min=SMALLEST)
    scaled = rows * (largest.reciprocal() * LARGEST[dtype])
    scaled = scaled.round() if dtype == torch.int8 else scaled
    return scaled.nan_to_num(0.0).to(dtype), (largest * (1 / LARGEST[dtype])).squeeze(-1)


def _reference(x, values, scale, packed, bias, gelu) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]), values.dtype)
    sums = rows.double() @ values.double().t()  # exact
    y = sums.to(wide) * row_scale.to(wide)[:, None] * scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return (F.gelu(y) if gelu else y).to(x.dtype).view(*x.shape[:-1], len(values))


# ---- C++ ----


def _pack(values: Tensor) -> Tensor | None:
    """What the C++ kernels read; None where they do not run, as on tensors without memory."""
    on_cpu = type(values) is Tensor and values.device.type == "cpu"
    runs = on_cpu and values.dtype == torch.int8 and extension()[0] is not None
    return torch.ops.mvd_kernels.linear_8bit_pack_cpp(values) if runs else None


# ---- Triton ----


@triton.jit
def _round(x, INTERPRETED: tl.constexpr):
    """To whole numbers, ties to even."""
    if INTERPRETED:
        # Beyond 2^23 there are no fractions. A compiler would make this addition one with the product before it.
        return (x + 12582912.0) - 12582912.0
    return tl.inline_asm_elementwise("cvt.rni.f32.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _round_to_fp8(x):
    """To values that FP8 E4M3 has, ties to even, as a GPU does; the interpreter's own conversion drops carries."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 2**-6, (x + 24576.0) - 24576.0, normal)


@triton.jit
def _quantize_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    depth,
    smallest,
    LARGEST: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of x to 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * depth + column, mask=column < depth, other=0).to(tl.float32)
    poison = tl.sum(x * 0.0, axis=0)  # NaN for NaN and for infinity
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), smallest)
    factor = tl.div_rn(1.0, largest) * LARGEST
    scaled = tl.where(poison == 0, x * factor, 0.0)
    if LARGEST == 127:
        scaled = _round(scaled, INTERPRETED)
    elif INTERPRETED:
        scaled = _round_to_fp8(scaled)
    tl.store(values_ptr + row * depth + column, scaled.to(values_ptr.dtype.element_ty), mask=column < depth)
    tl.store(scale_ptr + row, largest * (1 / LARGEST) + poison)


@autotune(
    [
        {"BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
        {"BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
        {"BLOCK_K": 128, "num_warps": 8, "num_stages": 4},
    ],
    key=["depth", "width"],
)
@triton.jit
def _multiply_kernel(
    values_ptr,  # [R, C]
    scale_ptr,  # [R]
    weight_ptr,  # [D, C]
    weight_scale_ptr,  # [D]
    bias_ptr,
    out_ptr,  # [R, D]
    rows,
    width,
    depth,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    INTEGERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = row < rows, column < width
    values_row = values_ptr + row.to(tl.int64)[:, None] * depth
    weight_row = weight_ptr + column.to(tl.int64)[None, :] * depth
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGERS else tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(values_row + k[None, :], mask=row_inside[:, None] & (k < depth)[None, :], other=0.0)
        b = tl.load(weight_row + k[:, None], mask=(k < depth)[:, None] & column_inside[None, :], other=0.0)
        if INTEGERS:
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        else:
            # Hopper adds FP8 products with 14 bits; what it adds is taken over into fp32 every 64 of them.
            sums = tl.dot(a, b, sums, max_num_imprecise_acc=64)
    scale = tl.load(scale_ptr + row, mask=row_inside, other=0)
    weight_scale = tl.load(weight_scale_ptr + column, mask=column_inside, other=0)
    y = sums.to(tl.float32) * scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column_inside, other=0).to(tl.float32)[None, :]
    if GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    at = out_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


_TILE = {"BLOCK_M": 128, "BLOCK_N": 128}


def _launch(x, values, scale, packed, bias, gelu):
    inputs, weight = x.reshape(-1, x.shape[-1]).contiguous(), values.contiguous()
    (rows, depth), width = inputs.shape, len(weight)
    out = _outputs(x, values, scale, packed, bias, gelu)
    if not out.numel():
        return out
    narrow = torch.empty_like(inputs, dtype=values.dtype)
    row_scale = x.new_empty(rows, dtype=torch.float32)
    launch(
        _quantize_kernel,
        (rows,),
        *(inputs, narrow, row_scale, depth, SMALLEST),
        flops=4 * inputs.numel(),
        moves=(inputs, narrow),
        LARGEST=LARGEST[values.dtype],
        INTERPRETED=interpreting(),
        BLOCK=power_of_2(depth),
    )
    launch(
        _multiply_kernel,
        (cdiv(rows, _TILE["BLOCK_M"]), cdiv(width, _TILE["BLOCK_N"])),
        *(narrow, row_scale, weight, scale.contiguous(), scale if bias is None else bias.contiguous(), out),
        *(rows, width, depth),
        flops=2 * rows * width * depth,
        moves=(narrow, weight, out),
        HAS_BIAS=bias is not None,
        GELU=gelu,
        INTEGERS=values.dtype == torch.int8,
        **_TILE,
    )
    return out


def offline_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for size, dim in shapes.TEACHERS.items():
        for layer, (depth, width) in shapes.linear_layers(dim).items():
            for rows in (2 * shapes.TOKENS, 16 * shapes.TOKENS):
                for name, dtype in FORMATS.items():
                    x = torch.empty(rows, depth, dtype=torch.bfloat16, device="meta")
                    values = torch.empty(width, depth, dtype=dtype, device="meta")
                    scale = torch.empty(width, device="meta")
                    bias = torch.empty(width, dtype=torch.bfloat16, device="meta")
                    case = f"{size} {layer} {rows} {name}"
                    yield case, partial(_launch, x, values, scale, None, bias, layer == "fc1")


# ---- declaration ----

_operator = Operator(
    "linear_8bit",
    _outputs,
    reference=_reference,
    cpp=True,
    triton=_launch,
    dtypes={"cpp": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)},
    limits={
        "cpp": (
            "int8 weights: no instruction of a CPU multiplies FP8",
            lambda x, values, *_: values.dtype == torch.int8,
        )
    },
)


# ---- public ----


def quantize_weight(weight: Tensor, format: str | None = None) -> QuantizedWeight:
    """A linear layer's weight in 8 bits, with a scale for every row: to be done once.

        scale[d]  = max |weight[d]| / 127           values = round(weight / scale), ties to even      ("int8")
        scale[d]  = max |weight[d]| / 448           values = float8_e4m3fn(weight / scale)             ("fp8")

    Args:
        weight: float [D, C], C from 1 to 65536; it is taken as fp32.
        format: "int8" or "fp8" (FP8 E4M3, arXiv 2209.05433); None: FP8 where the weight is on a GPU that multiplies
            it (compute capability 8.9 or more), else int8.

    Raises:
        ValueError: if the weight or the format is none of these, or if the weight's GPU has no FP8.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not 1 <= weight.shape[1] <= MOST_COLUMNS:
        raise ValueError(f"weight is {describe(weight)}; it must be floating point [D, C], C from 1 to {MOST_COLUMNS}")
    capability = torch.cuda.get_device_capability(weight.device) if weight.device.type == "cuda" else None
    has_fp8 = capability is not None and capability >= FP8_CAPABILITY
    name = ("fp8" if has_fp8 else "int8") if format is None else format
    if name not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(map(repr, FORMATS))}, or None to choose")
    if name == "fp8" and capability is not None and not has_fp8:
        raise ValueError(
            f"format is 'fp8', which {weight.device} of capability {capability} does not multiply; use 'int8'"
        )
    values, scale = quantize_rows(weight.detach(), FORMATS[name])
    return QuantizedWeight(values, scale, _pack(values))


def linear_8bit(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """A frozen linear layer in 8 bits (dynamic activation scale per token, as in arXiv 2206.01861):

        scale[r] = max |x[r]| / 127                  (448 where the weight is FP8)
        y[r, d]  = sum_c round(x[r, c] / scale[r]) values[d, c]  * scale[r] * weight.scale[d] + bias[d]

    and GELU (arXiv 1606.08415) of y, with the exact erf. With int8 weights sums are whole numbers, exact. The rest is
    fp32, rounded once to the dtype of x. A token of zeros gives the bias (a largest entry below 1e-30 counts as 1e-30);
    one that holds a NaN or an infinity gives NaN and leaves the others alone.

    There is no gradient: frozen networks run under `torch.no_grad()` or `torch.inference_mode()`. Under autocast x is
    brought to its dtype. On the CPU FP8 weights run as plain PyTorch.

    Args:
        x: float [..., C]. Any strides.
        weight: of `quantize_weight`, [D, C].
        bias: float [D] or None.
        activation: None or "gelu".

    Returns:
        [..., D] in the dtype of x (autocast's, where it is on).

    Raises:
        ValueError: if an argument is not what is said above, or if x requires a gradient where gradients are recorded.
    """
    _check(x, weight, bias, activation)
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    values, scale, packed = weight
    bias = None if bias is None else bias.detach()
    return _operator(x, values, scale.detach(), packed, bias, activation == "gelu")


class Linear8bit(nn.Module):
    """`linear_8bit` with a frozen weight and bias of its own, in buffers; made from a layer by `from_linear`.

    `.to(dtype)`, `.half()` and the like leave its dtypes alone: rounded scales would shift whole channels.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        format: str = "int8",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        weight = quantize_weight(torch.zeros(out_features, in_features, device=device), format)
        self._set(weight, torch.zeros(out_features, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str | None = None, format: str | None = None) -> Linear8bit:
        """The layer, its weight as `quantize_weight(linear.weight, format)` gives it, its bias in its dtype."""
        layer = cls(1, 1, activation=activation)
        bias = linear.bias
        layer._set(quantize_weight(linear.weight, format), None if bias is None else bias.detach().clone())
        return layer

    def _set(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self.register_buffer("weight", weight.values)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("packed", weight.packed, persistent=False)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of x."""
        weight = QuantizedWeight(self.weight, self.weight_scale, self.packed)
        return linear_8bit(x, weight, self.bias, self.activation)

    def _load_from_state_dict(self, *arguments, **options) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.packed = _pack(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8bit:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.packed = None  # belongs to the device
        super()._apply(move, recurse)
        self.packed = _pack(self.weight)
        return self

    def extra_repr(self) -> str:
        width, depth = self.weight.shape
        name = next(name for name, dtype in FORMATS.items() if dtype == self.weight.dtype)
        return f"{depth}, {width}, bias={self.bias is not None}, activation={self.activation!r}, format={name!r}"


def _check(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str | None) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise ValueError(f"weight is a {type(weight).__name__}; it must be what quantize_weight(weight) gives")
    _CHECKS(weight.values, weight.scale, x, bias)
    if activation not in (None, "gelu"):
        raise ValueError(f"activation is {activation!r}; it must be None or 'gelu'")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x requires a gradient, which a frozen layer in 8 bits does not give; call it under torch.no_grad() or "
            "pass x.detach()"
        )
    if has_tangent(x):
        raise ValueError("x carries a tangent, and linear_8bit has no derivative: it rounds; pass x.detach()")
