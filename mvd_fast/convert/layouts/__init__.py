"""One file per layout of names; `--to` names the file. A new layout is a new file here, nothing is registered.

A layout says what its files look like:

* `HOLDS`: one line on what is kept, for people;
* `recognises(state)`: whether a state dict has these names;
* `read(source) -> (state, facts)`: the tensors with our names (see `mvd_fast/convert/network.py`), and what the layout
  itself implies, such as `positions`;
* `select(network) -> {name: tensor}`: what it can hold of a network, in our names, position table included where it
  stores one; ValueError where it cannot hold such a network at all;
* `loses(network) -> str`: what would make the result compute something else, empty if nothing does;
* `write(kept, network, source, target)`: names it and writes it;
* `FOLDER`: whether it writes a folder; else a .pth or .safetensors file.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType


def names() -> list[str]:
    """The layouts that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")
