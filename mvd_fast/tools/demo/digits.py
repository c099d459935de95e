"""The demo's video set: handwritten digits that turn, zoom, orbit or shake, as VP9 files.

Every clip has two labels, which digit (10) and which motion (8). The motions come in pairs that look alike in any
single frame (clockwise and counter-clockwise, in and out), so that telling them apart needs correspondence over time.
Everything is a pure function of the seed. Test clips show digit images that no training clip shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvd_fast.data.workers import no_interrupts, worker_pool
from mvd_fast.files import write_text, written_aside

MOTIONS = (
    "rotate cw", "rotate ccw", "zoom in", "zoom out", "orbit cw", "orbit ccw", "shake across", "shake up-down"
)  # fmt: skip
SIZE = 32  # pixels, square
FRAMES = 16
FPS = 15
HELD_OUT = 400  # digit images that only test clips show
GLYPH_MARGIN = 1.25  # the 8 x 8 glyph has a border of one pixel
CHUNK = 128  # clips rendered at once, and per task of a worker
Task = tuple[Path, str, int, int, "DigitSet"]  # folder, split, first clip, clips, their set


@dataclass(frozen=True)
class DigitSet:
    """How many clips, and which: everything the files depend on."""

    train: int
    test: int
    seed: int

    @property
    def splits(self) -> dict[str, int]:
        return {"train": self.train, "test": self.test}


def label_of(digit: int, motion: int) -> int:
    """The one label of the list files."""
    return digit * len(MOTIONS) + motion


def digit_and_motion(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both labels of `label_of`."""
    return np.divmod(label, len(MOTIONS))


def write_digit_set(folder: Path, digit_set: DigitSet, on_clip: Callable[[], None] = lambda: None) -> None:
    """Writes `<split>/<number>.webm`, `<split>.txt` (lines `path label`) and, last of all, `set.json`.

    Clips that are there already are kept; `on_clip` is called once per clip, for a progress bar.
    """
    tasks = [
        (folder, split, start, min(CHUNK, count - start), digit_set)
        for split, count in digit_set.splits.items()
        for start in range(0, count, CHUNK)
    ]
    for split in digit_set.splits:
        (folder / split).mkdir(parents=True, exist_ok=True)
    small = sum(digit_set.splits.values()) <= CHUNK  # starting processes takes longer than writing these
    for written in map(_write_chunk, tasks) if small else _in_parallel(tasks):
        for _ in range(written):
            on_clip()
    for split, count in digit_set.splits.items():
        _, digits, motions = _draw(split, count, digit_set.seed)
        lines = (f"{_name(split, i)} {label_of(digits[i], motions[i])}\n" for i in range(count))
        write_text(folder / f"{split}.txt", "".join(lines))
    write_text(folder / "set.json", json.dumps(asdict(digit_set)))


def _in_parallel(tasks: list[Task]) -> Iterator[int]:
    # Not forked: a child would find locks held by threads that it does not have, such as those that decode.
    with worker_pool(os.cpu_count() or 1) as pool:
        with no_interrupts():
            written = pool.map(_write_alone, tasks)
        yield from written


def is_written(folder: Path, digit_set: DigitSet) -> bool:
    """Whether `folder` holds exactly this set."""
    facts = folder / "set.json"
    return facts.exists() and json.loads(facts.read_text()) == asdict(digit_set)


def _name(split: str, number: int) -> str:
    return f"{split}/{number:05d}.webm"


def _write_alone(task: Task) -> int:
    torch.set_num_threads(1)  # one worker per core
    return _write_chunk(task)


def _write_chunk(task: Task) -> int:
    folder, split, start, count, digit_set = task
    images, _, motions = _draw(split, digit_set.splits[split], digit_set.seed)
    chosen = slice(start, start + count)
    clips = render(images[chosen], motions[chosen], seed=(digit_set.seed, len(split), start))
    for number, clip in enumerate(clips, start):
        path = folder / _name(split, number)
        if not path.exists():
            write_webm(path, clip)
    return count


