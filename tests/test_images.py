"""Image files of every kind: the same right pixels from either decoder, or refused with a reason."""

from __future__ import annotations

import io
import re
import struct
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from video_files import data_setup, loader_of, write_list, write_video

from mvd_fast.data import images
from mvd_fast.data.check import check_list
from mvd_fast.data.media import BadFile

SIDE = 32
DATA = Path(__file__).parent / "data"


def smooth_picture() -> Image.Image:
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


PICTURE = smooth_picture()
RGB = np.asarray(PICTURE)
DEEP = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)  # black to white
DEEP_RGB = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=-1)


# ---- writing what Pillow does not write ----


def saved(picture: Image.Image, file_format: str, **options) -> bytes:
    written = io.BytesIO()
    picture.save(written, file_format, **options)
    return written.getvalue()


def png(pixels: np.ndarray, colour: int, *more: bytes) -> bytes:
    """A 16-bit PNG of uint16 [H, W, ...]; `more` are chunks before the pixels."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return images.PNG_START + b"".join(chunks)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def pnm(pixels: np.ndarray, white: int) -> bytes:
    """A binary PGM [H, W] or PPM [H, W, 3] of values from 0 to `white`."""
    height, width = pixels.shape[:2]
    header = f"P{5 if pixels.ndim == 2 else 6}\n# a comment\n{width} {height}\n{white}\n".encode()
    return header + pixels.astype(">u2" if white > 255 else np.uint8).tobytes()


def tiff(pixels: bytes, bits: int, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """An uncompressed TIFF of SIDE x SIDE pixels of one channel."""
    tags = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: SIDE, 279: len(pixels)}
    tags[339] = sample_format
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(pixels))
    return start + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def twelve_bits(values: np.ndarray) -> bytes:
    """Values below 4096, two of them in three bytes."""
    first, second = values.reshape(-1, 2).T.astype(np.uint16)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()


def ycck() -> bytes:
    """A JPEG of luma, chroma and an empty black, inverted as Adobe does."""
    y, cb, cr = (np.asarray(channel) for channel in Image.fromarray(255 - RGB).convert("YCbCr").split())
    inks = Image.merge("CMYK", [Image.fromarray(255 - channel) for channel in (y, cb, cr, np.full_like(y, 255))])
    written = bytearray(saved(inks, "JPEG", quality=100))
    written[written.index(b"Adobe") + 11] = 2  # the transform of the first three channels
    return bytes(written)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1).astype(np.uint8)


def from_white(values: np.ndarray, white: int) -> np.ndarray:
    """Of 0 to `white` to 0 to 255."""
    return (values.astype(np.float64) * 255 / white).round().astype(np.uint8)


def below(white: int) -> np.ndarray:
    """DEEP in 0 to `white`."""
    return (DEEP.astype(np.float64) * white / 65535).round().astype(np.uint16)


# ---- the kinds: file -> its bytes, its right pixels [SIDE, SIDE, 3], how far off a pixel may be, whether DALI decodes

LOSSY = 40  # levels; single pixels at this quality
ALPHA = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (SIDE, 1)))
GREY = np.asarray(PICTURE.convert("L"))


def with_alpha(mode: str) -> Image.Image:
    picture = PICTURE.convert(mode)
    picture.putalpha(ALPHA)
    return picture


def pillow_kinds() -> dict[str, tuple[bytes, np.ndarray, int, bool]]:
    """Eight bits a channel or fewer."""
    palette, transparency = PICTURE.convert("P"), bytes(range(256))
    few, bits = np.asarray(palette.convert("RGB")), np.asarray(PICTURE.convert("1"))
    inks = PICTURE.convert("CMYK")
    whole = saved(PICTURE, "JPEG", quality=95)
    kinds = {
        "baseline.jpg": (whole, RGB, LOSSY, True),
        "full_chroma.jpg": (saved(PICTURE, "JPEG", quality=95, subsampling="4:4:4"), RGB, 12, True),
        "half_chroma.jpg": (saved(PICTURE, "JPEG", quality=95, subsampling="4:2:2"), RGB, LOSSY, True),
        "progressive.jpg": (saved(PICTURE, "JPEG", quality=95, progressive=True), RGB, LOSSY, True),
        "restart_markers.jpg": (saved(PICTURE, "JPEG", quality=95, restart_marker_blocks=1), RGB, LOSSY, True),
        "no_luma.jpg": (saved(PICTURE, "JPEG", quality=95, keep_rgb=True), RGB, LOSSY, True),
        "grey.jpg": (saved(PICTURE.convert("L"), "JPEG", quality=95), grey(GREY), 12, True),
        "two_pictures.jpg": (two_pictures(), RGB, LOSSY, True),
        "padded.jpg": (whole + bytes(9000), RGB, LOSSY, True),
        "cmyk.jpg": (saved(inks, "JPEG", quality=95), np.asarray(inks.convert("RGB")), LOSSY, False),
        "ycck.jpg": (ycck(), RGB, 12, False),
        "rgb.png": (saved(PICTURE, "PNG"), RGB, 0, True),
        "padded.png": (saved(PICTURE, "PNG") + bytes(9000), RGB, 0, True),
        "grey.png": (saved(PICTURE.convert("L"), "PNG"), grey(GREY), 0, True),
        "one_bit.png": (saved(PICTURE.convert("1"), "PNG"), grey(255 * bits), 0, True),
        "alpha.png": (saved(with_alpha("RGB"), "PNG"), RGB, 0, True),
        "grey_alpha.png": (saved(with_alpha("L"), "PNG"), grey(GREY), 0, True),
        "palette.png": (saved(palette, "PNG"), few, 0, True),
        "transparent_index.png": (saved(palette, "PNG", transparency=3), few, 0, True),
        "transparent_palette.png": (saved(palette, "PNG", transparency=transparency), few, 0, True),
        "transparent_colour.png": (saved(PICTURE, "PNG", transparency=(1, 2, 3)), RGB, 0, True),
        "lossless.webp": (saved(PICTURE, "WEBP", lossless=True), RGB, 0, True),
        "alpha.webp": (saved(with_alpha("RGB"), "WEBP", lossless=True, exact=True), RGB, 0, True),
        "rgb.bmp": (saved(PICTURE, "BMP"), RGB, 0, False),
        "one_bit.bmp": (saved(PICTURE.convert("1"), "BMP"), grey(255 * bits), 0, False),
        "palette.bmp": (saved(palette, "BMP"), few, 0, False),
        "one_bit.ppm": (saved(PICTURE.convert("1"), "PPM"), grey(255 * bits), 0, False),
    }
    modes = {"1": grey(255 * bits), "L": grey(GREY), "LA": grey(GREY), "P": few, "RGB": RGB, "RGBA": RGB}
    for mode, right in (modes | {"CMYK": np.asarray(inks.convert("RGB"))}).items():
        kinds[f"{mode}.tif"] = (saved(PICTURE.convert(mode), "TIFF", compression="tiff_lzw"), right, 0, False)
    return kinds


def two_pictures() -> bytes:
    """A JPEG of which a marker says that another one follows behind its end (MPF)."""
    written = io.BytesIO()
    PICTURE.save(written, "MPO", save_all=True, append_images=[PICTURE.rotate(180)], quality=95)
    return written.getvalue()


def deep_kinds() -> dict[str, tuple[bytes, np.ndarray, int, bool]]:
    """More than eight bits a channel, or a white of its own."""
    right, right_rgb = grey(from_white(DEEP, 65535)), from_white(DEEP_RGB, 65535)
    little, big = DEEP.astype("<u2").tobytes(), DEEP.astype(">u2").tobytes()
    with_alpha16 = np.concatenate([DEEP_RGB, DEEP[..., None]], axis=-1)
    kinds = {
        "grey16.png": (png(DEEP, 0), right, 0, False),
        "grey16_transparent.png": (png(DEEP, 0, chunk(b"tRNS", b"\0\7")), right, 0, False),
        "grey_alpha16.png": (png(np.stack([DEEP, DEEP[::-1]], axis=-1), 4), right, 1, False),
        "rgb16.png": (png(DEEP_RGB, 2), right_rgb, 1, False),
        "rgba16.png": (png(with_alpha16, 6), right_rgb, 1, False),
        "little_endian16.tif": (tiff(little, 16), right, 0, False),
        "big_endian16.tif": (tiff(big, 16, order=">"), right, 0, False),
        "white_is_zero16.tif": (tiff(little, 16, photometric=0), 255 - right, 0, False),
        "white_is_zero8.tif": (tiff(right[..., 0].tobytes(), 8, photometric=0), 255 - right, 0, False),
        "twelve_bits.tif": (tiff(twelve_bits(below(4095)), 12), grey(from_white(below(4095), 4095)), 0, False),
    }
    for white in (1, 3, 15, 100, 254, 256, 1023, 4095, 65535):
        levels, colours = below(white), (DEEP_RGB.astype(np.uint64) * white // 65535).astype(np.uint16)
        kinds[f"white_{white}.pgm"] = (pnm(levels, white), grey(from_white(levels, white)), 1, False)
        kinds[f"white_{white}.ppm"] = (pnm(colours, white), from_white(colours, white), 1, False)
    kinds["text.pgm"] = (
        f"P2 {SIDE} {SIDE} 15\n{' '.join(map(str, below(15).ravel()))}\n".encode(),
        grey(from_white(below(15), 15)),
        1,
        False,
    )
    kinds["white_255.pgm"] = (pnm(GREY, 255), grey(GREY), 0, False)
    return kinds


KINDS = {
    **pillow_kinds(),
    **deep_kinds(),
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """What training shows of every kind, uint8 [SIDE, SIDE, 3]: as it comes, and with DALI failing on every file."""
    folder = tmp_path_factory.mktemp("images")
    for name, (content, *_) in KINDS.items():
        (folder / name).write_bytes(content)
    listed = write_list(folder / "list.txt", KINDS)
    count = len(KINDS)
    config = data_setup(listed, kind="image", crop="center", mean=(0, 0, 0), std=(1, 1, 1))
    by = {}
    for decoder in ("DALI", "Pillow"):
        with closing(loader_of(config, micro=count)) as loader:
            loader.suspects.update(dict.fromkeys(loader.paths, "on trial") if decoder == "Pillow" else {})
            batch = next(loader.batches(0))
            assert not loader.bad_files
            pixels = (batch["image"] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            by[decoder] = {Path(name).name: one for name, one in zip(loader.names(batch["index"]), pixels, strict=True)}
    return by


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_shows_its_pixels_by_either_decoder(shown, name):
    content, right, tolerance, by_dali = KINDS[name]
    info = images.probe_image(np.frombuffer(content, np.uint8))
    assert (info.width, info.height, info.is_plain) == (SIDE, SIDE, by_dali)
    assert np.array_equal(shown["DALI"][name], shown["Pillow"][name])
    off = np.abs(shown["DALI"][name].astype(int) - right)
    assert off.max() <= tolerance and off.mean() <= tolerance / 6


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("float", tiff((DEEP / 65535).astype("<f4").tobytes(), 32, sample_format=3), "floating-point pixels"),
        ("float, big-endian", tiff(DEEP.astype(">f4").tobytes(), 32, 1, 3, ">"), "floating-point pixels"),
        ("double", tiff(DEEP.astype("<f8").tobytes(), 64, sample_format=3), "no such format or pixels"),
        ("signed", tiff((DEEP // 2).astype("<i2").tobytes(), 16, sample_format=2), "signed pixels"),
        ("signed bytes", tiff((DEEP // 512).astype("i1").tobytes(), 8, sample_format=2), "signed pixels"),
        ("32 bits", tiff(DEEP.astype("<u4").tobytes(), 32), "32-bit pixels"),
        ("PFM", b"Pf\n32 32\n-1.0\n" + (DEEP / 65535).astype("<f4").tobytes(), "floating-point pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pixels_without_a_known_range_are_refused(name, content, word):
    data = np.frombuffer(content, np.uint8)
    with pytest.raises(BadFile, match=word):
        images.probe_image(data)
    with pytest.raises(BadFile, match=word):
        images.decode_image(data)


# ---- where a file ends ----


def with_thumbnail(jpeg: bytes) -> bytes:
    """With a whole small JPEG, end marker included, inside of an application segment."""
    inner = b"Exif\0\0" + saved(PICTURE.resize((16, 16)), "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(inner) + 2) + inner + jpeg[2:]


def ended_files() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    return {
        "baseline": saved(noise, "JPEG"),
        "progressive": saved(noise, "JPEG", progressive=True),
        "restart markers": saved(noise, "JPEG", restart_marker_blocks=1),
        "thumbnail": with_thumbnail(saved(noise, "JPEG")),
        "fill bytes": saved(noise, "JPEG").replace(b"\xff\xda", b"\xff\xff\xff\xda"),
        "PNG": saved(noise, "PNG"),
    }


@pytest.mark.parametrize("kind", ended_files())
def test_a_file_may_go_on_behind_its_end_but_not_stop_before_it(kind, tmp_path):
    whole = ended_files()[kind]
    right = images.decode_image(np.frombuffer(whole, np.uint8))
    video = write_video(tmp_path / "clip_h264.mp4", 12).read_bytes()
    for behind in (b"", b"\0", bytes(9000), video, whole, b"\xff" * 50, whole[: len(whole) // 2]):
        data = np.frombuffer(whole + behind, np.uint8)
        assert (images.probe_image(data).width, images.probe_image(data).height) == (64, 48)
        assert np.array_equal(images.decode_image(data), right)
    for share in (0.5, 0.75, 0.9, 0.99):
        for behind in (b"", bytes(9000)):
            data = np.frombuffer(whole[: int(share * len(whole))] + behind, np.uint8)
            with pytest.raises(BadFile, match=r"truncated|damaged"):
                images.probe_image(data)
    with pytest.raises(BadFile, match="truncated"):
        images.probe_image(np.frombuffer(whole[: -8 if kind == "PNG" else -2], np.uint8))


def test_a_motion_photo_is_usable(tmp_path):
    """A JPEG with an MP4 behind it, as phones write; made as long as theirs are."""
    photo = (DATA / "motion_photo.jpg").read_bytes()
    (tmp_path / "photo.jpg").write_bytes(photo + photo[photo.index(b"ftyp") :] * 100)
    listed = write_list(tmp_path / "list.txt", ["photo.jpg"])
    config = data_setup(listed, kind="image", crop="whole", mean=(0, 0, 0), std=(1, 1, 1))
    with closing(loader_of(config, micro=1)) as loader:
        shown = next(loader.batches(0))["image"][0].permute(1, 2, 0).numpy() * 255
        assert not loader.bad_files
    still = Image.open(DATA / "motion_photo.jpg").convert("RGB")
    assert np.abs(shown - np.asarray(still.resize((SIDE, SIDE), Image.Resampling.BILINEAR))).mean() < 0.5
    patches = np.asarray(still)[64:80, 8::32].mean(axis=0)[:4]  # the lower half: red, green, blue, grey
    assert np.abs(patches - [(200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128)]).max() <= 6


def test_data_check_judges_images_as_training_does(tmp_path):
    contents = {name: content for name, (content, *_) in KINDS.items()}
    whole = ended_files()["baseline"]
    bad = {
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "cut_thumbnail.jpg": (with_thumbnail(whole)[:-300], "truncated"),
        "float.tif": (tiff((DEEP / 65535).astype("<f4").tobytes(), 32, sample_format=3), "floating-point"),
        "cut.tif": (contents["big_endian16.tif"][:1500], "readable|decoded"),
    }
    contents |= {name: content for name, (content, _) in bad.items()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    report = check_list(str(write_list(tmp_path / "list.txt", contents)), decode=True, console=Console(quiet=True))
    found = {Path(path).name: reason for path, reason in report.bad.items()}
    assert found.keys() == bad.keys()
    for name, (_, word) in bad.items():
        assert re.search(word, found[name])
