"""Translating parameter names between a published layout and this library, in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class NameTable:
    """An invertible table of parameter names.

    Attributes:
        source: whose layout this is, for messages.
        rules: pairs (theirs, ours). `{s}`, `{i}`, ... stand for the same whole number on both
            sides; a pattern that ends with a dot stands for everything below it. The first rule
            that fits is taken.
        ours_only: names of this library that published files lack and loading does without.
        theirs_only: patterns of published names that no model needs; they are left out.
        settings: configuration key -> value that weights of this layout need, because their source
            computes that way.
    """

    source: str
    rules: tuple[tuple[str, str], ...]
    ours_only: tuple[str, ...] = ()
    theirs_only: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    _compiled: tuple[list, list, list] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        forward = [_compile(theirs, ours) for theirs, ours in self.rules]
        backward = [_compile(ours, theirs) for theirs, ours in self.rules]
        ignored = [_compile(theirs, "")[0] for theirs in self.theirs_only]
        object.__setattr__(self, "_compiled", (forward, backward, ignored))

    def to_ours(self, state: Mapping[str, T]) -> dict[str, T]:
        """Renames a published state dict, without `theirs_only`. Raises KeyError naming what no
        rule covers."""
        needed = {name: value for name, value in state.items() if not self._ignores(name)}
        return self._rename(needed, self._compiled[0], f"in {self.source}")

    def to_theirs(self, state: Mapping[str, T]) -> dict[str, T]:
        """Renames a state dict of this library, without `ours_only`. Raises KeyError naming what no
        rule covers."""
        shared = {name: value for name, value in state.items() if name not in self.ours_only}
        return self._rename(shared, self._compiled[1], f"that {self.source} has no name for")

    def covers(self, names: Iterable[str]) -> bool:
        """Returns True if this table knows every published name."""
        return not self.unknown(names)

    def unknown(self, names: Iterable[str]) -> list[str]:
        """The published names that no rule covers."""
        rules = self._compiled[0]
        return [x for x in names if not any(p.match(x) for p, _ in rules) and not self._ignores(x)]

    def unnamed(self, names: Iterable[str]) -> list[str]:
        """The names of this library that the source has no name for."""
        return [x for x in names if not any(p.match(x) for p, _ in self._compiled[1])]

    def _ignores(self, name: str) -> bool:
        return any(pattern.match(name) for pattern in self._compiled[2])

    @staticmethod
    def _rename(state: Mapping[str, T], rules: list, where: str) -> dict[str, T]:
        renamed, unknown = {}, []
        for name, value in state.items():
            for pattern, template in rules:
                if found := pattern.match(name):
                    renamed[template.format(**found.groupdict())] = value
                    break
            else:
                unknown.append(name)
        if unknown:
            raise KeyError(f"{len(unknown)} parameter names {where}: {', '.join(unknown[:5])}")
        return renamed


def _compile(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(source))
    if source.endswith("."):
        return re.compile(f"{pattern}(?P<rest>.+)$"), f"{target}{{rest}}"
    return re.compile(f"{pattern}$"), target
