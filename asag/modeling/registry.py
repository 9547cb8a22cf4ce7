"""Building a component by its configured name, with an error that names the key."""

from __future__ import annotations

from typing import Any

from detectron2.utils.registry import Registry


def build_component(registry: Registry, key: str, name: str, *args: Any) -> Any:
    """Builds `registry[name](*args)`.

    Raises:
        ValueError: `name` is not registered; the message names the configuration key and the
            choices.
    """
    if name not in registry:
        choices = ", ".join(sorted(known for known, _ in registry))
        raise ValueError(f"{key} is {name!r}; choose one of: {choices}")
    return registry.get(name)(*args)


def check_choice(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError that names the configuration key when `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{key} is {value!r}; choose one of: {', '.join(map(repr, choices))}")
