"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with reference material beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("reference material (../shared) is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def golden_dir(shared_dir: Path) -> Path:
    """Folder of tensors made with the official implementations."""
    return shared_dir / "golden"
