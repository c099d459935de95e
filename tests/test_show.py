"""`mvd-fast data show`: what it pictures is what training's loader gives, what it writes is what is decoded."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from video_files import data_setup, loader_of, moving_blocks, write_broken, write_list, write_video

from mvd_fast.cli import main
from mvd_fast.data import media, sampling, show
from mvd_fast.data.loader import DataSetup
from mvd_fast.data.sampling import SampleKey
from mvd_fast.data.sheet import PAPER, Page, write_sheet
from mvd_fast.data.show import Shown, decode_file, parse_frames, show_samples
from mvd_fast.errors import UserError
from mvd_kernels import tube_mask


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A list of four videos that DALI decodes on a CPU, or not; 40 to 49 frames of 64 x 48."""
    folder = tmp_path_factory.mktemp("clips")
    endings = ("vp9.webm", "h264.mp4", "mjpeg.avi", "vp8.webm")
    names = [
        write_video(folder / f"{number}_{ending}", 40 + 3 * number, seed=number).name
        for number, ending in enumerate(endings)
    ]
    return write_list(folder / "list.txt", names)


def on_sheet(shown: Shown, panel: int) -> np.ndarray:
    """The frames of a panel, uint8 [T, H, W, 3], cut out of the PNG."""
    sheet, (height, width) = np.asarray(Image.open(shown.sheet)), shown.page.size
    corners = [shown.page.corner(position, panel) for position in range(len(shown.page.frames))]
    return np.stack([sheet[y : y + height, x : x + width] for x, y in corners])


def in_animation(shown: Shown, panel: int) -> list[np.ndarray]:
    """The same out of the WebP."""
    height, width = shown.page.size
    left = panel * (width + 4)
    return [
        np.asarray(frame.convert("RGB"))[:height, left : left + width]
        for frame in ImageSequence.Iterator(Image.open(shown.animation))
    ]


def levels(pixels: torch.Tensor, config: DataSetup) -> np.ndarray:
    """Normalised [3, T, H, W] as uint8 [T, H, W, 3]."""
    back = pixels.permute(1, 2, 3, 0) * torch.tensor(config.data.std) + torch.tensor(config.data.mean)
    return (back * 255).round().clamp(0, 255).numpy().astype(np.uint8)


# ---- samples ----


def test_sheets_and_animations_hold_what_the_loader_gives(clips, tmp_path):
    config, epoch = data_setup(clips, seed=3, flip=0.5), 2
    found = list(show_samples(config, 4, epoch, tmp_path))
    assert len({shown.path for shown in found}) == 4
    with closing(loader_of(config, micro=1)) as loader:
        batches = loader.batches(epoch * loader.steps_per_epoch)
        for shown in found:
            batch = next(batches)
            index = int(batch["index"])
            assert shown.path == loader.paths[index] and shown.key == SampleKey(3, epoch, index)
            crop = levels(batch["video"][0], config)
            assert crop.std() > 20 and np.array_equal(on_sheet(shown, 0), crop)
            mask = tube_mask(3, epoch, torch.tensor([index]), config.request.masks.grid, 0.9).mask[0]
            pixels = mask.reshape(config.request.masks.grid).repeat_interleave(2, 0)
            pixels = pixels.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
            behind = on_sheet(shown, 1)
            assert (behind[pixels] == show.GREY).all() and np.array_equal(behind[~pixels], crop[~pixels])
            info = media.probe_video(shown.path)
            assert shown.frames == sampling.random_clip(shown.key, info.frames, 8, 2).tolist()
            assert len(set(shown.frames)) == 8  # no two frames of the animation are merged
            for panel, expected in enumerate((crop, behind)):
                assert np.array_equal(in_animation(shown, panel), expected)


