"""What all parts of a config have in common: strict objects, names of precisions, divisibility."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from mvd_fast.errors import UserError

Precision = Literal["fp32", "bf16"]
TeacherPrecision = Literal["fp32", "bf16", "int8", "fp8"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ConfigError(UserError):
    """A run cannot start as configured; the message is for the user, one sentence per fault."""


class Strict(BaseModel):
    """Unknown keys are errors; values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def replaced(self, **changes: object) -> Self:
        """A copy with other values, which are not checked again."""
        return self.model_copy(update=changes)


def require_divisible(config: BaseModel, whole: str, part: str) -> None:
    """Raises UserError where one field of a config is not a multiple of another."""
    if getattr(config, whole) % getattr(config, part):
        raise UserError(f"{whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}")


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a config's JSON by dotted keys, `targets[0].weight` for entries of a list of objects."""
    if isinstance(tree, dict):
        parts = [(f"{prefix}{key}", value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree):
        parts = [(f"{prefix.removesuffix('.')}[{number}]", value) for number, value in enumerate(tree)]
    else:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, part in parts for key, value in flat(part, f"{name}.").items()}
