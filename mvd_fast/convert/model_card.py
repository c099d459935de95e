"""The README.md beside an exported Hugging Face model: what it is and how to load it. It claims no results."""

from __future__ import annotations

from .network import Network
from .storage import our_version
from .tables import KINDS

AUTO_MAP = {
    "AutoModel": "modeling_mvd.MVDModel",
    "AutoModelForVideoClassification": "modeling_mvd.MVDForVideoClassification",
}
MVD = """@inproceedings{wang2023masked,
  title     = {Masked Video Distillation: Rethinking Masked Feature Modeling for Self-supervised Video Representation
               Learning},
  author    = {Wang, Rui and Chen, Dongdong and Wu, Zuxuan and Chen, Yinpeng and Dai, Xiyang and Liu, Mengchen and
               Yuan, Lu and Jiang, Yu-Gang},
  booktitle = {CVPR},
  year      = {2023}
}"""
VIDEOMAE = """@inproceedings{tong2022videomae,
  title     = {{VideoMAE}: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training},
  author    = {Tong, Zhan and Song, Yibing and Wang, Jue and Wang, Limin},
  booktitle = {NeurIPS},
  year      = {2022}
}"""
CARD = """\
---
library_name: transformers
pipeline_tag: {task}
tags: [video, videomae, masked-video-distillation]
# license: to be filled in; it follows from the licences of the weights and of the data they were trained on
---

# {title}

{description}.

| | |
|---|---|
| converted from | `{source}` by mvd-fast {version} |
| input | {frames} frames of {size} x {size} pixels, RGB, normalised as `preprocessor_config.json` says |
| tokens | {tokens} (tubes of {tubelet} x {patch} x {patch}), {dim} wide |
| layers | {depth} blocks, {heads} heads |
| positions | {positions} |
| output | {output} |

## Loading

```python
{loading}
```

{remarks}
## Training data, results, licence

To be filled in by whoever publishes this: mvd-fast converted the weights and knows none of it. The licence of weights
is their owner's to give.

## Citation

```bibtex
{citation}
```
"""
PLAIN = """\
from transformers import {cls}

model = {cls}.from_pretrained("{folder}")
# pixel_values: float [B, {frames}, 3, {size}, {size}]
output = model(pixel_values=pixel_values).{field}  # {shape}"""
OWN = """\
from transformers import {auto}

model = {auto}.from_pretrained("{folder}", trust_remote_code=True)  # runs modeling_mvd.py of this folder
# pixel_values: float [B, {frames}, 3, {size}, {size}]
output = model(pixel_values=pixel_values).{field}  # {shape}"""
REMARK = """\
This needs transformers 5. `trust_remote_code` selects the classes of `modeling_mvd.py`: the position table comes
from the weights file, and a classifier's `fc_norm` has the blocks' eps ({eps:g}). `{cls}` itself loads this
folder, too, but reports `position_embeddings` as unexpected and adds the 1-D table of its own, which is **wrong for
this network** until it is put right:

```python
from safetensors.torch import load_file

model = {cls}.from_pretrained("{folder}")
{base}.embeddings.position_embeddings = load_file("{folder}/model.safetensors")["{key}"]
```
"""
SAME_TABLE = """\
This needs transformers 5. `trust_remote_code` selects the classes of `modeling_mvd.py`, where `fc_norm` has the
blocks' eps ({eps:g}) as in the source. `{cls}.from_pretrained` loads this folder, too, with
transformers' own eps of 1e-5: that makes the normalised features smaller, by a share of 4.5e-6 over the variance of
the pooled ones.
"""


def text(network: Network, source: str, folder: str, own_classes: bool) -> str:
    """The whole card."""
    s, classifies = network.sizes, network.kind == "classifier"
    tokens = s.grid[0] * s.grid[1] * s.grid[2]
    words = {
        "cls": "VideoMAEForVideoClassification" if classifies else "VideoMAEModel",
        "auto": "AutoModelForVideoClassification" if classifies else "AutoModel",
        "field": "logits" if classifies else "last_hidden_state",
        "shape": f"[B, {s.num_classes}]" if classifies else f"[B, {tokens}, {s.embed_dim}]",
        "base": "model.videomae" if classifies else "model",
        "key": f"{'videomae.' if classifies else ''}embeddings.position_embeddings",
        "folder": folder,
        "frames": s.num_frames,
        "size": s.image_size,
        "eps": s.norm_eps,
    }
    remark = REMARK if network.positions != "1d" else SAME_TABLE
    return CARD.format(
        task="video-classification" if classifies else "feature-extraction",
        title=folder,
        description=_sentence(network),
        source=source,
        version=our_version(),
        frames=s.num_frames,
        size=s.image_size,
        tokens=tokens,
        tubelet=s.tubelet_size,
        patch=s.patch_size,
        dim=s.embed_dim,
        depth=s.depth,
        heads=s.num_heads,
        positions=KINDS[network.positions],
        output=f"logits of {s.num_classes} classes" if classifies else "one feature per token",
        loading=(OWN if own_classes else PLAIN).format(**words),
        remarks=remark.format(**words) if own_classes else "",
        citation=VIDEOMAE if network.positions == "1d" else MVD,
    )


def _sentence(network: Network) -> str:
    if network.kind == "classifier":
        return "A video ViT with joint space-time attention: mean over tokens, LayerNorm, linear classifier"
    if network.kind == "detector":
        return "The encoder of a video ViT trained to detect actions, its final LayerNorm applied; no head is included"
    by = "masked pixel reconstruction (VideoMAE)" if network.positions == "1d" else "masked video distillation (MVD)"
    norm = "its final LayerNorm applied" if "norm.weight" in network.state else "without a final LayerNorm"
    return f"The encoder of a video ViT pre-trained by {by}, {norm}; pre-training decoders are not included"
