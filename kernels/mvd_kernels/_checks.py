"""What tensors an operator takes, as a table with a row for each; the error sentences follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT, INDEX, OPTIONAL = "floating point", torch.int64, "optional"
Kind = str | torch.dtype
_MOST_PASSED = 10_000


class Checks:
    """A row for every argument: `Checks(x=(FLOAT, "B M C"), weight=("x", "D C"), bias=(FLOAT, "D", OPTIONAL))`.

    First its dtype: FLOAT is any such, "x" that of argument x, and "x or float32" either. Then its sizes: a letter
    stands for the same number in all rows, with a `+` for at least 1; a number stands for itself, `...` for any leading
    dimensions, `|` separates what is accepted, and "like x" is all that x has. Of a list, named "weights[]", each entry
    must be so; letters with a dot are an entry's own, shared with the entries of other lists at its place. All tensors
    must be on the device of the first.
    """

    def __init__(self, **rows: tuple[Kind, str] | tuple[Kind, str, str]) -> None:
        self._rows = [_row(name, *row) for name, row in rows.items()]
        self._has_lists = any(row.each for row in self._rows)
        self._passed: dict[tuple, dict[str, int]] = {}

    def __call__(
        self, *arguments: Tensor | Sequence[Tensor | None] | None, like: Tensor | None = None, **sizes: int
    ) -> dict[str, int]:
        """The size that each letter stands for.

        Args:
            like: a tensor that comes before the first.
            sizes: letters that are known already.

        Raises:
            ValueError: with what came and what is accepted, for the first tensor that does not fit.
        """
        if torch.compiler.is_compiling():
            return self._check(arguments, like, sizes)
        # What has passed once is not looked at again: reading dtypes, shapes and devices is a quarter of the work.
        tensors = [like, *arguments]
        if self._has_lists:
            tensors = [one for part in tensors for one in (part if isinstance(part, (list, tuple)) else [part])]
        try:
            key = (*sizes.values(), *[None if x is None else (x.dtype, x.shape, x.device) for x in tensors])
        except AttributeError:  # not a tensor
            return self._check(arguments, like, sizes)
        found = self._passed.get(key)
        if found is None:
            found = self._check(arguments, like, sizes)
            if len(self._passed) < _MOST_PASSED:
                self._passed[key] = found
        return found

    def _check(self, arguments: tuple, like: Tensor | None, sizes: dict[str, int]) -> dict[str, int]:
        known: dict[str, Tensor] = {}
        for argument, row in zip(arguments, self._rows, strict=True):
            for place, x in enumerate(argument if row.each else [argument]):
                if x is None and row.optional:
                    continue
                if not isinstance(x, Tensor) or not row.fits(x, place, like, known, sizes):
                    name = row.name.replace("[]", f"[{place}]")
                    raise ValueError(f"{name} is {describe(x)}; it must be {row.wanted(place, like, known, sizes)}")
                known[row.name] = x
                like = x if like is None else like
        return sizes


class _Row(NamedTuple):
    name: str
    kinds: tuple[Kind, ...]
    shapes: tuple[tuple[str | int, ...], ...]
    like: str | None
    least: frozenset[str]
    optional: bool
    each: bool

    def fits(self, x: Tensor, place: int, like: Tensor | None, known: dict[str, Tensor], sizes: dict[str, int]) -> bool:
        """Whether x, at `place` of a list, is as the row says; enters the letters that it gives a size in `sizes`."""
        if self.kinds[0] == FLOAT:
            if not x.is_floating_point():
                return False
        elif x.dtype not in self._dtypes(known):
            return False
        if like is not None and x.device != like.device:
            return False
        if self.like is not None:
            return x.shape == known[self.like].shape
        return any(self._is_shape(shape, place, x.shape, sizes) for shape in self.shapes)

    def _is_shape(self, letters: tuple, place: int, shape: torch.Size, sizes: dict[str, int]) -> bool:
        found = dict(sizes)
        if letters[:1] == ("...",):
            letters, shape = letters[1:], shape[max(len(shape) - len(letters) + 1, 0) :]
        if len(shape) != len(letters):
            return False
        for letter, size in zip(letters, shape, strict=True):
            if size != (letter if isinstance(letter, int) else found.setdefault(_of(letter, place), size)):
                return False
            if size == 0 and letter in self.least:
                return False
        sizes.update(found)
        return True

    def _dtypes(self, known: dict[str, Tensor]) -> list[torch.dtype]:
        return [known[kind].dtype if isinstance(kind, str) else kind for kind in self.kinds]

    def wanted(self, place: int, like: Tensor | None, known: dict[str, Tensor], sizes: dict[str, int]) -> str:
        """The row in words."""
        kinds = self.kinds if self.kinds[0] == FLOAT else dict.fromkeys(self._dtypes(known))
        shapes = self.shapes if self.like is None else [known[self.like].shape]
        words = " or ".join(f"[{', '.join(_word(one, place, sizes) for one in shape)}]" for shape in shapes)
        device = "" if like is None else f" on {like.device}"
        least = "".join(f", {one} at least 1" for one in sorted(self.least))
        return f"{' or '.join(map(str, kinds))} {words}{device}{least}"


def _of(letter: str, place: int) -> str:
    return f"{letter}{place}" if letter[-1] == "." and letter != "..." else letter


def _word(letter: str | int, place: int, sizes: dict[str, int]) -> str:
    if isinstance(letter, int) or letter == "...":
        return str(letter)
    return str(sizes.get(_of(letter, place), letter.rstrip(".")))


def _row(name: str, kind: Kind, sizes: str, optional: str = "") -> _Row:
    kinds = kind.split(" or ") if isinstance(kind, str) else [kind]
    exact = tuple(getattr(torch, one, one) if isinstance(one, str) else one for one in kinds)
    like = sizes.removeprefix("like ") if sizes.startswith("like ") else None
    shapes = [] if like else [shape.replace("+", "").split() for shape in sizes.split("|")]
    letters = tuple(tuple(int(one) if one.isdigit() else one for one in shape) for shape in shapes)
    least = frozenset(one[:-1] for one in sizes.split() if one.endswith("+"))
    return _Row(name, exact, letters, like, least, optional == OPTIONAL, name.endswith("[]"))


def describe(x: object) -> str:
    """A tensor's dtype, shape and device, for error messages; of anything else its type."""
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
