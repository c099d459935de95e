"""What a state dict is: the network, its sizes and its positions, read from names and shapes.

The names used here ("ours") are the reference MVD's, whatever file a network came from: its encoder is `patch_embed`,
`blocks`, `norm`, an image encoder's also `cls_token`; the classifier's end is `fc_norm`, `head`, the detector's `head`;
everything else is a pre-training decoder's and keeps the name that it has in its own project.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from mvd_fast.config.network import ClipConfig, DecoderConfig, ViTConfig
from mvd_fast.errors import UserError
from mvd_fast.models import ImageTeacher, MaskedAutoencoder, MaskedVideoStudent, VideoClassifier, VideoMAE
from mvd_fast.models.layers import LN_EPS
from mvd_fast.models.student import RELEASED, TargetDecoder
from mvd_fast.models.videomae import VideoEncoder

from . import tables
from .weights import WeightsError, few

STANDARD_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16}
STANDARD_NAMES = {(384, 12): "ViT-S", (768, 12): "ViT-B", (1024, 24): "ViT-L", (1280, 32): "ViT-H"}
# Of a clip where nothing says otherwise.
DEFAULT_SIZE, DEFAULT_FRAMES = 224, 16
TITLES = {
    "student": "MVD student",
    "videomae": "VideoMAE",
    "mae": "image ViT (MAE)",
    "classifier": "video classifier",
    "detector": "action detector",
    "encoder": "video encoder",
}
ENCODER = ("patch_embed.", "blocks.", "norm.", "cls_token", "pos_embed")
HEAD = ("fc_norm.", "head.")
CLIP_SIZES = ("image_size", "patch_size", "num_frames", "tubelet_size", "embed_dim", "depth", "num_heads")
IMAGE_SIZES = tuple(name for name in CLIP_SIZES if name not in ("num_frames", "tubelet_size"))
DECODER = re.compile(r"(?:down|decoder)_(\w+)\.")  # of a student; an image network's is `decoder_blocks`, ...


@dataclass(frozen=True)
class Sizes:
    """What it takes to build the network; lengths in pixels and frames. Images have one frame and tubes of one."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    tubelet_size: int
    image_size: int
    num_frames: int
    num_classes: int = 0
    decoder_dim: int = 0
    decoder_depth: int = 0
    decoders: tuple[TargetDecoder, ...] = ()  # a student's
    # Of the blocks' and the final norms; of `fc_norm` and of a decoder's last norm.
    norm_eps: float = LN_EPS
    head_eps: float = LN_EPS

    @property
    def clip(self) -> ClipConfig:
        """Of an encoder of clips."""
        return ClipConfig(**{name: getattr(self, name) for name in CLIP_SIZES})

    @property
    def image(self) -> ViTConfig:
        """Of an encoder of images."""
        return ViTConfig(**{name: getattr(self, name) for name in IMAGE_SIZES})

    @property
    def grid(self) -> tables.Grid:
        return self.clip.grid


@dataclass(frozen=True)
class Network:
    """One network. kind: a key of TITLES. positions: a key of `tables.KINDS`."""

    kind: str
    sizes: Sizes
    positions: str
    state: Mapping[str, Tensor] = field(repr=False)

    @property
    def is_video(self) -> bool:
        return self.kind != "mae"

    @property
    def encoder(self) -> dict[str, Tensor]:
        """The tensors of the encoder, without positions."""
        return {n: v for n, v in self.state.items() if n.startswith(ENCODER) and not n.startswith("pos_embed")}

    @property
    def head(self) -> dict[str, Tensor]:
        """What classifies clips or images; a detector's judges boxes, and is nothing to other networks."""
        return {} if self.kind == "detector" else {n: v for n, v in self.state.items() if n.startswith(HEAD)}

    @property
    def table(self) -> Tensor:
        """What is added to the encoder's tokens, stored or made, [1, N (+ 1), embed_dim]."""
        if (stored := self.state.get("pos_embed")) is not None:
            return stored
        return tables.make_table(self.positions, self.sizes.embed_dim, self.sizes.grid, not self.is_video)

    def describe(self) -> str:
        s = self.sizes
        name = STANDARD_NAMES.get((s.embed_dim, s.depth))
        size = f"{s.embed_dim} wide, {s.depth} blocks, {s.num_heads} heads"
        patch = f"{s.tubelet_size}x{s.patch_size}x{s.patch_size} tubes" if self.is_video else f"patch {s.patch_size}"
        clip = f"{s.num_frames} frames of {s.image_size} px" if self.is_video else f"{s.image_size} px"
        classes = f", {s.num_classes} classes" if s.num_classes else ""
        return (
            f"{TITLES[self.kind]}, {f'{name} ({size})' if name else size}, {patch}, {clip}, "
            f"{tables.KINDS[self.positions]} positions{classes}"
        )