def test_a_sample_says_who_decoded_it_and_from_what(clips, tmp_path):
    config = data_setup(clips, crop="center")
    lines = {Path(shown.path).name: " ".join(shown.page.lines) for shown in show_samples(config, 4, 0, tmp_path)}
    for name, decoder in {
        "0_vp9.webm": "decoded by DALI",
        "1_h264.mp4": "decoded by PyAV, as DALI has no h264 on a CPU",
        "2_mjpeg.avi": "decoded by DALI",
    }.items():
        assert decoder in lines[name]
    assert "h264 yuv420p, 64 x 48, frames: 43 at 24 a second" in lines["1_h264.mp4"]
    assert "center crop 48 x 48 at x 8, y 0, shown as 32 x 32" in lines["1_h264.mp4"]
    assert "2 of 16 patches visible, the same in each of 4 time slices" in lines["1_h264.mp4"]


def test_a_file_dali_fails_on_says_so(clips, tmp_path, monkeypatch):
    first = show._loader

    def suspicious(*arguments):
        loader = first(*arguments)
        loader.suspects[str(clips.parent / "0_vp9.webm")] = "a reason"
        return loader

    monkeypatch.setattr(show, "_loader", suspicious)
    (shown,) = show_samples(data_setup(clips), 1, 0, tmp_path, str(clips.parent / "0_vp9.webm"))
    assert any("decoded by PyAV, as DALI fails on it: a reason" in line for line in shown.page.lines)


def test_the_same_sample_whenever_and_beside_whatever_it_is_shown(clips, tmp_path):
    config = data_setup(clips)
    longer = list(show_samples(config, 6, 1, tmp_path / "a"))
    assert [shown.key.epoch for shown in longer] == [1, 1, 1, 1, 2, 2]  # a short list goes on with the next epoch
    again = list(show_samples(config, 2, 2, tmp_path / "b"))
    for one, other in zip(longer[4:], again, strict=True):
        assert one.key == other.key and np.array_equal(on_sheet(one, 0), on_sheet(other, 0))
        assert one.animation.read_bytes() == other.animation.read_bytes()
    others = show_samples(replace(config, seed=1), 6, 1, tmp_path / "c")
    assert [shown.frames for shown in others] != [shown.frames for shown in longer]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(
        path.name for shown in again for path in (shown.sheet, shown.animation)
    )


def test_bad_files_are_replaced_as_in_training_and_named(tmp_path):
    words = write_broken(tmp_path)
    write_video(tmp_path / "good_h264.mp4")
    config = data_setup(write_list(tmp_path / "list.txt", [*words, *["good_h264.mp4"] * 8]))
    found = list(show_samples(config, 16, 0, tmp_path / "out"))
    assert {Path(shown.path).name for shown in found} == {"good_h264.mp4"}
    named = [line for shown in found for line in shown.page.lines if line.startswith("in place of")]
    for name, word in words.items():
        assert any(name in line and word in line for line in named)
    for name, word in words.items():
        if name != "missing.mp4" and not name.startswith("holes"):
            with pytest.raises(UserError, match=f"{name} .*{word}"):
                list(show_samples(config, 1, 0, tmp_path / "out", str(tmp_path / name)))


def test_images_and_single_frames(clips, tmp_path):
    folder = tmp_path / "stills"
    folder.mkdir()
    Image.fromarray(moving_blocks(1, 64, 48, 5)[0]).save(folder / "still.png")
    config = data_setup(folder, kind="image", crop="random_resized", mask_ratio=0.75)
    (shown,) = show_samples(config, 1, 0, tmp_path / "out", str(folder / "still.png"))
    with closing(loader_of(config, micro=1)) as loader:
        expected = levels(next(loader.batches(0))["image"][0][:, None], config)
    assert np.array_equal(on_sheet(shown, 0), expected) and shown.frames == [0]
    assert np.array_equal(in_animation(shown, 0), expected)
    assert "decoded by DALI" in shown.page.lines and "4 of 16 patches visible" in shown.page.lines
    (frame,) = show_samples(data_setup(clips, kind="frame"), 1, 0, tmp_path / "out")
    assert frame.frames == sampling.random_frame(frame.key, media.probe_video(frame.path).frames).tolist()


