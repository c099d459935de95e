"""The declaration of an operator, on one of the tests' own: a file in the package's path is all it takes."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from op_checks import running
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mvd_kernels
from mvd_fast.tools import doctor
from mvd_kernels import _dispatch, use_impl
from mvd_kernels._checks import FLOAT, INDEX, OPTIONAL, Checks

FILE = '''
"""exp(x) times a factor, plus others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvd_kernels._checks import FLOAT, Checks
from mvd_kernels._operator import Operator

CALLS = []
_CHECKS = Checks(**{"x": (FLOAT, "R C"), "others[]": ("x", "R C")})


def _outputs(x: Tensor, others: Sequence[Tensor], factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _gradient(grad: Tensor, product: Tensor) -> Tensor:
    return torch.empty_like(product)


def _reference(x, others, factor):
    return x.exp() * factor + sum(others)


def _launch(x, others, factor):
    CALLS.append("forward")
    product = x.exp() * factor
    return product + sum(others), product


def _launch_backward(grad, product):
    CALLS.append("backward")
    return grad * product


def _save(ctx, arguments, outputs):
    ctx.others = len(arguments[1])
    return outputs


def _differentiate(ctx, saved, needed, grad):
    of_x = _backward.run(ctx.kernels, grad, saved[1]) if needed[0] else None
    return of_x, [grad if one else None for one in needed[1]]


_backward = Operator("_grown_backward", _gradient, triton=_launch_backward)
_operator = Operator(
    "grown", _outputs, reference=_reference, triton=_launch, results=1, save=_save, gradients=_differentiate
)


def grown(x: Tensor, others: Sequence[Tensor], factor: float = 2.0) -> Tensor:
    _CHECKS(x, others)
    return _operator(x, list(others), factor)
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> ModuleType:
    folder = tmp_path_factory.mktemp("package")
    (folder / "grown.py").write_text(FILE)
    mvd_kernels.__path__.append(str(folder))
    yield importlib.import_module("mvd_kernels.grown")
    mvd_kernels.__path__.remove(str(folder))
    del sys.modules["mvd_kernels.grown"], _dispatch._operators["grown"], _dispatch._operators["_grown_backward"]


@pytest.fixture
def device(module):
    module.CALLS.clear()
    with running("triton") as device:
        yield device


def leaves(device: str) -> list[Tensor]:
    return [torch.randn(3, 4, device=device, requires_grad=True) for _ in range(3)]


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


def test_the_file_is_found(module):
    assert "grown" in mvd_kernels.operators() and "_grown_backward" not in mvd_kernels.operators()
    assert mvd_kernels.implementation("grown", "cpu") == ("reference", "there are no kernels for cpu")
    assert ("grown (cpu)", "reference", "there are no kernels for cpu") in list(doctor.operators())


def test_eager_goes_straight_to_the_kernels(module, device, monkeypatch):
    monkeypatch.setattr(module._operator, "registered", None)
    monkeypatch.setattr(module._backward, "registered", None)
    x, *others = leaves(device)
    out = module.grown(x, others)
    found = torch.autograd.grad(out, (x, *others), torch.ones_like(out))
    assert module.CALLS == ["forward", "backward"] and type(out.grad_fn).__name__ == "GrownBackward"
    with use_impl("reference"):
        expected = module.grown(x, others)
    wanted = torch.autograd.grad(expected, (x, *others), torch.ones_like(out))
    torch.testing.assert_close([out, *found], [expected, *wanted])
    with torch.no_grad():
        assert module.grown(x, others).grad_fn is None
    assert torch.autograd.grad(module.grown(x.detach(), others).sum(), others[1])[0].eq(1).all()
    assert module.CALLS.count("backward") == 1  # the kernel's was not needed


def test_the_backward_keeps_the_kernels_of_the_forward(module, device):
    x, *others = leaves(device)
    out = module.grown(x, others)
    with use_impl("reference"):
        torch.autograd.grad(out.sum(), x)
    assert module.CALLS == ["forward", "backward"]


def test_who_looks_on_sees_one_operator(module, device):
    x, *others = leaves(device)
    with Seen() as seen:
        out = module.grown(x, others)
    assert "mvd_kernels.grown.default" in seen.names
    with Seen() as seen:
        torch.autograd.grad(out.sum(), x)
    assert "mvd_kernels.grown_backward.default" in seen.names
    module.CALLS.clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(one) for one in (x, *others)]
        out = module.grown(fakes[0], fakes[1:])
        assert out.shape == (3, 4) and torch.autograd.grad(out.sum(), fakes[0])[0].shape == (3, 4)
    assert not module.CALLS  # nothing ran