def recognise(state: Mapping[str, Tensor], facts: Mapping[str, Any], source: str) -> Network:
    """The network of a state dict with our names (tensors may be on the meta device).

    facts: what came with the weights or was asked for, of `Sizes`, `positions` and `kind`; needed for what shapes do
    not show.
    Raises WeightsError (a ValueError) that names `source` and the key or the option that is missing.
    """
    patch = _first(state, source, "patch_embed.proj.weight")
    if patch.ndim not in (4, 5):
        raise WeightsError(f"{source}: patch_embed.proj.weight {list(patch.shape)} is no 2-D or 3-D convolution")
    kind = stored if (stored := facts.get("kind")) in TITLES else _kind(state)
    found = _read_sizes(kind, state, source)
    found["num_heads"] = _heads(found["embed_dim"], facts.get("num_heads"), source)
    positions, grid = _positions(kind, state, facts, found, source)
    found["num_frames"] = grid[0] * found["tubelet_size"] if grid else facts.get("num_frames", DEFAULT_FRAMES)
    found["image_size"] = grid[1] * found["patch_size"] if grid else facts.get("image_size", DEFAULT_SIZE)
    found |= {name: facts[name] for name in ("norm_eps", "head_eps") if name in facts}
    return Network(kind, Sizes(**found), positions, state)


def _kind(state: Mapping[str, Tensor]) -> str:
    if state["patch_embed.proj.weight"].ndim == 4:
        return "mae"
    if any(DECODER.match(name) for name in state):
        return "student"
    if any(name.startswith(("decoder.", "encoder_to_decoder.")) for name in state):
        return "videomae"
    if not any(name.startswith(HEAD) for name in state):
        return "encoder"
    # A classifier norms what it has pooled, a detector every token.
    return "detector" if "norm.weight" in state and "fc_norm.weight" not in state else "classifier"


def _read_sizes(kind: str, state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    patch = state["patch_embed.proj.weight"].shape
    dim = patch[0]
    found: dict[str, Any] = {"embed_dim": dim, "depth": _depth(state, "blocks."), "patch_size": patch[-1]}
    found["tubelet_size"] = patch[2] if kind != "mae" else 1
    found["num_classes"] = len(state["head.weight"]) if "head.weight" in state else 0
    if kind == "student":
        found["decoders"] = tuple(_decoder_of(suffix, state, source) for suffix in _suffixes(state))
    elif kind == "videomae":
        found["decoder_dim"] = len(_first(state, source, "encoder_to_decoder.weight", "decoder.norm.weight"))
        found["decoder_depth"] = _depth(state, "decoder.blocks.")
    elif _has_image_decoder(state):
        found["decoder_dim"] = len(_first(state, source, "decoder_embed.weight", "decoder_norm.weight"))
        found["decoder_depth"] = _depth(state, "decoder_blocks.")
    return found


def _suffixes(state: Mapping[str, Tensor]) -> list[str]:
    """Of the decoders that a student has, in the order of its weights, or that it should have."""
    named = (DECODER.match(name) for name in state)
    return list(dict.fromkeys(found[1] for found in named if found)) or list(RELEASED.values())


def _decoder_of(suffix: str, state: Mapping[str, Tensor], source: str) -> TargetDecoder:
    names = {released: target for target, released in RELEASED.items()}
    return TargetDecoder(
        target=names.get(suffix, suffix),
        dim=len(_first(state, source, f"down_{suffix}.weight", f"decoder_{suffix}.norm.weight")),
        depth=_depth(state, f"decoder_{suffix}.blocks."),
        num_heads=1,
        target_dim=len(_first(state, source, f"decoder_{suffix}.head.weight")),
    )


def _positions(
    kind: str, state: Mapping[str, Tensor], facts: Mapping[str, Any], found: dict[str, Any], source: str
) -> tuple[str, tables.Grid | None]:
    """Kind of positions, and the grid where a table is stored."""
    given = facts.get("positions")
    if (table := state.get("pos_embed")) is not None:
        slices = facts.get("num_frames", DEFAULT_FRAMES) // found["tubelet_size"]
        stored, grid = tables.identify(table, kind == "mae", slices)
        if given not in (None, stored) and not table.is_meta:
            raise WeightsError(f"{source}: positions are said to be {given}, but pos_embed is {stored}")
        return stored, grid
    if kind == "mae":
        side = facts.get("image_size", DEFAULT_SIZE) // found["patch_size"]
        return "2d", (1, side, side)
    if given is None:
        raise WeightsError(
            f"{source} does not say which positions its {TITLES[kind]} adds, and stores none: add --positions 3d "
            "(MVD) or --positions 1d (VideoMAE)"
        )
    return given, None


def _heads(dim: int, given: int | None, source: str) -> int:
    heads = given or STANDARD_HEADS.get(dim)
    if not heads:
        widths = ", ".join(map(str, STANDARD_HEADS))
        raise WeightsError(
            f"{source}: heads cannot be read from shapes, and width {dim} is none of {widths}: add --heads N"
        )
    if dim % heads:
        raise WeightsError(f"{source}: width {dim} is not a multiple of {heads} heads")
    return heads


def _first(state: Mapping[str, Tensor], source: str, *names: str) -> Tensor:
    for name in names:
        if name in state:
            return state[name]
    some = ", ".join(sorted(state)[:3]) or "nothing"
    raise WeightsError(f"{source} has no {' or '.join(names)}; it has {some}, ...: no network that is known here")


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    rest = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    return 1 + max((int(number) for number in rest if number.isdigit()), default=-1)


def _has_image_decoder(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("decoder_", "mask_token")) for name in state)


