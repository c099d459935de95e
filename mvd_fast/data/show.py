"""What training sees: samples from its own loader as an animation and a sheet each; the frames of one file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvd_fast.config.run import DataConfig, DataRequest, Masks, RunConfig
from mvd_fast.data import images, media
from mvd_fast.data.containers import BadFile, read_bytes
from mvd_fast.data.datasets import Dataset
from mvd_fast.data.lists import read_dataset
from mvd_fast.data.loader import DataSetup, Loader, build_source
from mvd_fast.data.sampling import Box, SampleKey
from mvd_fast.data.sheet import Page, write_animation, write_sheet
from mvd_fast.data.source import Sample, Schedule
from mvd_fast.errors import UserError
from mvd_fast.files import written_aside
from mvd_fast.names import printable

GREY = 128  # of masked tubes
MIXED_AT_ONCE = 16  # clips; where a recipe mixes them, those of a batch are mixed with each other
STILL, USUAL_STEP, LEAST_STEP = 1000, 100, 20  # ms that a picture is shown: the only one, one of many, at least


@dataclass(frozen=True)
class Shown:
    """One sample of an epoch as training gets it, and the files that picture it."""

    path: str
    key: SampleKey
    frames: list[int]  # numbers of the frames in the file
    page: Page
    sheet: Path
    animation: Path


def show_samples(
    config: RunConfig | DataSetup, samples: int, epoch: int, out: str | Path, file: str = ""
) -> Iterator[Shown]:
    """Pictures `samples` samples from the beginning of epoch `epoch` on in the folder `out`, in training's order.

    They come out of the loader that training uses, on a GPU where there is one; a short list goes on with the next
    epoch. `file`: that file alone instead of what `data.train` lists. Raises UserError for unusable lists and files.
    """
    folder, listed = Path(out), Path(config.data.train)
    if listed.is_dir() and folder.resolve().is_relative_to(listed.resolve()):
        raise UserError(f"{folder} lies in the dataset {listed}, whose files are all trained on; name another --out")
    with closing(_loader(config, samples, file)) as loader:
        _make_folder(folder)
        for number, (row, sample) in enumerate(_rows(loader, samples, epoch)):
            yield _pictured(loader, config.request, row, sample, folder, number)


def decode_file(path: str, wanted: str) -> tuple[np.ndarray, np.ndarray]:
    """Frames of a video or image: uint8 [n, H, W, 3] and their numbers, int64 [n].

    `wanted`: numbers and slices with commas between them, such as `0,7,14`, `::10` or `-1`, in any order, repeats
    allowed. Raises UserError: unusable file, or a frame that it does not have.
    """
    try:
        if _is_image(path):
            data = read_bytes(path)
            images.probe_image(data)
            index = parse_frames(wanted, 1, path)
            return np.repeat(images.decode_image(data)[None], len(index), axis=0), index
        info = media.probe_video(path)
        index = parse_frames(wanted, info.frames, path)
        return media.decode_frames(path, index, info), index
    except BadFile as error:
        raise UserError(f"{printable(path)} {error}") from error


def parse_frames(wanted: str, count: int, path: str) -> np.ndarray:
    """The frames that `decode_file` is asked for, of a file with `count` of them: int64 [n], all at least 0."""
    numbers: list[int] = []
    for part in wanted.split(","):
        match = re.fullmatch(r"\s*(?:(-?\d+)|(-?\d*):(-?\d*)(?::(-?\d+)?)?)\s*", part)
        if match is None or match[4] == "0":
            raise UserError(
                f"--frames takes numbers and slices with commas between them, such as 0,7,14 or 0:50:4, not {part!r}"
            )
        single, *bounds = match.groups()
        found = range(count)[slice(*(int(bound) if bound else None for bound in bounds))] if single is None else ()
        if single is not None and -count <= int(single) < count:
            found = (int(single) % count,)
        if not found:
            raise UserError(f"{printable(path)} has no frame {part.strip()}: its frames are 0 to {count - 1}")
        numbers.extend(found)
    return np.array(numbers, dtype=np.int64)


def save_frames(path: str, wanted: str, out: str) -> tuple[int, ...]:
    """Writes what `decode_file` gives as `frames` and `index` into the .npz file `out`; the shape of `frames`."""
    if not out.endswith(".npz"):
        raise UserError(f"--frames writes a NumPy file: --out must end in .npz, not {out!r}")
    frames, index = decode_file(path, wanted)
    _make_folder(Path(out).parent)
    with _writing(out), written_aside(out) as aside:
        np.savez(aside, frames=frames, index=index)
    return frames.shape


def is_media(path: str) -> bool:
    """Whether a file is a video or an image, and no list of such: by its ending, or as text has no zero bytes."""
    if path.lower().endswith(media.VIDEO_EXTENSIONS + images.IMAGE_EXTENSIONS):
        return True
    try:
        with open(path, "rb") as file:
            return b"\0" in file.read(4096)
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read: {error.strerror or error}") from error


def shows_images(train: str, root: str) -> bool:
    """Whether a file, list or folder has images only."""
    if os.path.isfile(train) and is_media(train):
        return _is_image(train)
    entries = read_dataset(train, root, media.VIDEO_EXTENSIONS + images.IMAGE_EXTENSIONS)
    return all(_is_image(entry.path) for entry in entries)


def _is_image(path: str) -> bool:
    return path.lower().endswith(images.IMAGE_EXTENSIONS)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror or error}); name another --out") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} may not be written to; name another --out")


@contextmanager
def _writing(place: str | Path) -> Iterator[None]:
    """A full disk, say, is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{printable(place)} cannot be written ({error.strerror or error}); name another --out"
        ) from error


