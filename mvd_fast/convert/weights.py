"""Weights from files, without running code from them."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mvd_fast.errors import UserError

# Where the public checkpoints keep their state dict.
CONTAINERS = ("model", "module", "state_dict")
# What wrappers put before every name.
WRAPPERS = ("module.", "_orig_mod.")


class WeightsError(UserError):
    """A weight file that is missing, broken, unsafe, or of another network."""


def load_pth(path: str | Path) -> Any:
    """`torch.load` on the CPU that never unpickles code: tensors, plain containers and argparse.Namespace only."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if not wanted:
            raise WeightsError(f"{path} cannot be read as a PyTorch checkpoint: it is no such file") from error
        raise WeightsError(
            f"{path} would run code when loaded: it needs {', '.join(wanted)}; only tensors, plain containers and "
            "argparse.Namespace are accepted; re-save it as a state dict of tensors or as .safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as a PyTorch checkpoint: {str(error).splitlines()[0]}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .pth/.pt/.bin or .safetensors file, unwrapped and without wrapper prefixes, on the CPU.

    Raises WeightsError (a ValueError) if the file is missing, broken or would need code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weight file {path} does not exist")
    if path.suffix == ".safetensors":
        try:
            state: Any = load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{path} is not a complete safetensors file: {error}") from error
    else:
        state = load_pth(path)
        while isinstance(state, Mapping) and (inner := next((k for k in CONTAINERS if k in state), None)):
            state = state[inner]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no state dict of tensors (looked under {', '.join(CONTAINERS)})")
    return {_unwrapped(name): value for name, value in state.items()}


def _unwrapped(name: str) -> str:
    while prefix := next((p for p in WRAPPERS if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Strict `load_state_dict`; its error names `source` and the keys missing, unexpected or of other shape."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    # Position tables are regenerated where the model says so; its load hook takes care of them.
    reshaped = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape and not name.endswith("pos_embed")
    ]
    faults = [
        f"{what}: {few(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", sorted(reshaped)))
        if names
    ]
    if faults:
        raise WeightsError(
            f"{source} does not fit {type(model).__name__}: {'; '.join(faults)}; check the sizes in the config"
        )
    model.load_state_dict(dict(state), strict=True)


def few(names: list[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