# ---- what the network should hold ----


@dataclass(frozen=True)
class Faults:
    """Keys that a complete network has and the file has not, the reverse, and those of another shape."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    def lines(self, most: int | None = None) -> list[str]:
        """One line for each sort of fault, with all names or the first few."""
        return [f"{what}: {few(names, most or len(names))}" for what, names in asdict(self).items() if names]


def check(network: Network) -> tuple[Network, Faults]:
    """The network with only those tensors that its architecture has in that shape, and what was wrong."""
    expected, state = expected_shapes(network), network.state
    fitting = {n: v for n, v in state.items() if n in expected and tuple(v.shape) == expected[n]}
    wrong = [n for n in expected.keys() & state.keys() if n not in fitting]
    faults = Faults(
        sorted(expected.keys() - state.keys()),
        sorted(state.keys() - expected.keys()),
        [f"{n} {list(state[n].shape)} instead of {list(expected[n])}" for n in sorted(wrong)],
    )
    return replace(network, state=fitting), faults


def expected_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the complete network; of the parts that are optional, those that are there."""
    with torch.device("meta"):
        model = _BUILDERS[network.kind](network)
    shapes = {name.removeprefix("encoder."): tuple(value.shape) for name, value in model.state_dict().items()}
    s, state = network.sizes, network.state
    if "pos_embed" in state and "pos_embed" not in shapes:
        shapes["pos_embed"] = (1, s.grid[0] * s.grid[1] * s.grid[2], s.embed_dim)
    if network.kind == "mae" and s.num_classes:
        shapes |= {"head.weight": (s.num_classes, s.embed_dim), "head.bias": (s.num_classes,)}
        if any(name.startswith("fc_norm.") for name in state):
            shapes |= {"fc_norm.weight": (s.embed_dim,), "fc_norm.bias": (s.embed_dim,)}
    # What pools over tokens has no final norm; the rest of the world leaves it out then.
    if network.kind in ("encoder", "mae") and not any(name.startswith("norm.") for name in state):
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("norm.")}
    return shapes


def _decoder(network: Network) -> DecoderConfig:
    return DecoderConfig(dim=network.sizes.decoder_dim, depth=network.sizes.decoder_depth, num_heads=1)


def _student(network: Network) -> nn.Module:
    return MaskedVideoStudent(network.sizes.clip, network.sizes.decoders)


def _image(network: Network) -> nn.Module:
    if _has_image_decoder(network.state):
        return MaskedAutoencoder(network.sizes.image, _decoder(network))
    return ImageTeacher(network.sizes.image)


def _detector(network: Network) -> nn.Module:
    from mvd_fast.models.detector import ActionDetector  # with torchvision

    return ActionDetector(network.sizes.clip, network.sizes.num_classes)


_BUILDERS = {
    "student": _student,
    "videomae": lambda network: VideoMAE(network.sizes.clip, _decoder(network)),
    "mae": _image,
    "classifier": lambda network: VideoClassifier(network.sizes.clip, network.sizes.num_classes),
    "detector": _detector,
    "encoder": lambda network: VideoEncoder(network.sizes.clip),
}


# ---- another size ----


def resized(network: Network, image_size: int | None, num_frames: int | None) -> tuple[Network, str]:
    """The network for other clips, and one line on what became of its position tables."""
    s = network.sizes
    sizes = replace(s, image_size=image_size or s.image_size, num_frames=num_frames or s.num_frames)
    _require_multiple("--image-size", sizes.image_size, "patches", s.patch_size)
    _require_multiple("--frames", sizes.num_frames, "tubes", s.tubelet_size)
    stored = [name for name in network.state if "pos_embed" in name]
    kind = tables.KINDS[network.positions]
    old, new = (" x ".join(map(str, grid)) for grid in (s.grid, sizes.grid))
    if not stored:
        return replace(network, sizes=sizes), f"{kind}, not stored in the source: regenerated for {new} tokens"
    if sizes.grid == s.grid:
        return replace(network, sizes=sizes), f"{kind}, kept as stored, for {old} tokens"
    fixed, cls_token = network.positions != "learned", not network.is_video
    made = {}
    for name in stored:
        table = network.state[name]
        if fixed:
            made[name] = tables.make_table(network.positions, table.shape[2], sizes.grid, cls_token).to(table.dtype)
        else:
            made[name] = tables.resize(table, s.grid, sizes.grid, cls_token)
    how = "regenerated" if fixed else "interpolated (bicubic in space, linear in time)"
    line = f"{kind}, {how} from {old} to {new} tokens: {', '.join(stored)}"
    return replace(network, sizes=sizes, state={**network.state, **made}), line


def _require_multiple(option: str, value: int, parts: str, size: int) -> None:
    if value % size:
        raise UserError(f"{option} {value} does not divide into {parts} of {size}")


SIZE_FIELDS = {f.name: float if "eps" in f.name else int for f in fields(Sizes) if f.name != "decoders"}
