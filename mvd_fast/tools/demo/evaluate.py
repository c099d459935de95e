"""What the demo's networks learned: probes, similarity of time slices, and pictures of masked inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from mvd_fast.config.run import RunConfig
from mvd_fast.convert.weights import load_into, read_weights
from mvd_fast.data import build_loader
from mvd_fast.data.lists import read_dataset
from mvd_fast.evaluation.features import ClipFeatures, Network, clip_features
from mvd_fast.evaluation.probe import linear_probe
from mvd_fast.files import WEIGHTS, written_aside
from mvd_fast.models.tokens import paste_tubes, split_mask
from mvd_fast.tasks import build_task
from mvd_fast.tools.demo.digits import MOTIONS, digit_and_motion

LABELS = ("digit", "motion")
CHANCE = {"digit": 0.1, "motion": 1 / len(MOTIONS)}
PICTURES = 6


def evaluate(student: RunConfig, video_teacher: RunConfig, out: Path, console: Console) -> dict[str, Any]:
    """Probes and similarities for `results.json`; writes `pictures.npz`. Configs are the two runs' as trained."""
    networks = _networks(student, out)
    splits = {split: str(out / "data" / f"{split}.txt") for split in ("train", "test")}
    features, labels = {}, {}
    with Progress(console=console) as bar:
        task = bar.add_task("features and probes", total=len(splits) + len(networks) + 1)
        for split, clips in splits.items():
            features[split] = clip_features(networks, student, clips, torch.device("cpu"))
            labels[split] = clip_labels(clips, features[split])
            bar.advance(task)
        probes: dict[str, Any] = {"chance": CHANCE, "n_test": len(features["test"].index)}
        confusion = {}
        for name in networks:
            found = {k: _probe(name, k, features, labels) for k in LABELS}
            probes[name] = {k: result.accuracy for k, result in found.items()}
            confusion[name] = {k: result.confusion.tolist() for k, result in found.items()}
            bar.advance(task)
        _write_pictures(video_teacher, splits["test"], out)
        bar.advance(task)
    similarity = {name: matrix.tolist() for name, matrix in features["test"].similarity.items()}
    return {"probes": probes, "confusion": confusion, "similarity": similarity}


def _networks(config: RunConfig, out: Path) -> dict[str, Network]:
    """The untrained student, both teachers and the student, each from a clip to one feature per token."""
    torch.manual_seed(config.seed)
    task = build_task(config).eval()
    student = copy.deepcopy(task.network)
    load_into(student, read_weights(out / "student" / WEIGHTS), out / "student" / WEIGHTS)
    return {
        "untrained student": task.network.encode,
        "image teacher": task.targets["image"],
        "video teacher": task.targets["video"],
        "student": student.encode,
    }


def clip_labels(clips: str, features: ClipFeatures) -> dict[str, np.ndarray]:
    """int [S] for each of LABELS, in the order of the features."""
    label = np.array([entry.label for entry in read_dataset(clips)])[features.index]
    return dict(zip(LABELS, digit_and_motion(label), strict=True))


def _probe(name: str, label: str, features: dict[str, ClipFeatures], labels: dict[str, Any]) -> Any:
    sides = ((features[split].pooled[name], labels[split][label]) for split in ("train", "test"))
    (train_x, train_y), (test_x, test_y) = sides
    return linear_probe(train_x, train_y, test_x, test_y)


@torch.inference_mode()
def _write_pictures(config: RunConfig, clips: str, out: Path) -> None:
    """A few test clips, their masks, and what the video teacher paints where it sees nothing."""
    model = build_task(config).eval().network
    load_into(model, read_weights(out / "video_teacher" / WEIGHTS), out / "video_teacher" / WEIGHTS)
    data = config.data.model_copy(update={"train": clips})
    batch = math.gcd(len(read_dataset(clips)), 2 * PICTURES)
    loader = build_loader(config.model_copy(update={"data": data}), 0, 1, torch.device("cpu"), batch, 1)
    item = next(loader.batches(0))
    loader.close()
    video, mask, index = (item[key][:PICTURES] for key in ("video", "mask", "index"))
    painted = _paint(model, config, video, mask)
    label = np.array([entry.label for entry in read_dataset(clips)])[index.numpy()]
    digit, motion = digit_and_motion(label)
    to_bytes = _to_bytes(config)
    with written_aside(out / "pictures.npz") as aside:
        np.savez_compressed(
            aside,
            frames=to_bytes(video),
            reconstruction=to_bytes(painted),
            mask=mask.numpy(),
            tubelet=config.model.tubelet_size,
            patch=config.model.patch_size,
            digit=digit,
            motion=motion,
        )


def _paint(model: torch.nn.Module, config: RunConfig, video: Tensor, mask: Tensor) -> Tensor:
    """The clip with its masked tubes replaced by the prediction, which is of pixels normalised per tube and channel:
    mean and deviation are the true tube's, as in VideoMAE's own pictures."""
    masked = split_mask(mask)[1]
    stats, tube = (config.data.mean, config.data.std), (config.model.tubelet_size, *[config.model.patch_size] * 2)
    prediction = model(video, mask).float().unflatten(2, (-1, 3))  # [B, Nm, t*p*p, 3]
    if config.normalize_pixels:
        truth = model.targets(video, masked, False, *stats).unflatten(2, (-1, 3))
        deviation, mean = torch.std_mean(truth, dim=2, keepdim=True)
        prediction = prediction * deviation + mean
    pixels = (prediction - torch.tensor(stats[0])) / torch.tensor(stats[1])
    pixels = pixels.transpose(2, 3).unflatten(3, tube)  # [B, Nm, 3, t, p, p]
    return paste_tubes(video, pixels, masked, tube[0], tube[1])


def _to_bytes(config: RunConfig) -> Callable[[Tensor], np.ndarray]:
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (config.data.mean, config.data.std))

    def convert(video: Tensor) -> np.ndarray:
        """Normalised [B, 3, T, H, W] -> uint8 [B, T, H, W, 3]."""
        return ((video * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 4, 1).numpy()

    return convert
