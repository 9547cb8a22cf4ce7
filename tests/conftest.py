"""Fixtures shared by all tests."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from web_server import Server

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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A web server of this machine, which stands for Hugging Face's as well; downloads go into
    folders of the test, and no attempt is waited for."""
    from huggingface_hub import constants

    from asag.checkpoint import download

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "RETRY_WAIT_S", 0.0)
    monkeypatch.setattr(download, "CHUNK", 500)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with Server() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url(""))
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_stale_log_handlers() -> None:
    """Removes log handlers of earlier tests whose captured streams are closed by now."""
    for name in ("", "asag", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if getattr(getattr(handler, "stream", None), "closed", False):
                logger.removeHandler(handler)
