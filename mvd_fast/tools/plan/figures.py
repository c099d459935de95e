"""What a plan consists of: figures that say where they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counted", "measured", "predicted", "published", "assumed", "given"]


@dataclass(frozen=True)
class Figure:
    section: str
    figure: str
    value: float | int | str
    unit: str
    kind: Kind
    source: str  # from what

    @property
    def shown(self) -> str:
        """The value to about three digits."""
        if not isinstance(self.value, float):
            return f"{self.value:,}" if isinstance(self.value, int) else self.value
        if self.value == 0 or not math.isfinite(self.value):
            return f"{self.value:.0f}"
        digits = max(0, 2 - math.floor(math.log10(abs(self.value))))
        return f"{self.value:,.{digits}f}"
