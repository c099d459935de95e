"""AdamW for bf16 networks that every rank holds in full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mvd_fast.errors import UserError

# Gradients converted to float32 at a time: little memory, few calls.
BUCKET = 2**22
STATE = ("step", "exp_avg", "exp_avg_sq", "master")


class MasterAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) on float32 master weights of parameters that are in bf16.

    Gradients become float32 a bucket at a time, so that a step needs 16 MiB rather than 4 bytes per parameter; torch's
    fused step goes over the bucket while a cache still holds it, and the new weights are rounded into the parameters.
    A state (`STATE`: float32, on the parameter's device) exists from the start. `clip_grad`: the largest L2 norm of all
    gradients together, 0: any; computed in float32.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        clip_grad: float = 0.0,
    ) -> None:
        """params: in float32, from which the master weights are taken; to be rounded to bf16 by `round_parameters`."""
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self.clip_grad = clip_grad
        for parameter in self._parameters():
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
                "master": parameter.detach().float().clone(),
            }

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 weights behind a parameter."""
        return self.state[parameter]["master"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step from the parameters' gradients; those without one stay."""
        assert closure is None, "gradients are computed before the step"
        scale = self._clip_scale() if self.clip_grad else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for bucket in _buckets(group["params"]):
                masters, averages, squares, steps = (
                    [self.state[parameter][name] for parameter in bucket]
                    for name in ("master", "exp_avg", "exp_avg_sq", "step")
                )
                gradients = [parameter.grad.float() for parameter in bucket]
                if scale is not None:
                    torch._foreach_mul_(gradients, scale)
                adamw(
                    masters,
                    gradients,
                    averages,
                    squares,
                    [],
                    steps,
                    fused=True,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                torch._foreach_copy_(bucket, masters)

    def _clip_scale(self) -> Tensor:
        norm = gradient_norm(self._parameters())
        return (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict()`; torch itself would round the state to the parameters' bf16.

        Raises UserError for the state of another optimiser.
        """
        if any("master" not in state for state in state_dict["state"].values()):
            raise UserError(
                "the checkpoint's optimiser state has no float32 master weights, it is of another optimiser; resume "
                "with the precision and ZeRO stage that the run was started with, or start a new run"
            )
        super().load_state_dict(state_dict)
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        for number, parameter in zip(saved, self._parameters(), strict=True):
            for name in STATE:
                value = state_dict["state"][number][name]
                self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)


def round_parameters(network: nn.Module) -> None:
    """All floating-point parameters to bf16, in place; buffers stay as they are."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together, float32, computed in float32 whatever they are in; 0 where there are none."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


class GradientSums:
    """Sums the gradients of a step's micro batches in float32 and hands them over, rounded once, at the last one.

    Many bf16 gradients summed in bf16 lose their small parts.
    """

    def __init__(self, network: nn.Module) -> None:
        self.last = True  # set before each backward pass: whether it is the step's last
        self._sums: dict[nn.Parameter, Tensor] = {}
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._add)

    def require_complete(self) -> None:
        """After a step's last backward pass. Raises UserError if it did not reach all that an earlier one did."""
        if self._sums:
            raise UserError(
                f"{len(self._sums)} parameters took part in a step's first micro batches, but not in its last; "
                "their gradients cannot be summed; set deepspeed.zero_optimization.stage or batch.grad_accum_steps to 1"
            )

    def _add(self, parameter: nn.Parameter) -> None:
        before = self._sums.pop(parameter, None)
        if before is None and self.last:
            return
        total = parameter.grad.float() if before is None else before.add_(parameter.grad)
        if self.last:
            parameter.grad.copy_(total)
        else:
            self._sums[parameter], parameter.grad = total, None


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if bucket and size + parameter.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