def test_each_of_several_masks_has_a_panel(clips, tmp_path):
    config = data_setup(clips, masks=2)
    (shown,) = show_samples(config, 1, 0, tmp_path)
    with closing(loader_of(config, micro=2)) as loader:
        masks = next(loader.batches(0))["mask"][0].reshape(2, *config.request.masks.grid)
    for panel, mask in enumerate(masks, start=1):
        grey = (on_sheet(shown, panel)[::2, ::8, ::8] == show.GREY).all(-1)
        assert np.array_equal(grey, mask.numpy())


def test_labelled_clips_show_their_label_and_augmentation_but_no_mask(clips, tmp_path):
    augment = {"repeats": 2, "random_erasing": 1.0, "mixup": 0.8}
    config = data_setup(clips, kind="labelled", classes=4, augment=augment)
    found = list(show_samples(config, 4, 0, tmp_path))
    assert [shown.key.copy for shown in found] == [0, 1, 0, 1]
    with closing(loader_of(config, micro=4)) as loader:
        batch = next(loader.batches(0))
    for row, shown in enumerate(found):
        assert np.array_equal(on_sheet(shown, 0), levels(batch["video"][row], config))
        assert list(shown.page.panels) == ["crop"] and f"label {batch['label'][row]}" in shown.page.lines


def test_boxes_lie_on_the_crop_of_their_clip(clips):
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0]])
    row = show._row({"video": torch.zeros(2, 3, 1, 32, 32), "boxes": boxes, "box_clip": torch.tensor([0, 1])}, 1)
    crop = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    drawn = show._overlays(crop, row, None)["boxes"][0].any(-1)
    rows, columns = np.nonzero(drawn)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 31, 8, 15)
    assert not drawn[19:28, 11:13].any()  # an outline, not a patch


# ---- frames ----


@pytest.mark.parametrize("name", ["0_vp9.webm", "1_h264.mp4"])
def test_frames_are_those_of_the_decoder(clips, tmp_path, name):
    path, out = str(clips.parent / name), tmp_path / "new" / "frames.npz"
    info = media.probe_video(path)
    everything = media.decode_frames(path, np.arange(info.frames), info)
    assert main(["data", "show", path, "--frames", "14,0,7,7,-1,30:40:4", "--out", str(out)]) == 0
    with np.load(out) as found:
        assert found.files == ["frames", "index"]
        assert found["index"].tolist() == [14, 0, 7, 7, info.frames - 1, 30, 34, 38]
        assert found["frames"].dtype == np.uint8 and np.array_equal(found["frames"], everything[found["index"]])
    assert len({frame.tobytes() for frame in everything}) == info.frames


def test_frames_of_an_image(tmp_path):
    pixels = moving_blocks(1, 40, 30, 1)[0]
    Image.fromarray(pixels).save(tmp_path / "still.png")
    frames, index = decode_file(str(tmp_path / "still.png"), "0,0")
    assert np.array_equal(frames, [pixels, pixels]) and index.tolist() == [0, 0]
    with pytest.raises(UserError, match=r"still.png has no frame 1: its frames are 0 to 0"):
        decode_file(str(tmp_path / "still.png"), "1")
    (tmp_path / "cut.png").write_bytes((tmp_path / "still.png").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut.png is truncated"):
        decode_file(str(tmp_path / "cut.png"), "0")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("0", [0]), (" 9 , 0", [9, 0]), ("-10", [0]), (":", list(range(10))), ("::-4", [9, 5, 1]), ("-2:", [8, 9])],
)
def test_which_frames(wanted, found):
    assert parse_frames(wanted, 10, "clip.mp4").tolist() == found


@pytest.mark.parametrize("wanted", ["10", "0,10", "-11", "10:20", "3:3"])
def test_frames_that_are_not_there_are_refused(wanted):
    part = wanted.split(",")[-1]
    with pytest.raises(UserError, match=f"clip.mp4 has no frame {part}: its frames are 0 to 9"):
        parse_frames(wanted, 10, "clip.mp4")


@pytest.mark.parametrize("wanted", ["", "a", "1,", "1.5", "1:2:3:4", "1:2:0", "--1"])
def test_what_names_no_frames_is_refused(wanted):
    with pytest.raises(UserError, match="--frames takes numbers and slices"):
        parse_frames(wanted, 10, "clip.mp4")


