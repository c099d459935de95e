"""`mvd-fast data show`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from mvd_fast.arguments import add_set_argument, positive, whole
from mvd_fast.config.load import load_config
from mvd_fast.config.run import RunConfig
from mvd_fast.errors import UserError
from mvd_fast.names import printable

# Whose settings hold where no config is named: 16 frames, every 4th, multiscale crop of 224, 90 % masked; MAE's.
RECIPES = {"video": "vits_from_vitb", "image": "mae_vits"}
OF_SAMPLES = {"samples": 4, "epoch": 0, "config": "", "set": [], "seed": None, "root": ""}  # and their defaults


def main(argv: Sequence[str] | None = None) -> int:
    """Pictures samples of a list, folder or file, or writes frames of a file; 0."""
    chosen = _parser().parse_args(argv)
    given = [name for name, default in OF_SAMPLES.items() if getattr(chosen, name) != default]
    if not os.path.exists(chosen.list):
        raise UserError(f"{chosen.list} does not exist; name a list, a folder, a video or an image")
    if chosen.frames is None:
        return _show_samples(chosen)
    if given:
        raise UserError(f"--frames writes frames as they are decoded; leave out --{given[0]}")
    return _save_frames(chosen)


def _save_frames(chosen: argparse.Namespace) -> int:
    from mvd_fast.data.show import is_media, save_frames

    if os.path.isdir(chosen.list) or not is_media(chosen.list):
        raise UserError(f"--frames takes one video or image, and {chosen.list} is a list or a folder")
    if not chosen.out:
        raise UserError("--frames needs --out FILE.npz, the file to write")
    shape = save_frames(chosen.list, chosen.frames, chosen.out)
    print(printable(f"{chosen.out}: frames uint8 {list(shape)}, index int64 [{shape[0]}]"))
    return 0


def _show_samples(chosen: argparse.Namespace) -> int:
    from mvd_fast.data.show import is_media, show_samples

    file = chosen.list if os.path.isfile(chosen.list) and is_media(chosen.list) else ""
    for shown in show_samples(_config(chosen), chosen.samples, chosen.epoch, chosen.out or "shown", file):
        print(printable(f"{shown.sheet}, {shown.animation.name}: {shown.path}"))
        print(*(printable(f"  {line}") for line in shown.page.lines), sep="\n", flush=True)
    return 0


def _config(chosen: argparse.Namespace) -> RunConfig:
    from mvd_fast.data.show import shows_images

    name = chosen.config or RECIPES["image" if shows_images(chosen.list, chosen.root) else "video"]
    config = load_config(name, chosen.set)
    data = config.data.replaced(train=chosen.list, root=chosen.root or config.data.root)
    return config.replaced(data=data, seed=config.seed if chosen.seed is None else chosen.seed)


def _parser() -> argparse.ArgumentParser:
    program = "mvd-fast data show"
    parser = argparse.ArgumentParser(
        program,
        usage=f"{program} [-h] LIST_OR_FILE [--samples N] [--out FOLDER] [...]\n"
        f"       {program} FILE --frames 0,7,14 --out FILE.npz",
        description="What training sees: an animation and a sheet of each sample, out of training's own loader (crop, "
        "mask, numbers of the frames, decoder). With --frames, decoded frames of one file as NumPy arrays.",
    )
    parser.add_argument("list", metavar="LIST_OR_FILE", help="list, folder, video or image")
    parser.add_argument("--out", default="", metavar="PATH", help="folder to write to (default: shown), or .npz file")
    group = parser.add_argument_group("samples")
    group.add_argument("--samples", type=positive, default=OF_SAMPLES["samples"], metavar="N", help="how many (4)")
    group.add_argument("--epoch", type=whole, default=OF_SAMPLES["epoch"], metavar="E", help="from 0 on (0)")
    group.add_argument("--seed", type=whole, metavar="S", help="of the run (default: the config's)")
    group.add_argument("--root", default="", metavar="FOLDER", help="where a list's relative paths start")
    group.add_argument(
        "--config",
        default="",
        metavar="FILE",
        help=f"the run's JSON file or recipe (default: {RECIPES['video']}; of images {RECIPES['image']})",
    )
    add_set_argument(group)
    group = parser.add_argument_group("frames")
    group.add_argument(
        "--frames",
        metavar="NUMBERS",
        help="which, such as 0,7,14 or 0:50:4, in any order; --frames=-1 is the last. Written to --out: `frames` uint8 "
        "[n, H, W, 3] and `index` [n]",
    )
    return parser
