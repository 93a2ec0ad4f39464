"""What encoders learn from a data set, without a data set."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Facts:
    """A stand-in for `darkroom.conditioning.encoder.DataFacts`."""

    class_names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    box_names: list[str] = field(default_factory=list)
    map_names: list[str] = field(default_factory=list)
    low_resolution_factor: int | None = None
    size: tuple[int, int] = (64, 64)

    def captions(self) -> list[str]:
        return self.texts
