"""Tables of parameter names, read in either direction."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

# What stands for what in a pattern.
HOLES = {"n": r"\d+", "x": "weight|bias", "rest": ".+"}


class NameTable:
    """Pairs of patterns (theirs, ours), such as `("encoder.layer.{n}.layernorm_before.{x}", "blocks.{n}.norm1.{x}")`.

    In each direction the first pair that matches counts, so that several of their names may mean one of ours.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = list(pairs)
        self._inwards = [(_regex(theirs), ours) for theirs, ours in pairs]
        self._outwards = [(_regex(ours), theirs) for theirs, ours in pairs]

    def ours(self, name: str) -> str:
        """A name of theirs in our words; one that is not in the table stays as it is."""
        return _translated(name, self._inwards)

    def theirs(self, name: str) -> str:
        """A name of ours in their words; one that is not in the table stays as it is."""
        return _translated(name, self._outwards)


def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    return re.compile(
        "".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>{HOLES[part]})" for i, part in enumerate(parts))
    )


def _translated(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, template in rules:
        if found := pattern.fullmatch(name):
            return template.format(**found.groupdict())
    return name


# ---- query, key and value: one matrix or three ----


def join_rows(state: dict[str, Tensor], parts: tuple[str, ...], whole: str) -> dict[str, Tensor]:
    """Stacks `<stem><part>` of every stem that has all parts in equal shapes into `<stem><whole>`; others stay."""
    joined = dict(state)
    for stem in [name.removesuffix(parts[0]) for name in state if name.endswith(parts[0])]:
        names = [stem + part for part in parts]
        if all(name in state for name in names) and len({state[name].shape for name in names}) == 1:
            joined[stem + whole] = torch.cat([joined.pop(name) for name in names])
    return joined


def split_rows(state: dict[str, Tensor], whole: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The other way round: `<stem><whole>` cut into equal parts."""
    split = dict(state)
    for name in [name for name in state if name.endswith(whole)]:
        stem = name.removesuffix(whole)
        pieces = split.pop(name).chunk(len(parts))
        split |= {stem + part: piece for part, piece in zip(parts, pieces, strict=True)}
    return split
