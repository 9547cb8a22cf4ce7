"""Published checkpoints that keep apart what this library keeps in one matrix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .mapping import NameTable

_PART = re.compile(r"(?P<layer>.+)\.part(?P<index>\d+)\.(?P<kind>weight|bias)$")


@dataclass(frozen=True)
class PackedTable:
    """A table of names in which several published layers are slices of one of ours.

    Attributes:
        names: its rules call the slices of layer X "X.part0.", "X.part1.", ..., in the order of the
            output channels.
        parts: (pattern, number of slices) of the packed layers; the regular expression must match
            the whole name of the layer, without "weight" or "bias".
    """

    names: NameTable
    parts: tuple[tuple[str, int], ...]

    @property
    def source(self) -> str:
        """Whose layout this is."""
        return self.names.source

    @property
    def ours_only(self) -> tuple[str, ...]:
        """Names of this library that published files lack and loading does without."""
        return self.names.ours_only

    @property
    def settings(self) -> Mapping[str, Any]:
        """Configuration key -> value that weights of this layout need."""
        return self.names.settings

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames and packs. Raises KeyError naming what no rule covers or which slice is
        missing."""
        packed: dict[str, Tensor] = {}
        slices: dict[str, dict[int, Tensor]] = {}
        for name, value in self.names.to_ours(state).items():
            if found := _PART.match(name):
                whole = f"{found['layer']}.{found['kind']}"
                slices.setdefault(whole, {})[int(found["index"])] = value
            else:
                packed[name] = value
        for whole, found in slices.items():
            wanted = range(self._count(whole))
            missing = [i for i in wanted if i not in found]
            if missing:
                raise KeyError(f"{whole} lacks slice(s) {missing} in {self.source}")
            packed[whole] = torch.cat([found[i] for i in wanted])
        return packed

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unpacks and renames. Raises KeyError naming what no rule covers."""
        unpacked: dict[str, Tensor] = {}
        for name, value in state.items():
            parts = self._part_names(name)
            slices = value.chunk(len(parts)) if len(parts) > 1 else (value,)
            unpacked.update(zip(parts, slices, strict=True))
        return self.names.to_theirs(unpacked)

    def covers(self, names: Iterable[str]) -> bool:
        """Returns True if this table knows every published name."""
        return self.names.covers(names)

    def unknown(self, names: Iterable[str]) -> list[str]:
        """The published names that no rule covers."""
        return self.names.unknown(names)

    def unnamed(self, names: Iterable[str]) -> list[str]:
        """The names of this library that the source has no name for."""
        return [x for x in names if self.names.unnamed(self._part_names(x))]

    def _part_names(self, name: str) -> list[str]:
        """The slices of a tensor of this library, or its name where it is kept whole."""
        count = self._count(name)
        if count == 1:
            return [name]
        layer, _, kind = name.rpartition(".")
        return [f"{layer}.part{i}.{kind}" for i in range(count)]

    def _count(self, name: str) -> int:
        layer = name.rpartition(".")[0]
        return next((n for pattern, n in self.parts if re.fullmatch(pattern, layer)), 1)
