"""A student with any number of targets: one decoder each, whose losses do not depend on the others."""

from __future__ import annotations

import pytest
import tiny_runs
import torch
from torch import Tensor, nn

from mvd_fast.convert.network import check, recognise
from mvd_fast.models import ClipConfig, TargetDecoder
from mvd_fast.tasks.distill import Distill, DistilledStudent
from mvd_kernels import tube_mask

CLIP = ClipConfig(**tiny_runs.ENCODER, **tiny_runs.CLIP)
WIDTHS = {"image": 24, "video": 40, "motion": 8}
SIZES = {"image": (32, 2, 2), "video": (16, 1, 1), "motion": (48, 1, 3)}


class Stub(nn.Module):
    """Features that are a fixed projection of the clip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, (2, 8, 8), stride=(2, 8, 8))

    def forward(self, video: Tensor) -> Tensor:
        return self.proj(video).flatten(2).transpose(1, 2)

    def flops(self) -> float:
        return 0.0


def decoder(name: str) -> TargetDecoder:
    dim, depth, heads = SIZES[name]
    return TargetDecoder(target=name, target_dim=WIDTHS[name], dim=dim, depth=depth, num_heads=heads)


def make_task(*names: str, **weights: float) -> Distill:
    torch.manual_seed(0)
    network = DistilledStudent(CLIP, [decoder(name) for name in names])
    targets = {name: Stub(WIDTHS[name]) for name in names}
    return Distill(network, targets, dict.fromkeys(names, 1.0) | weights, normalized=["video"])


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"video": torch.randn(2, 3, 8, 32, 32), "mask": tube_mask(0, 0, torch.arange(2), (4, 4, 4), 0.5).mask}


def test_parameters_are_named_after_their_targets() -> None:
    """The released layout's `img` and `vid`, then the target's own name."""
    names = dict(make_task("image", "video", "motion").network.named_parameters())
    assert {name.split(".")[0] for name in names if name.startswith("decoder_")} == {
        "decoder_img",
        "decoder_vid",
        "decoder_motion",
    }
    assert names["decoder_motion.head.weight"].shape == (8, 48) and names["down_vid.weight"].shape == (16, 32)


@pytest.mark.parametrize("names", [("video",), ("image", "video"), ("motion", "image", "video")])
def test_the_loss_is_the_weighted_sum_of_what_each_target_gives_alone(names, batch) -> None:
    weights = {name: 0.5 + number for number, name in enumerate(names)}
    together = make_task(*names, **weights)
    found = together(batch)
    assert list(found) == ["loss", *(f"loss_{name}" for name in names)]
    expected = torch.zeros(())
    for name in names:
        alone = make_task(name)
        alone.network.load_state_dict(
            {key: value for key, value in together.network.state_dict().items() if key in alone.network.state_dict()}
        )
        alone.targets.load_state_dict({f"{name}.{k}": v for k, v in together.targets[name].state_dict().items()})
        torch.testing.assert_close(found[f"loss_{name}"], alone(batch)["loss"])
        expected = expected + weights[name] * found[f"loss_{name}"]
    torch.testing.assert_close(found["loss"], expected)


def test_a_target_of_weight_0_is_neither_computed_nor_decoded(batch) -> None:
    task = make_task("image", "motion", motion=0.0)
    task.targets["motion"].forward = None  # would fail
    found = task(batch)
    assert found.keys() == {"loss", "loss_image"}
    found["loss"].backward()
    assert task.network.decoder_motion.head.weight.grad is None
    assert task.network.decoder_img.head.weight.grad.abs().max() > 0


def test_students_of_other_targets_are_recognised_by_their_weights() -> None:
    """By names and shapes alone."""
    network = make_task("motion", "video").network
    found, faults = check(recognise(network.state_dict(), {"num_heads": 2}, "some.pth"))
    assert found.kind == "student" and faults.lines() == []
    assert [(one.target, one.dim, one.depth, one.target_dim) for one in found.sizes.decoders] == [
        ("motion", 48, 1, 8),
        ("video", 16, 1, 40),
    ]
