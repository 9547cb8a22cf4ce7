"""Atomic writing: complete or not at all."""

import stat

import pytest

from asag.files import atomic_writer


def test_file_appears_complete_with_ordinary_permissions(tmp_path):
    path = tmp_path / "deep" / "a.json"
    with atomic_writer(path) as file:
        file.write("é")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "é"
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_failed_write_keeps_the_old_file_and_leaves_no_scratch(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_writer(path) as file:
        file.write("half of")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