def _draw(split: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `draw_labels`, of a split of the demo's set."""
    return draw_labels(digit_order(split), count, np.random.default_rng((seed, len(split))))


def digit_order(split: str) -> np.ndarray:
    """Which digit images a split may show, int64: `test` its own, any other the rest."""
    from sklearn.datasets import load_digits

    order = np.random.default_rng(0).permutation(len(load_digits().images))
    return order[:HELD_OUT] if split == "test" else order[HELD_OUT:]


def draw_labels(order: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Balanced: digit images float32 [count, 8, 8] in [0, 1] of those in `order`, digits int64, motions int64."""
    from sklearn.datasets import load_digits

    source = load_digits()
    picked = order[rng.permutation(np.arange(count) % len(order))]
    motions = rng.permutation(np.arange(count) % len(MOTIONS))
    return source.images[picked].astype(np.float32) / 16, source.target[picked], motions


def render(images: np.ndarray, motions: np.ndarray, seed: tuple[int, ...], noise: float = 0.1) -> np.ndarray:
    """Clips uint8 [S, FRAMES, SIZE, SIZE] (grey) of images float [S, 8, 8] that move as motions int64 [S] says.

    Random for each clip: place, tilt, size, speed, phase, a slow drift, contrast, background, noise in every pixel.
    """
    rng = np.random.default_rng(seed)
    return grain(moving_glyphs(images, motions, rng), rng, noise)


def moving_glyphs(images: np.ndarray, motions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The digits alone, without contrast, background and noise: float32 [S, FRAMES, SIZE, SIZE] in [0, 1]."""
    angle, half_side, x, y = (torch.from_numpy(a)[..., None, None] for a in _trajectory(motions, rng))
    pixel = torch.arange(SIZE) - (SIZE - 1) / 2
    dx, dy = pixel[None, :] - x, pixel[:, None] - y  # [S, FRAMES, SIZE or 1, SIZE or 1]
    across, down = angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx
    grid = torch.stack([across, down], dim=-1) / (GLYPH_MARGIN * half_side[..., None])
    source = _glyphs(images).repeat_interleave(FRAMES, 0)[:, None]
    shown = F.grid_sample(source, grid.flatten(0, 1).float(), align_corners=False)
    return shown.view(len(images), FRAMES, SIZE, SIZE).numpy()


def grain(shown: np.ndarray, rng: np.random.Generator, noise: float = 0.1) -> np.ndarray:
    """Clips uint8 [S, FRAMES, H, W] of light float32 in [0, 1]: contrast and background of each clip, noise of each
    pixel."""
    contrast, background = (_uniform(rng, len(shown), *limits)[..., None, None] for limits in ((0.6, 1), (0, 0.3)))
    shown = background + (1 - background) * contrast * shown
    shown = shown + noise * rng.standard_normal(shown.shape, dtype=np.float32)
    return (shown.clip(0, 1) * 255).round().astype(np.uint8)


def _glyphs(images: np.ndarray) -> Tensor:
    """8 x 8 images with a border, enlarged to 40 x 40 and sharpened: float32 [S, 40, 40] in [0, 1]."""
    framed = F.pad(torch.from_numpy(images)[:, None], (1, 1, 1, 1))
    large = F.interpolate(framed, scale_factor=4, mode="bicubic", align_corners=False)[:, 0]
    low, high = (torch.sigmoid(torch.tensor(8.0 * (v - 0.5))) for v in (0.0, 1.0))
    return ((torch.sigmoid(8.0 * (large - 0.5)) - low) / (high - low)).clamp(0, 1)


def _uniform(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    return rng.uniform(low, high, size=(count, 1)).astype(np.float32)


def _trajectory(motions: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """(angle in radians, half side, x, y in pixels from the centre), each float32 [S, FRAMES]."""

    def uniform(low: float, high: float) -> np.ndarray:
        return _uniform(rng, len(motions), low, high)

    def sense(forward: int) -> np.ndarray:
        """+1 for a motion, -1 for its opposite, 0 for the others."""
        return ((motions == forward).astype(np.float32) - (motions == forward + 1))[:, None].astype(np.float32)

    time = np.arange(FRAMES, dtype=np.float32) - (FRAMES - 1) / 2
    angle = np.deg2rad(uniform(-20, 20) + sense(0) * uniform(14, 22) * time)
    half_side = uniform(7.5, 10) * np.exp(sense(2) * uniform(0.06, 0.09) * time)
    radius, turn = uniform(4, 6), uniform(0, 2 * np.pi) + np.deg2rad(uniform(30, 50)) * time
    orbit = sense(4)
    turn = np.where(orbit < 0, -turn, turn)
    x, y = (uniform(-2, 2) + uniform(-0.2, 0.2) * time for _ in range(2))
    x = x + np.abs(orbit) * radius * np.cos(turn) + (motions == 6)[:, None] * 1.2 * radius * np.sin(turn)
    y = y + np.abs(orbit) * radius * np.sin(turn) + (motions == 7)[:, None] * 1.2 * radius * np.sin(turn)
    return tuple(a.astype(np.float32) for a in (angle, half_side, x, y))


def write_webm(path: Path, clip: np.ndarray) -> None:
    """Writes uint8 [T, H, W] (grey) as a VP9 file, aside first."""
    with written_aside(path) as aside, av.open(str(aside), "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=FPS)
        stream.height, stream.width = clip.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "24", "b:v": "0", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
        stream.codec_context.thread_count = 1
        for packet in _packets(stream, clip):
            container.mux(packet)


def _packets(stream: av.VideoStream, clip: np.ndarray) -> Iterator[av.Packet]:
    for frame in clip:
        yield from stream.encode(av.VideoFrame.from_ndarray(np.repeat(frame[..., None], 3, axis=2), format="rgb24"))
    yield from stream.encode()
