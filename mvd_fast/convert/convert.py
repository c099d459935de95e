"""`mvd-fast convert SRC DST --to LAYOUT`: a checkpoint in another project's names and files."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mvd_fast.arguments import positive
from mvd_fast.errors import UserError

from . import layouts

if TYPE_CHECKING:
    from .network import Faults, Network
    from .storage import Source

DESCRIPTION = (
    "Convert a checkpoint. SRC: a .pth or .safetensors file of MAE, VideoMAE, MVD, timm (video) or ours, a Hugging "
    "Face VideoMAE folder, a run folder or one of its checkpoints. What it is, is read from names and shapes."
)
ABOUT_EPS = "note: the LayerNorm eps of {} is {:g} in the source, and 1e-06 in networks of this layout"


def main(argv: Sequence[str] | None = None) -> int:
    """Converts and prints what was read, changed, left out and written."""
    args = _parser().parse_args(argv)
    options = vars(args)
    source, target, layout = options.pop("source"), options.pop("target"), options.pop("to")
    for line in convert(source, target, layout, **options):
        print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mvd-fast convert", description=DESCRIPTION)
    parser.add_argument("source", metavar="SRC", help="file or folder to read")
    parser.add_argument("target", metavar="DST", help="hf: a folder; else a file ending in .safetensors or .pth")
    parser.add_argument("--to", required=True, choices=layouts.names(), help="whose names and files to write")
    parser.add_argument(
        "--heads", type=positive, help="attention heads, where the width is not that of ViT-S, B, L or H"
    )
    parser.add_argument("--positions", choices=("3d", "1d"), help="of a video network that does not store its table: "
                        "3d as in MVD, 1d as in VideoMAE")  # fmt: skip
    parser.add_argument("--image-size", type=positive, metavar="PIXELS", help="make the position tables for this size")
    parser.add_argument("--frames", type=positive, metavar="N", help="make the position tables for clips of N frames")
    parser.add_argument("--partial", action="store_true", help="convert what fits and list the rest, not an error then")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    return parser


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    heads: int | None = None,
    positions: str | None = None,
    image_size: int | None = None,
    frames: int | None = None,
    partial: bool = False,
    force: bool = False,
) -> list[str]:
    """Reads, recognises, renames and writes; `target` is complete or untouched. Returns the report, line by line.

    Raises UserError for a source that is damaged, unknown or incomplete, for a target that exists, and where the
    layout cannot hold such a network. With `partial` keys that are missing, unexpected or of another shape, and
    positions that the layout cannot keep, are only listed.
    """
    from .network import resized
    from .storage import class_names
    from .weights import WeightsError

    target, layout = Path(target), layouts.load(to)
    _check_target(target, layout, force)
    found, reader, network, faults = read_network(source, heads, positions)
    count = len(network.state) + len(faults.unexpected) + len(faults.reshaped)
    report = [f"read {found.path}: {network.describe()}; {count} tensors with the names of {reader}"]
    network, line = resized(network, image_size, frames)
    report.append(f"positions: {line}")
    kept = layout.select(network)
    lost = [f"lost in {to}: {what}"] if (what := layout.loses(network)) else []
    if (problems := faults.lines(most=4) + lost) and not partial:
        raise WeightsError(f"{found.path} does not convert to {to} as a whole ({'; '.join(problems)}): --partial "
                           "converts the rest")  # fmt: skip
    layout.write(kept, network, found, target)
    report += faults.lines() + lost
    report += _remarks(network, kept, layout, to)
    if class_names(found, network) and target.suffix in (".pth", ".pt"):
        report.append("note: the names of the classes are left out; .safetensors files and folders keep them")
    return [*report, f"wrote {target}"]


def read_network(
    source: str | Path, heads: int | None = None, positions: str | None = None
) -> tuple[Source, str, Network, Faults]:
    """The source with all facts known of it, the layout of its names, its network, and what does not fit that.

    Raises WeightsError (a ValueError) for a source that is damaged or unknown.
    """
    from .network import check, recognise
    from .storage import read_source

    found = read_source(source)
    reader, state, facts = _read(found)
    asked = {"num_heads": heads, "positions": positions}
    facts = facts | found.facts | {name: value for name, value in asked.items() if value is not None}
    network, faults = check(recognise(state, facts, str(found.path)))
    return replace(found, facts=facts), reader, network, faults


def _read(found: Source) -> tuple[str, dict, dict]:
    """Which layout the names are of, the tensors with our names, and what the layout implies."""
    from .weights import WeightsError

    for name in layouts.names():
        layout = layouts.load(name)
        if layout.recognises(found.state):
            return name, *layout.read(found)
    raise WeightsError(
        f"{found.path} has the names of no network that is known here ({', '.join(layouts.names())}); it begins with "
        f"{', '.join(sorted(found.state)[:4])}"
    )


def _check_target(target: Path, layout: ModuleType, force: bool) -> None:
    from .storage import FILE_ENDINGS

    if not layout.FOLDER and target.suffix not in FILE_ENDINGS:
        raise UserError(f"DST {target} must end in one of {', '.join(FILE_ENDINGS)}")
    if layout.FOLDER and target.suffix in FILE_ENDINGS:
        raise UserError(f"DST {target} must be a folder's name, as this layout consists of several files")
    if target.exists() and (target.is_dir() != layout.FOLDER or not force):
        kind = "folder" if target.is_dir() else "file"
        ways = "--force replaces it" if target.is_dir() == layout.FOLDER else "and cannot be replaced by this layout"
        raise UserError(f"DST {target} exists (a {kind}); {ways}")


def _remarks(network: Network, kept: Iterable[str], layout: ModuleType, to: str) -> list[str]:
    from mvd_fast.models.layers import LN_EPS

    remarks, sizes = [], network.sizes
    if left := sorted(set(network.state) - set(kept)):
        remarks.append(f"left out ({to} holds {layout.HOLDS}): {', '.join(_grouped(left))}")
    if not layout.FOLDER:  # a folder has a config for it
        ends = sorted({n.removesuffix(".weight") for n in kept if n in ("fc_norm.weight", "decoder.norm.weight")})
        eps = {"the blocks": sizes.norm_eps, **dict.fromkeys(ends, sizes.head_eps)}
        remarks += [ABOUT_EPS.format(where, value) for where, value in eps.items() if value != LN_EPS]
    if "pos_embed" in kept and network.positions == "1d" and to == "mvd":
        remarks.append("note: pos_embed holds VideoMAE's 1-D table; code that makes 3-D positions itself ignores it")
    if layout.FOLDER and "pos_embed" in kept:
        remarks.append("note: load it with trust_remote_code=True, or see its README.md for transformers' own classes")
    return remarks


def _grouped(names: Sequence[str]) -> list[str]:
    """`decoder.norm.weight`, ... as `decoder.* (28)`."""
    counts = Counter(name.split(".")[0] for name in names)
    single = {name.split(".")[0]: name for name in names}
    return [f"{top}.* ({count})" if count > 1 else single[top] for top, count in counts.items()]