# ---- loading ----


def _loader(config: RunConfig | DataSetup, samples: int, file: str) -> Loader:
    """As a run on one rank has it, but for the size of its batches, which no sample depends on unless it is mixed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, spec = build_source(config, device, 1, [file] if file else None)
    if file:
        try:
            source.facts(file)
        except BadFile as error:
            raise UserError(f"{printable(file)} {error}") from error
    request = config.request
    clips = min(samples, len(source.paths), MIXED_AT_ONCE) if _mixes(request) else 1
    schedule = Schedule(config.seed, len(source.paths), clips, 1, 0, 1, request.rows, request.views)
    data = config.data.replaced(max_bad_share=1.0, workers=0)
    return Loader(source, schedule, replace(spec, batch=clips * request.rows), data)


def _rows(loader: Loader, samples: int, epoch: int) -> Iterator[tuple[dict[str, Tensor], Sample]]:
    """For each sample what the batch holds of it, and what the pipeline got for it."""
    step, batches = epoch * loader.steps_per_epoch, loader.batches(epoch * loader.steps_per_epoch)
    while samples > 0:
        batch, keys = next(batches), loader.schedule.keys(step)
        for row, sample in enumerate(loader.readers.samples(keys, frozenset(loader.suspects))[:samples]):
            yield _row(batch, row), sample
        samples, step = samples - len(keys), step + 1


def _row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample's share of a batch, on the CPU; boxes and their actions lie one after the other."""
    ours = {name: value for name, value in batch.items() if name not in ("boxes", "labels", "box_clip")}
    found = {name: value[row].cpu() for name, value in ours.items()}
    if "boxes" in batch:
        found["boxes"] = batch["boxes"][batch["box_clip"] == row].cpu()
    return found


# ---- picturing ----


def _pictured(
    loader: Loader, request: DataRequest, row: dict[str, Tensor], sample: Sample, folder: Path, number: int
) -> Shown:
    dataset, key = loader.spec.dataset, sample.choice.key
    path = loader.paths[key.index]
    facts = loader.source.facts(path)
    frames = [int(frame) for frame in dataset.frames(facts, key)]
    crop = crop_of(row[dataset.output], dataset.data)
    lines = [
        f"seed {key.seed}, epoch {key.epoch}, index {key.index} of {len(loader.paths)}"
        + (f", copy {key.copy}" if loader.schedule.repeats > 1 else ""),
        *(f"in place of {printable(loader.paths[index])}: {reason}" for index, reason in sample.choice.passed_over),
        f"{dataset.describe(facts)}; {_cut(dataset, dataset.box(key, facts.width, facts.height), key)}",
        f"decoded by {_decoder(loader, sample, facts, path)}",
        *_added(row, request, loader.schedule.micro),
    ]
    page = Page(path, lines, frames, {"crop": crop, **_overlays(crop, row, request.masks)})
    name = f"{number:03d}_{re.sub(r'[^A-Za-z0-9.-]+', '_', Path(path).stem)[:40]}"
    shown = Shown(path, key, frames, page, folder / f"{name}.png", folder / f"{name}.webp")
    with _writing(folder):
        write_sheet(page, shown.sheet)
        write_animation(page, shown.animation, _milliseconds(facts, frames))
    return shown


