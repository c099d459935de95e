"""The optimiser of bf16 networks that every rank holds in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mvd_fast.errors import UserError
from mvd_fast.training import adamw
from mvd_fast.training.adamw import GradientSums, MasterAdamW, gradient_norm, round_parameters

HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 300), nn.LayerNorm(300), nn.Linear(300, 5), nn.Linear(5, 5, bias=False))


def groups(model: nn.Module) -> list[dict]:
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


def both(clip: float = 0.0) -> tuple[nn.Module, MasterAdamW, nn.Module, torch.optim.AdamW]:
    """A network in bf16 with ours, and its float32 twin with torch's."""
    ours, twin = network(), network()
    optimizer = MasterAdamW(groups(ours), **HYPER, clip_grad=clip)
    round_parameters(ours)
    return ours, optimizer, twin, torch.optim.AdamW(groups(twin), **HYPER, fused=True)


def give_gradients(seed: int, size: float, *models: nn.Module, skip: int = 3) -> None:
    """The same gradients, representable in bf16, to all; the parameter number `skip` gets none."""
    torch.manual_seed(seed)
    for number, same in enumerate(zip(*(model.parameters() for model in models), strict=True)):
        value = (torch.randn(same[0].shape) * size).bfloat16()
        for parameter in same:
            parameter.grad = None if number == skip else value.to(parameter.dtype)


@pytest.mark.parametrize("bucket", [1, 400, 2**22])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_equals_torch_on_float32_copies_bit_for_bit(bucket: int, clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "BUCKET", bucket)
    ours, optimizer, twin, reference = both(clip)
    for step in range(4):
        give_gradients(step, 0.1, ours, twin)
        before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
        if clip:
            total = nn.utils.clip_grad_norm_(twin.parameters(), clip)
            assert total > clip
        optimizer.step()
        reference.step()
        for (name, parameter), expected in zip(ours.named_parameters(), twin.parameters(), strict=True):
            assert parameter.dtype == torch.bfloat16
            if expected.grad is None:
                assert torch.equal(parameter, before[name])
                continue
            found = optimizer.master(parameter)
            # The norm of all gradients is added up in another order than torch's.
            torch.testing.assert_close(found, expected.data, rtol=1e-6 if clip else 0, atol=1e-7 if clip else 0)
            assert torch.equal(parameter, found.bfloat16()) and not torch.equal(parameter, before[name])


def test_small_gradients_are_not_clipped() -> None:
    ours, optimizer, twin, reference = both(clip=1e6)
    give_gradients(0, 0.1, ours, twin)
    optimizer.step()
    reference.step()
    pairs = zip(ours.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(optimizer.master(p), expected) for p, expected in pairs)


def test_updates_below_bf16s_resolution_add_up() -> None:
    """2^-9 of a weight and less is lost when a bf16 weight is updated itself."""
    weight = nn.Parameter(torch.ones(8))
    optimizer = MasterAdamW([weight], lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    weight.data = weight.data.bfloat16()
    for _ in range(100):
        weight.grad = torch.ones(8, dtype=torch.bfloat16)
        optimizer.step()
    torch.testing.assert_close(optimizer.master(weight), torch.full((8,), 0.99), rtol=1e-4, atol=0)
    assert torch.equal(weight.data, torch.full((8,), 0.99).bfloat16())


def test_state_goes_to_disk_and_back_in_float32(tmp_path) -> None:
    ours, optimizer, _, _ = both()
    for step in range(2):
        give_gradients(step, 0.1, ours, skip=-1)
        optimizer.step()
    torch.save({"weights": ours.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = network(seed=1)
    resumed = MasterAdamW(groups(again), **HYPER)
    round_parameters(again)
    again.load_state_dict(saved["weights"])
    resumed.load_state_dict(saved["optimizer"])
    give_gradients(2, 0.1, ours, again, skip=-1)
    optimizer.step()
    resumed.step()
    for left, right in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)
        for name in adamw.STATE:
            one, other = optimizer.state[left][name], resumed.state[right][name]
            assert torch.equal(one, other) and other.dtype == torch.float32 and one is not other, name


def test_state_of_another_optimiser_is_refused() -> None:
    _, optimizer, twin, reference = both()
    give_gradients(0, 0.1, twin, skip=-1)
    reference.step()
    with pytest.raises(ValueError, match="no float32 master weights"):
        optimizer.load_state_dict(reference.state_dict())


def test_gradient_norm_is_float32s() -> None:
    model = network()
    round_parameters(model)
    give_gradients(0, 0.1, model)
    whole = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    found = gradient_norm(model.parameters())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), whole.norm(), rtol=1e-6, atol=0)
    assert gradient_norm([]) == 0


def test_micro_batches_are_summed_in_float32_and_rounded_once() -> None:
    """300 gradients of 2^-8 beside one of 1: summed in bf16 they would all be lost."""
    model = nn.Linear(4, 1, bias=False).bfloat16()
    sums = GradientSums(model)
    inputs = [torch.ones(4)] + [torch.full((4,), 2.0**-8)] * 300
    for number, row in enumerate(inputs):
        sums.last = number == len(inputs) - 1
        model(row.bfloat16()).sum().backward()
        assert (model.weight.grad is None) == (not sums.last)
    expected = torch.full((1, 4), 1 + 300 / 256).bfloat16()
    assert torch.equal(model.weight.grad, expected)
    model.weight.grad = None  # the next step starts anew
    assert torch.equal(gradients_of_one(model), torch.ones(1, 4, dtype=torch.bfloat16))


def gradients_of_one(model: nn.Linear) -> Tensor:
    model(torch.ones(4, dtype=torch.bfloat16)).sum().backward()
    return model.weight.grad


def test_a_parameter_that_the_last_micro_batch_leaves_out_is_an_error() -> None:
    """Its sum would go into the next step."""
    first, second = nn.Linear(2, 1, bias=False).bfloat16(), nn.Linear(2, 1, bias=False).bfloat16()
    sums, ones = GradientSums(nn.ModuleList([first, second])), torch.ones(2, dtype=torch.bfloat16)
    sums.last = False
    first(ones).sum().backward()
    sums.last = True
    second(ones).sum().backward()
    with pytest.raises(UserError, match="1 parameters took part in a step's first micro batches"):
        sums.require_complete()
