"""Hugging Face's VideoMAE folders: config.json, model.safetensors, preprocessor_config.json and a model card.

transformers makes its position table (VideoMAE's 1-D sinusoid) itself and has no place for another in a file. Where
the network adds another table, or ends in a `fc_norm` with another eps than theirs, the folder also gets two classes of
that kind (`mvd_fast/convert/modeling_mvd.py`), which `trust_remote_code=True` selects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mvd_fast.config.base import IMAGENET_MEAN, IMAGENET_STD
from mvd_fast.errors import UserError
from mvd_fast.files import WEIGHTS, folder_written_aside
from mvd_fast.names import printable

from .. import model_card
from ..names import NameTable, join_rows, split_rows
from ..network import Network
from ..storage import CLASSES, CONFIG, Source, class_names, metadata, owned
from ..weights import WeightsError

FOLDER = True
HOLDS = "the encoder, and a classifier's end"
FILES = (CONFIG, WEIGHTS, "preprocessor_config.json", "README.md", "modeling_mvd.py")
HEAD_EPS = 1e-5  # theirs, fixed
ROWS = tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value"))

LAYER = {
    "layernorm_before.{x}": "norm1.{x}",
    "layernorm_after.{x}": "norm2.{x}",
    "attention.attention.qkv.weight": "attn.qkv.weight",  # of ROWS
    # Published files have the first two names, and so have transformers 4's modules; the others are transformers 5's
    # modules', which its own classes rename to, but not those that come with a folder.
    "attention.attention.q_bias": "attn.q_bias",
    "attention.attention.v_bias": "attn.v_bias",
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias",
    "attention.output.dense.{x}": "attn.proj.{x}",
    "intermediate.dense.{x}": "mlp.fc1.{x}",
    "output.dense.{x}": "mlp.fc2.{x}",
}
NAMES = NameTable(
    [
        ("embeddings.patch_embeddings.projection.{x}", "patch_embed.proj.{x}"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("layernorm.{x}", "norm.{x}"),
        ("classifier.{x}", "head.{x}"),
        *((f"encoder.layer.{{n}}.{theirs}", f"blocks.{{n}}.{ours}") for theirs, ours in LAYER.items()),
        *((f"decoder.decoder_layers.{{n}}.{theirs}", f"decoder.blocks.{{n}}.{ours}") for theirs, ours in LAYER.items()),
    ]
)


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(name.removeprefix("videomae.").startswith("embeddings.patch_embeddings.") for name in state)


def read(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Raises WeightsError for a bare file without its config.json, and for settings that our networks do not have."""
    if (config := source.hf_config) is None:
        raise WeightsError(f"{source.path} has Hugging Face's names: name the folder with its {CONFIG} instead")
    _check_config(config, source.path / CONFIG)
    state = {name.removeprefix("videomae."): value for name, value in source.state.items()}
    state = join_rows(state, ROWS, "attention.attention.qkv.weight")
    state = {NAMES.ours(name): value for name, value in state.items()}
    facts = {
        "num_heads": config["num_attention_heads"],
        "image_size": config["image_size"],
        "num_frames": config.get("num_frames", 16),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "head_eps": config.get("layer_norm_eps", 1e-12) if "auto_map" in config else HEAD_EPS,
    }
    facts |= {CLASSES: _labels(config)}
    return state, facts if "pos_embed" in state else facts | {"positions": "1d"}


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes by number; empty where they are transformers' placeholders or no such list."""
    labels = config.get("id2label") or {}
    names = tuple(labels.get(str(number)) for number in range(len(labels)))
    return names if len(set(names) - {None, *map(_placeholder, range(len(names)))}) == len(names) else ()


def _placeholder(number: int) -> str:
    return f"LABEL_{number}"


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    for key, wanted in (("model_type", "videomae"), ("hidden_act", "gelu"), ("qv_bias", True), ("num_channels", 3)):
        if config.get(key, wanted) != wanted:
            raise WeightsError(f"{path}: {key} is {config[key]!r}, and only {wanted!r} can be read")
    for key in ("num_attention_heads", "image_size"):
        if not isinstance(config.get(key), int):
            raise WeightsError(f"{path}: {key} is {config.get(key)!r} instead of an integer")


def select(network: Network) -> dict[str, Tensor]:
    if not network.is_video:
        raise UserError("the hf layout holds video networks, and this is an image ViT: use --to mvd or timm")
    positions = {"pos_embed": network.table} if needs_own_classes(network) else {}
    return {**network.encoder, **network.head, **positions}


def loses(network: Network) -> str:
    return ""


def needs_own_classes(network: Network) -> bool:
    """Whether transformers' own classes would compute something else."""
    return network.positions != "1d" or (network.kind == "classifier" and network.sizes.head_eps != HEAD_EPS)


def write(kept: Mapping[str, Tensor], network: Network, source: Source, target: Path) -> None:
    state = split_rows({NAMES.theirs(name): v for name, v in kept.items()}, "attention.attention.qkv.weight", ROWS)
    if network.kind == "classifier":
        apart = ("fc_norm.", "classifier.")
        state = {name if name.startswith(apart) else f"videomae.{name}": value for name, value in state.items()}
    own_classes = needs_own_classes(network)
    if own_classes:
        state = {_module_name(name): value for name, value in state.items()}
    dtype = str(next(iter(kept.values())).dtype).removeprefix("torch.")
    with folder_written_aside(target, FILES) as folder:
        save_file(owned(state), folder / WEIGHTS, metadata(network, "hf", source))
        _write_json(
            folder / CONFIG,
            config_json(network, dtype, own_classes, "norm.weight" not in kept, class_names(source, network)),
        )
        _write_json(folder / "preprocessor_config.json", preprocessor_json(network, source.facts))
        card = model_card.text(network, printable(source.name), printable(target.name), own_classes)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if own_classes:
            code = Path(model_card.__file__).with_name("modeling_mvd.py")
            (folder / "modeling_mvd.py").write_text(code.read_text())


def _module_name(name: str) -> str:
    return name.replace("attention.q_bias", "attention.query.bias").replace("attention.v_bias", "attention.value.bias")


def config_json(
    network: Network, dtype: str, own_classes: bool, pooled: bool, names: Sequence[str] = ()
) -> dict[str, Any]:
    """What `VideoMAEConfig` reads. pooled: no final norm. names: of the classes, where they are known."""
    s, classifies = network.sizes, network.kind == "classifier"
    labels = list(names) or [_placeholder(number) for number in range(s.num_classes)]
    return {
        "architectures": ["VideoMAEForVideoClassification" if classifies else "VideoMAEModel"],
        "model_type": "videomae",
        "image_size": s.image_size,
        "patch_size": s.patch_size,
        "num_channels": 3,
        "num_frames": s.num_frames,
        "tubelet_size": s.tubelet_size,
        "hidden_size": s.embed_dim,
        "num_hidden_layers": s.depth,
        "num_attention_heads": s.num_heads,
        "intermediate_size": 4 * s.embed_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": s.norm_eps,
        "qv_bias": True,
        "use_mean_pooling": pooled,
        "dtype": dtype,
        **({"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {}),
        **({"auto_map": model_card.AUTO_MAP} if own_classes else {}),
    }


def preprocessor_json(network: Network, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Short side to the network's size, centre crop, then the run's normalisation or else ImageNet's."""
    size = network.sizes.image_size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(facts.get("mean", IMAGENET_MEAN)),
        "image_std": list(facts.get("std", IMAGENET_STD)),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