def test_a_compiled_function_holds_one_operator(module, device):
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    x, *others = leaves(device)
    out = torch.compile(module.grown, backend=backend, fullgraph=True)(x, others)
    torch.testing.assert_close(out, module.grown(x, others))
    assert graphs[0][0] == "mvd_kernels.grown.default"  # and before it nothing that belongs to the dispatch


def test_opcheck(module, device):
    x, *others = leaves(device)
    torch.library.opcheck(torch.ops.mvd_kernels.grown.default, (x, others, 2.0))
    torch.library.opcheck(torch.ops.mvd_kernels.grown.default, (x.detach(), others, 2.0))


def test_in_a_checkpoint(module, device):
    x, *others = leaves(device)
    out = checkpoint(module.grown, x, others, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], torch.exp(x.detach()) * 2)
    assert module.CALLS == ["forward", "forward", "backward"]


def test_the_registered_operator_alone(module, device):
    """It runs kernels only, and refuses what they cannot do."""
    x = torch.randn(3, 4, device=device)
    operator = torch.ops.mvd_kernels.grown
    assert torch.equal(operator(x, [x], 1.0)[0], x.exp() + x)
    with pytest.raises(ValueError, match=r"torch.ops.mvd_kernels.grown has no forward-mode AD; call mvd_kernels.grown"):
        torch.func.jvp(lambda one: operator(one, [x], 1.0)[0], (x,), (x,))
    with use_impl("cpp"), pytest.raises(ValueError, match="grown has no kernels here: grown has no cpp implementation"):
        operator(x, [x], 1.0)


# ---- the table of checks ----

TABLE = Checks(
    x=(FLOAT, "B N+ C"),
    same=("x", "like x", OPTIONAL),
    weight=("x or float32", "D C | 1 D C"),
    index=(INDEX, "... 2"),
    **{"lists[]": (FLOAT, "E. D"), "others[]": (torch.float32, "E.", OPTIONAL)},
)
X, W, INDICES = torch.zeros(2, 3, 4).half(), torch.zeros(5, 4), torch.zeros(7, 2, dtype=torch.int64)
GOOD = {
    "x": X,
    "same": None,
    "weight": W,
    "index": INDICES,
    "lists": [torch.zeros(6, 5), W[:, :1].t()],
    "others": [None, None],
}


def test_letters_stand_for_sizes():
    sizes = TABLE(*(GOOD | {"others": [torch.zeros(6), torch.zeros(1)]}).values())
    assert sizes == {"B": 2, "N": 3, "C": 4, "D": 5, "E.0": 6, "E.1": 1}
    assert TABLE(*(GOOD | {"weight": W[None].half(), "same": X}).values())["D"] == 5
    assert TABLE(*GOOD.values(), B=2)["B"] == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": X.int()}, r"x is torch.int32 \[2, 3, 4\] on cpu; it must be floating point \[B, N, C\], N at least 1"),
        ({"x": X[:, :0]}, r"x is torch.float16 \[2, 0, 4\] on cpu; .*N at least 1"),
        ({"x": 3}, "x is a int; it must be floating point"),
        ({"same": X[:1]}, r"same is .*; it must be torch.float16 \[2, 3, 4\] on cpu"),
        ({"weight": W.double()}, r"it must be torch.float16 or torch.float32 \[D, 4\] or \[1, D, 4\] on cpu"),
        ({"weight": W[:, :3]}, r"weight is torch.float32 \[5, 3\]"),
        ({"weight": None}, "weight is a NoneType"),
        ({"weight": W.to("meta")}, r"weight is torch.float32 \[5, 4\] on meta; .* on cpu"),
        ({"index": INDICES[:, :1]}, r"index is torch.int64 \[7, 1\] on cpu; it must be torch.int64 \[..., 2\] on cpu"),
        ({"lists": [torch.zeros(6, 4)]}, r"lists\[0\] is torch.float32 \[6, 4\] on cpu; .* floating point \[E, 5\]"),
        ({"others": [None, torch.zeros(2)]}, r"others\[1\] is torch.float32 \[2\] on cpu; .*torch.float32 \[1\]"),
    ],
)
def test_sentences_of_the_table(change, sentence):
    TABLE(*GOOD.values())
    with pytest.raises(ValueError, match=sentence):
        TABLE(*(GOOD | change).values())


def test_on_the_meta_device_shapes_are_computed():
    x, weight = torch.empty(2, 3, 8, device="meta"), torch.empty(8, device="meta")
    total, normed = mvd_kernels.add_layer_norm(x, x, weight, weight)
    assert total.is_meta and normed.shape == x.shape
