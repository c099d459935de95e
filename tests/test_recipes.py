"""Recipes that need less work: several masks per clip, a part of the masked tokens decoded, teachers in 8 bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_runs
import torch
import torch.nn.functional as F

from mvd_fast.config.base import ConfigError
from mvd_fast.config.checks import check_batch
from mvd_fast.config.load import load_config
from mvd_fast.data import build_loader
from mvd_fast.models import ImageTeacher, VideoTeacher
from mvd_fast.models.frozen import to_precision
from mvd_fast.models.tokens import choose_tokens, split_mask
from mvd_fast.tasks import build_task
from mvd_fast.tasks.distill import Distill, DistilledStudent, distillation
from mvd_kernels import Linear8bit, tube_mask

IMAGE = {"image_size": 32, "patch_size": 8}
CLIP = {**IMAGE, "num_frames": 8, "tubelet_size": 2}
TEACHER = {"embed_dim": 48, "depth": 2, "num_heads": 3}
STUDENT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}
GRID, MASKED = (4, 4, 4), 40  # of 64 tokens


@pytest.fixture
def task() -> Distill:
    torch.manual_seed(0)
    student = DistilledStudent(**CLIP, **STUDENT, image_target_dim=48, video_target_dim=48)
    return distillation(student, ImageTeacher(**IMAGE, **TEACHER), VideoTeacher(**CLIP, **TEACHER))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


def masks(clips: int, per_clip: int) -> torch.Tensor:
    """bool [clips, per_clip, N], all different."""
    numbers = torch.arange(clips * per_clip)
    return tube_mask(0, 0, numbers, GRID, 0.65).mask.view(clips, per_clip, -1)


def gradients(task: Distill, batch: dict[str, torch.Tensor]) -> tuple[float, dict]:
    loss = task(batch)["loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in task.network.named_parameters() if p.grad is not None}
    task.network.zero_grad(set_to_none=True)
    return loss.item(), found


def test_several_masks_are_the_mean_over_samples_of_one(task: Distill) -> None:
    """Loss and gradients of 3 masks of 2 clips are those of the 6 samples, each with its own copy of the clip."""
    video, mask = torch.randn(2, 3, 8, 32, 32), masks(2, 3)
    loss, found = gradients(task, {"video": video, "mask": mask})
    repeated = {"video": video.repeat_interleave(3, 0), "mask": mask.flatten(0, 1)}
    expected_loss, expected = gradients(task, repeated)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_masks_of_other_clips_are_refused(task: Distill) -> None:
    """Four rows for two clips are not two masks of each."""
    with pytest.raises(ValueError, match=r"mask is \[4, 64\]; it must be \[2, N\] or \[2, masks, N\]"):
        task({"video": torch.randn(2, 3, 8, 32, 32), "mask": masks(4, 1)[:, 0]})


def test_chosen_tokens_are_a_random_subset_in_order() -> None:
    index = torch.arange(100).expand(4, -1) * 3
    torch.manual_seed(0)
    chosen, again = choose_tokens(index, 30), choose_tokens(index, 30)
    assert chosen.shape == (4, 30) and not chosen.equal(again)
    assert (chosen.diff(dim=1) > 0).all() and (chosen % 3 == 0).all()
    assert not chosen[0].equal(chosen[1]), "chosen per sample"


def test_predict_fraction_decodes_only_the_chosen(task: Distill) -> None:
    """The loss is that of a decoder that never saw the other masked tokens."""
    student, video, mask = task.network, torch.randn(2, 3, 8, 32, 32), masks(2, 1)[:, 0]
    batch = task.with_targets({"video": video, "mask": mask})
    features = {name: batch[f"target_{name}"] for name in ("image", "video")}
    torch.manual_seed(3)
    losses = student(video, mask, features, num_predicted=10)
    torch.manual_seed(3)
    visible, masked = split_mask(mask)
    chosen = choose_tokens(masked, 10)
    decoded = student.decode(student.encode(video, visible), visible, chosen)
    assert losses.keys() == decoded.keys() == features.keys()
    for name, loss in losses.items():
        prediction = student.decoder(name).head(decoded[name])
        assert prediction.shape == (2, 10, 48)
        wanted = features[name].gather(1, chosen[:, :, None].expand(-1, -1, 48))
        torch.testing.assert_close(loss, F.smooth_l1_loss(prediction, wanted))


def test_teachers_in_8_bits_are_close(task: Distill) -> None:
    """Whole networks of random weights: each token within cosine 0.999 of float32."""
    video = torch.randn(2, 3, 8, 32, 32)
    for role in ("image", "video"):
        teacher = copy.deepcopy(task.targets[role])
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        reference = copy.deepcopy(teacher)
        to_precision(teacher, "int8")
        assert sum(isinstance(m, Linear8bit) for m in teacher.modules()) == 4 * TEACHER["depth"]
        close, wanted = teacher(video.bfloat16()), reference(video)
        assert close.dtype == torch.bfloat16
        cosine = F.cosine_similarity(close.float(), wanted, dim=-1)
        assert cosine.min() > 0.999, (role, cosine.min())


def config(inputs: Path, tmp_path: Path, *overrides: str):
    file = tiny_runs.write_config(tmp_path / "tiny.json", tiny_runs.config(inputs, tmp_path / "run"))
    return load_config(str(file), overrides)


def test_loader_draws_several_masks_of_one_clip(inputs: Path, tmp_path: Path) -> None:
    """The first mask and the pixels are those of a run with one mask; all masks hide the same number of tokens."""

    def first(*overrides: str):
        found = config(inputs, tmp_path, *overrides)
        micro, accumulation = check_batch(found, 1)
        loader = build_loader(found, 0, 1, torch.device("cpu"), micro, accumulation)
        batch = next(loader.batches(0))
        loader.close()
        return batch, loader.steps_per_epoch

    several, steps = first("mask.per_clip=4", "batch.size=8")
    single, single_steps = first("batch.size=2")
    assert several["video"].shape[0] == 2 and several["mask"].shape == (2, 4, 64)
    assert steps == single_steps == 20
    torch.testing.assert_close(several["video"], single["video"], rtol=0, atol=0)
    assert several["mask"][:, 0].equal(single["mask"])
    assert len({tuple(mask.tolist()) for mask in several["mask"].flatten(0, 1)}) == 8
    assert several["mask"].sum(-1).unique().numel() == 1
    numbers = several["index"] + 3 * 2**30
    assert several["mask"][:, 3].equal(tube_mask(0, 0, numbers, GRID, 0.6).mask)


def test_runs_train_with_each_recipe(inputs: Path, tmp_path: Path) -> None:
    """All three at once, through the command line; the loss falls."""
    content = tiny_runs.config(inputs, tmp_path / "run", batch={"size": 16})
    content["mask"] |= {"per_clip": 2, "predict_fraction": 0.5}
    for target in content["targets"]:
        target["precision"] = "int8"
    status, output = tiny_runs.run(tiny_runs.write_config(tmp_path / "config.json", content))
    assert status == 0, output
    losses = tiny_runs.losses(tmp_path / "run")
    assert len(losses) == 10 and losses[10] < losses[1]


def test_flops_count_what_is_run(inputs: Path, tmp_path: Path) -> None:
    exact = build_task(config(inputs, tmp_path))
    several = build_task(config(inputs, tmp_path, "mask.per_clip=2"))
    part = build_task(config(inputs, tmp_path, "mask.predict_fraction=0.25"))
    student = 3 * sum(exact.network.flops(exact.masks.num_visible).values())
    assert several.flops().step == exact.flops().step + student
    assert part.num_predicted == 9 and part.flops().step < exact.flops().step


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["mask.per_clip=3"], "a forward pass has 8 samples, not a multiple of mask.per_clip 3"),
        (["mask.predict_fraction=0"], "mask.predict_fraction: got 0; it must be greater than 0"),
        (['targets.image.precision="int4"'], 'targets[0].precision: got "int4"; it must be'),
    ],
)
def test_mistakes_are_named(inputs: Path, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_batch(config(inputs, tmp_path, *overrides), 1)
    assert sentence in str(error.value)


def test_compiled_teachers_give_the_same_features(inputs: Path, tmp_path: Path) -> None:
    """Through the config; each teacher is one graph (`fullgraph`), and hooks still see its calls."""
    video = torch.randn(2, 3, 8, 32, 32)
    features = {}
    for compiled in ("false", "true"):
        settings = (
            f"teachers.compile={compiled}",
            'targets.image.precision="fp32"',
            'targets.video.precision="fp32"',
        )
        task, calls = build_task(config(inputs, tmp_path, *settings)), []
        task.targets["video"].register_forward_hook(lambda *_, calls=calls: calls.append("video"))
        with torch.inference_mode():
            features[compiled] = [task.with_targets({"video": video}) for _ in range(2)]
        assert len(calls) == 2
    for expected, found in zip(features["false"], features["true"], strict=True):
        for name in ("target_image", "target_video"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