# ---- the command ----


def test_without_a_config_a_recipes_settings_hold(clips, tmp_path, capsys):
    assert main(["data", "show", str(clips), "--samples", "1", "--seed", "7", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "seed 7, epoch 0" in printed and "shown as 224 x 224" in printed and "multiscale crop" in printed
    assert "20 of 196 patches visible, the same in each of 8 time slices" in printed
    (sheet,) = tmp_path.glob("*.png")
    assert str(sheet) in printed and sheet.with_suffix(".webp").is_file()
    with Image.open(sheet) as picture:
        assert picture.width >= 8 * 224


def test_a_lone_image_is_shown_by_the_recipe_of_images(tmp_path, capsys):
    Image.fromarray(moving_blocks(1, 40, 30, 1)[0]).save(tmp_path / "still.png")
    options = ["--samples", "1", "--set", "mask.ratio=0.5", "--out", str(tmp_path / "out")]
    assert main(["data", "show", str(tmp_path / "still.png"), *options]) == 0
    printed = capsys.readouterr().out
    assert "random_resized crop" in printed and "98 of 196 patches visible\n" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.mp4"], "nowhere.mp4 does not exist"),
        (["{list}", "--frames", "0", "--out", "x.npz"], "takes one video or image"),
        (["{file}", "--frames", "0"], "needs --out FILE.npz"),
        (["{file}", "--frames", "0", "--out", "x.png"], "must end in .npz, not 'x.png'"),
        (["{file}", "--frames", "0,99", "--out", "x.npz"], "0_vp9.webm has no frame 99: its frames are 0 to 39"),
        (["{file}", "--frames", "0", "--epoch", "1", "--out", "x.npz"], "leave out --epoch"),
        (["{text}", "--frames", "0", "--out", "x.npz"], "broken.mp4 is not a readable video"),
        (["{folder}", "--out", "{folder}/shown"], "lies in the dataset"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(clips, tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    places = {"list": clips, "folder": clips.parent, "file": clips.parent / "0_vp9.webm", "text": "broken.mp4"}
    assert main(["data", "show", *(word.format(**places) for word in arguments)]) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken.mp4"]


@pytest.mark.parametrize(
    ("arguments", "writer"),
    [(["--frames", "0", "--out", "x.npz"], (np, "savez")), (["--out", "x"], (Image.Image, "save"))],
)
def test_a_full_disk_is_one_sentence(clips, tmp_path, capsys, monkeypatch, arguments, writer):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(*writer, full)
    assert main(["data", "show", str(clips.parent / "1_h264.mp4"), *arguments]) == 2
    assert f"{arguments[-1]} cannot be written (No space left on device); name another --out" in capsys.readouterr().err


def test_odd_names_are_printed_and_kept(clips, tmp_path, capsys):
    odd = os.fsdecode(b"caf\xe9 \xe2\x80\xa8 #1.webm")
    (tmp_path / odd).write_bytes((clips.parent / "0_vp9.webm").read_bytes())
    assert main(["data", "show", str(tmp_path / odd), "--samples", "1", "--out", str(tmp_path / "out")]) == 0
    first = capsys.readouterr().out.encode().decode().splitlines()[0]
    assert r"caf\xe9 \u2028 #1.webm" in first
    assert main(["data", "show", str(tmp_path / odd), "--frames", "0", "--out", str(tmp_path / f"{odd}.npz")]) == 0
    assert (tmp_path / f"{odd}.npz").is_file()


def test_text_stays_on_the_sheet(tmp_path):
    """Long and odd names are wrapped and escaped, not cut off."""
    frames = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    page = Page("/" + "w" * 300 + " \udcff\u2028\n/x", ["a word " * 60], [0], {"crop": frames})
    write_sheet(page, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet[:, -10:] == PAPER).all() and (sheet[:, :10] == PAPER).all()
    text = "".join(line for line, _, _ in page.text())
    assert text.startswith("/" + "w" * 300) and r"\xff\u2028\n/x" in text and text.count("word") == 60