def crop_of(pixels: Tensor, data: DataConfig) -> np.ndarray:
    """Normalised pixels [3, H, W] or [3, T, H, W] as they were before: uint8 [T, H, W, 3]."""
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (data.mean, data.std))
    levels = (255 * (pixels * std + mean)).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).numpy()


def masked(crop: np.ndarray, mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """The crop uint8 [T, H, W, 3] with the masked tokens' tubes grey; `mask` bool [N], True = masked."""
    sizes = [side // tokens for side, tokens in zip(crop.shape[:3], grid, strict=True)]
    tubes = mask.reshape(grid)
    for axis, size in enumerate(sizes):
        tubes = tubes.repeat(size, axis)
    return np.where(tubes[..., None], np.uint8(GREY), crop)


def _overlays(crop: np.ndarray, row: dict[str, Tensor], asked: Masks | None) -> dict[str, np.ndarray]:
    """Other views of the crop: behind each of its masks in pre-training, with its boxes in detection."""
    if "boxes" in row:
        return {"boxes": np.stack([_boxed(frame, row["boxes"].numpy()) for frame in crop])}
    if asked is None:
        return {}
    masks = row["mask"].reshape(asked.per_clip, -1).numpy()
    names = [f"under mask {number}" for number in range(len(masks))] if len(masks) > 1 else ["under its mask"]
    return {name: masked(crop, mask, asked.grid) for name, mask in zip(names, masks, strict=True)}


def _mixes(request: DataRequest) -> bool:
    return request.augment is not None and request.augment.mixes


def _boxed(frame: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(frame)
    draw = ImageDraw.Draw(picture)
    for x1, y1, x2, y2 in boxes * frame.shape[1]:
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=(255, 220, 0), width=2)
    return np.asarray(picture)


# ---- describing ----


def _cut(dataset: Dataset, box: Box, key: SampleKey) -> str:
    crop, side = dataset.data.crop.kind, dataset.request.image_size
    flipped = ", flipped" if dataset.flipped(key) else ""
    return f"{crop} crop {box.width} x {box.height} at x {box.x}, y {box.y}, shown as {side} x {side}{flipped}"


def _decoder(loader: Loader, sample: Sample, facts: Any, path: str) -> str:
    """Who decoded a sample, and why, if it was not DALI."""
    if sample.inputs.is_encoded:
        return "DALI"
    dataset = loader.spec.dataset
    why = f"DALI fails on it: {loader.suspects[path]}" if path in loader.suspects else dataset.why_not_dali(facts)
    return f"{dataset.decoder}, as {why}" if why else dataset.decoder


def _added(row: dict[str, Tensor], request: DataRequest, clips: int) -> list[str]:
    """What else belongs to the sample: label, boxes, mask."""
    lines = [f"label {int(row['label'])}"] if "label" in row else []
    if _mixes(request):
        lines.append(f"mixed with another of the {clips} clips of its batch, as far as the recipe draws it")
    if "boxes" in row:
        lines.append(f"boxes: {len(row['boxes'])}")
    if masks := request.masks:
        slices, height, width = masks.grid
        tubes = f", the same in each of {slices} time slices" if slices > 1 else ""
        lines.append(f"{masks.num_visible // slices} of {height * width} patches visible{tubes}")
    return lines


def _milliseconds(facts: Any, frames: list[int]) -> int:
    """How long a frame of the animation is shown: as fast as the video itself, where that is known."""
    if len(frames) == 1:
        return STILL
    step, rate = float(np.median(np.diff(frames))), getattr(facts, "fps", 0.0)
    return max(LEAST_STEP, round(1000 * step / rate)) if rate and step > 0 else USUAL_STEP
