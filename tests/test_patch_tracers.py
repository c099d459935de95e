"""Patched models under what looks into a forward: tracers, exports, transforms of torch.func."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from patch_models import TOLERANCE, WIDTH, assert_alike, made, twins
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvd_kernels.patch import PatchError, unpatch

# ---- tracers: what they write down is to run without mvd_kernels ----

TRACERS: dict[str, Callable[[nn.Module, tuple], tuple[Callable, str]]] = {
    "torch.jit.trace": lambda model, inputs: (traced := torch.jit.trace(model, inputs), str(traced.inlined_graph)),
    "torch.export": lambda model, inputs: (
        (program := torch.export.export(model, inputs)).module(),
        str(program.graph),
    ),
    "torch.export, strict": lambda model, inputs: (
        (program := torch.export.export(model, inputs, strict=True)).module(),
        str(program.graph),
    ),
    "torch.fx": lambda model, inputs: (graph := torch.fx.symbolic_trace(model), str(graph.graph)),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tracers_write_the_original_down(tracer) -> None:
    ours, theirs = (model.blocks for model in twins("timm")[:2])  # a forward around them is not for plain torch.fx
    x = torch.randn(2, 5, WIDTH)
    program, text = TRACERS[tracer](ours, (x,))
    torch.testing.assert_close(program(x), theirs(x))
    assert "mvd_kernels" not in text and text
    if tracer == "torch.jit.trace":
        file = io.BytesIO()
        torch.jit.save(program, file)
        assert b"mvd_kernels" not in file.getvalue()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_script_names_unpatch() -> None:
    model, theirs, inputs, _ = twins("timm")
    with pytest.raises(
        PatchError, match=r"^torch\.jit\.script does not take .* call mvd_kernels\.patch\.unpatch\(model\)"
    ):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.script(unpatch(model))(*inputs), theirs(*inputs))


@pytest.mark.parametrize("case", ["timm", "reference", "VideoMAEForPreTraining"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnx_names_unpatch(case, tmp_path) -> None:
    model, inputs, patch = made(case)
    patch(model.eval())
    with pytest.raises(
        PatchError, match=r"^torch\.onnx\.export does not take .* call mvd_kernels\.patch\.unpatch\(model\)"
    ):
        torch.onnx.export(model, inputs, tmp_path / "model.onnx", dynamo=False)


@pytest.mark.parametrize("strict", [False, True])
def test_onnx_by_torch_export_names_unpatch(strict, monkeypatch) -> None:
    """What torch.onnx.export(dynamo=True) runs; it gives the sentence in its summary. It would need onnxscript."""
    model, inputs, patch = made("timm")
    patch(model.eval())
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(
        Exception, match=r"torch\.onnx\.export does not take .* call mvd_kernels\.patch\.unpatch\(model\)"
    ):
        torch.export.export(model, inputs, strict=strict)


def test_torch_compile_sees_what_is_done_to_a_part() -> None:
    """It runs what it writes down itself, so it gets the fused forward, and takes another where a part changes."""
    model, theirs, inputs, _ = twins("timm")
    ours = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    for one in (model, theirs):
        one.blocks[0].norm2 = nn.Identity()
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))


# ---- torch.func ----

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x.cos()])),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(lambda y: f(y).square().sum()), (x,), (x.cos(),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", ["timm", "reference", "VideoMAEModel"])
@pytest.mark.filterwarnings("ignore:mvd_kernels runs plain PyTorch")
def test_transforms_of_torch_func(case, transform) -> None:
    ours, theirs, (x, *rest), _ = twins(case)

    def output(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            result = model(x, *rest)
            return result if isinstance(result, Tensor) else result[0]

        return call

    with sdpa_kernel(SDPBackend.MATH):  # of torch's, the only one with forward-mode AD
        results = [TRANSFORMS[transform](output(model), x) for model in (ours, theirs)]
    assert_alike(results[:1], results[1:], TOLERANCE[torch.float32])


@pytest.mark.cpp
@pytest.mark.parametrize("case", ["timm", "reference", "VideoMAEModel"])
def test_a_second_derivative_is_refused_by_name(case) -> None:
    model, _, inputs, _ = twins(case)
    output = model(*inputs)
    loss = (output if isinstance(output, Tensor) else output[0]).square().sum()
    with pytest.raises(ValueError, match=r"second derivative; call it under mvd_kernels\.use_impl"):
        gradients = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
        torch.autograd.grad(sum(one.square().sum() for one in gradients), [*model.parameters()])
