"""The part of the demonstration that detects in photographs."""

from __future__ import annotations

import demo_job
from PIL import Image


def test_photographs_come_with_installed_packages():
    names = [path.name for path in demo_job.photographs()]
    assert "grace_hopper.jpg" in names  # matplotlib is a dependency


def test_people_and_animals_are_detected(tmp_path, capsys):
    drawn = demo_job.detect_photographs(tmp_path / "photographs")
    assert [path.stem for path in drawn] == [path.stem for path in demo_job.photographs()]
    assert all(Image.open(path).size > (0, 0) for path in drawn)
    lines = {line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "person 0." in lines["grace_hopper.jpg"]
    if "chelsea.png" in lines:
        assert "cat 0." in lines["chelsea.png"]


def test_without_photographs_the_demonstration_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_job, "PHOTOGRAPHS", {"no_such_package": ("x.jpg",)})
    assert demo_job.detect_photographs(tmp_path / "photographs") == []
    assert "pip install" in capsys.readouterr().out
    assert not (tmp_path / "photographs").exists()
