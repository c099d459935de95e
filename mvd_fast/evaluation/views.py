"""Predictions for labelled videos from several views of each, spread over ranks: every video counts once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mvd_fast.data import media
from mvd_fast.data.labels import class_names, read_labelled
from mvd_fast.data.lists import Entry
from mvd_fast.data.pipeline import PipelineSpec
from mvd_fast.errors import UserError
from mvd_fast.names import printable
from mvd_fast.training import launch

from .backbone import SAMPLING_RATE, Preprocessing
from .frozen import MultiView, batches_of, samples_of
from .results import gather_results

if TYPE_CHECKING:
    from mvd_fast.config.run import RunConfig

TOP = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Views:
    """How videos are shown: see EvaluationConfig."""

    sampling: str = "dense"
    clips: int = 1
    crops: int = 1


@dataclass
class Predictions:
    """Of the S videos that could be read, in the list's order: `entries`; `scores` float32 [S, classes], the mean of
    the views' softmax. `bad`: path -> why it was left out."""

    entries: list[Entry]
    scores: Tensor
    bad: dict[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """int64 [S]."""
        return torch.tensor([entry.label for entry in self.entries], dtype=torch.int64)

    def hits(self, k: int) -> Tensor:
        """bool [S]: whether the label is among the `k` best classes."""
        best = self.scores.topk(min(k, self.scores.shape[1]), dim=1).indices
        return (best == self.labels[:, None]).any(1)

    def summary(self) -> dict[str, Any]:
        """`top1` and `top5` as shares (top5 null with five classes or fewer), `videos`, `left_out`."""
        top5 = float(self.hits(TOP).float().mean()) if self.scores.shape[1] > TOP else None
        top1 = float(self.hits(1).float().mean())
        return {"top1": top1, "top5": top5, "videos": len(self.entries), "left_out": len(self.bad)}

    def confusion(self) -> Tensor:
        """int64 [classes, classes]: videos by label (row) and best class (column)."""
        classes = self.scores.shape[1]
        cells = self.labels * classes + self.scores.argmax(1)
        return torch.bincount(cells, minlength=classes**2).view(classes, classes)


@torch.inference_mode()
def predict(
    network: Callable[[Tensor], Tensor],
    clips: Preprocessing,
    views: Views,
    entries: Sequence[Entry],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 16,
    threads: int = 2,
    on_file: Callable[[], None] = lambda: None,
) -> Predictions:
    """The mean softmax over all views of every video (collective where there are several ranks).

    network: float [B, 3, T, H, W] in `dtype` -> logits. Rank r of n takes the entries r, r + n, ...; all get all the
    predictions. `on_file` is called once per video of this rank. Raises UserError if no video can be used, or if
    scores are not finite.
    """
    mine = launch.shard(len(entries))
    bad: dict[str, str] = {}
    sums: dict[int, Tensor] = {}
    dataset = clips.dataset(MultiView, sampling=views.sampling, clips=views.clips, crops=views.crops)
    spec = PipelineSpec(dataset, batch, threads, device)
    with ThreadPoolExecutor(threads) as pool:
        samples = samples_of(pool, dataset, [entries[i] for i in mine], threads, bad, on_file)
        for video, numbers in batches_of(spec, samples) if mine else ():
            scores = network(video.to(dtype)).float().softmax(1).cpu()
            for number, score in zip(numbers, scores, strict=True):
                sums[mine[number]] = sums[mine[number]] + score if mine[number] in sums else score
    means = {number: (total / dataset.views).numpy() for number, total in sums.items()}
    means, bad = gather_results(means, bad, len(entries), "videos")
    stacked = torch.from_numpy(np.stack(list(means.values())))
    found = [entries[number] for number in means]
    if not (finite := stacked.isfinite().all(1)).all():
        some = found[int((~finite).nonzero()[0])].path
        raise UserError(f"the scores of {printable(some)} are not finite; the weights may be damaged, or need fp32")
    return Predictions(found, stacked, bad)


class Validation:
    """`evaluation.list` with one central view of each video, for use between epochs of a training run."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        assert config.model.num_classes is not None, "checked when the config is loaded"
        evaluation, data = config.evaluation, config.data
        found = read_labelled(evaluation.list, evaluation.root, media.VIDEO_EXTENSIONS)
        trained = class_names(data.train, data.root, media.VIDEO_EXTENSIONS)
        found = found.numbered_as(trained, data.train, "put a classes.txt beside it, one name a line")
        found.require_below(config.model.num_classes)
        if found.note and launch.placement().rank == 0:
            log.warning("evaluation.list: %s", found.note)
        self.entries = found.entries
        rate = data.sampling_rate or SAMPLING_RATE  # clips of segments have none: their views are uniform
        self.clips = Preprocessing(config.model.num_frames, rate, config.model.image_size, data.mean, data.std)
        self.views = Views(evaluation.sampling)
        self.batch, self.threads, self.device = evaluation.batch, data.threads, device

    def run(
        self, network: Callable[[Tensor], Tensor] | nn.Module, module: nn.Module, tell: Callable[[str], None]
    ) -> dict[str, Any]:
        """`Predictions.summary` of the network (collective), which is `module` or a function that uses it."""
        done = 0

        def on_file() -> None:
            nonlocal done
            done += 1
            tell(f"validates {done}/{len(self.entries)}")

        was_training, dtype = module.training, next(module.parameters()).dtype
        module.eval()
        try:
            found = predict(
                network, self.clips, self.views, self.entries, self.device,
                dtype=dtype, batch=self.batch, threads=self.threads, on_file=on_file,
            )  # fmt: skip
        finally:
            module.train(was_training)
        return found.summary()
