"""The Detectron2 installer: the archive check, the table of edits, the wheel, and manners."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib
import importlib.metadata
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import install_detectron2
import pytest
from detectron2_edits import EDITS, STAND_IN, Edit, describe_edits
from hypothesis import given, settings
from hypothesis import strategies as st
from install_detectron2 import InstallError


def write_sdist(path: Path, files: dict[str, bytes]) -> str:
    """Write a source archive with one top folder and return its sha256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"pkg-0.5/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("pkg-0.5/detectron2/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def sources() -> dict[str, bytes]:
    """A package in which every text of the table occurs exactly as often as it must."""
    files = {"LICENSE": b"a license", "setup.py": b"raise SystemExit", "README.md": b"read"}
    files["detectron2/__init__.py"] = b'__version__ = "0.5"\n'
    for edit in EDITS:
        name = f"detectron2/{edit.path}"
        files[name] = files.get(name, b"") + (edit.find + "\n").encode() * edit.count
    return files


def test_archive_is_read_without_links_and_foreign_files(tmp_path, sources):
    digest = write_sdist(tmp_path / "a.tar.gz", sources)
    files = install_detectron2.read_sdist(tmp_path / "a.tar.gz", digest)
    expected = {n: d for n, d in sources.items() if n == "LICENSE" or n.startswith("detectron2/")}
    assert files == expected


def test_wrong_hash_is_refused_and_both_digests_are_named(tmp_path, sources):
    digest = write_sdist(tmp_path / "a.tar.gz", sources)
    with pytest.raises(InstallError, match="not the expected") as caught:
        install_detectron2.read_sdist(tmp_path / "a.tar.gz")
    assert digest in str(caught.value)
    assert install_detectron2.SDIST_SHA256 in str(caught.value)


def test_missing_archive_and_archive_without_the_package(tmp_path):
    with pytest.raises(InstallError, match="no such file"):
        install_detectron2.read_sdist(tmp_path / "absent.tar.gz")
    digest = write_sdist(tmp_path / "b.tar.gz", {"LICENSE": b"x"})
    with pytest.raises(InstallError, match=r"no detectron2/__init__\.py"):
        install_detectron2.read_sdist(tmp_path / "b.tar.gz", digest)


def test_every_edit_is_applied_and_marked(sources):
    edited = install_detectron2.apply_edits(sources, EDITS)
    touched = {f"detectron2/{edit.path}" for edit in EDITS}
    for name in touched:
        expected = "".join(
            (edit.replace + "\n") * edit.count
            for edit in EDITS
            if f"detectron2/{edit.path}" == name
        )
        text = edited[name].decode()
        assert text.startswith(expected)
        note = text.removeprefix(expected).strip().splitlines()
        assert len(note) == 1
        assert note[0].startswith("# Changed from Detectron2 v0.5")
    assert {n: d for n, d in edited.items() if n not in touched} == {
        n: d for n, d in sources.items() if n not in touched
    }


@pytest.mark.parametrize("found", [0, 1, 3])
def test_wrong_number_of_occurrences_is_refused(found):
    files = {"detectron2/a.py": b"np.int " * found}
    with pytest.raises(
        InstallError, match=rf"detectron2/a\.py: expected 2 x 'np.int', found {found}"
    ):
        install_detectron2.apply_edits(files, [Edit("a.py", "np.int", "int", 2, "gone")])


def test_missing_source_file_is_named():
    with pytest.raises(InstallError, match=r"detectron2/b\.py is missing"):
        install_detectron2.apply_edits({}, [Edit("b.py", "x", "y", 1, "")])


def test_every_edit_says_why_and_is_listed():
    table = describe_edits()
    for edit in EDITS:
        assert edit.why and edit.count > 0 and edit.find != edit.replace
        assert f"detectron2/{edit.path}  ({edit.count} x)" in table


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}\.py", fullmatch=True), st.binary(max_size=200), max_size=5
    )
)
def test_wheel_is_reproducible_and_its_record_is_true(tmp_path_factory, modules):
    files = {f"detectron2/{name}": data for name, data in modules.items()}
    files |= {"detectron2/__init__.py": b"", "LICENSE": b"a license"}
    folders = [tmp_path_factory.mktemp("wheel") for _ in range(2)]
    first = install_detectron2.build_wheel(files, folders[0])
    second = install_detectron2.build_wheel(dict(reversed(files.items())), folders[1])
    assert first.read_bytes() == second.read_bytes()

    with zipfile.ZipFile(first) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    record_name = next(name for name in contents if name.endswith("/RECORD"))
    rows = {row[0]: row[1:] for row in csv.reader(contents[record_name].decode().splitlines())}
    assert rows.keys() == contents.keys()
    assert rows.pop(record_name) == ["", ""]
    for name, (digest, size) in rows.items():
        raw = base64.urlsafe_b64encode(hashlib.sha256(contents[name]).digest()).decode()
        assert digest == "sha256=" + raw.rstrip("=")
        assert int(size) == len(contents[name])
    for name, data in files.items():
        if name.startswith("detectron2/") and name != "detectron2/_C.py":
            assert contents[name] == data


def test_pip_installs_the_wheel_with_honest_metadata(tmp_path, sources):
    files = install_detectron2.apply_edits(sources, EDITS)
    wheel = install_detectron2.build_wheel(files, tmp_path)
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
    (found,) = importlib.metadata.distributions(name="detectron2", path=[str(target)])
    assert found.version == install_detectron2.VERSION
    assert "not an official build" in found.metadata["Summary"]
    assert sorted(found.requires) == sorted(install_detectron2.REQUIRES)
    assert found.read_text("EDITS.txt") == describe_edits()
    assert found.read_text("LICENSE") == "a license"
    assert (target / "detectron2" / "_C.py").read_text() == STAND_IN


def test_stand_in_answers_questions_and_refuses_operators():
    module: dict[str, object] = {}
    exec(STAND_IN, module)
    assert module["has_cuda"]() is False
    assert "pure-Python" in module["get_compiler_version"]()
    for name in module["_MISSING"]:
        with pytest.raises(NotImplementedError, match=rf"_C\.{name} is a compiled operator"):
            module[name](1, key=2)


def forbid_pip(*arguments, **settings):
    raise AssertionError(f"pip was called: {arguments} {settings}")


def test_an_existing_installation_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(install_detectron2, "existing_installation", lambda: "0.6 in /somewhere")
    monkeypatch.setattr(install_detectron2, "_pip", forbid_pip)
    assert install_detectron2.main([]) == 0
    assert "0.6 in /somewhere is already installed" in capsys.readouterr().out


def test_a_bare_folder_of_that_name_is_no_installation(tmp_path, monkeypatch):
    (tmp_path / "detectron2").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    importlib.invalidate_caches()
    assert install_detectron2.existing_installation() is None
    (tmp_path / "detectron2" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert str(tmp_path / "detectron2") in install_detectron2.existing_installation()


def test_fetching_without_torch_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(install_detectron2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(install_detectron2, "_pip", forbid_pip)
    with pytest.raises(InstallError, match="torch and setuptools must be installed first"):
        install_detectron2.fetch_sdist(tmp_path)


class FakePip:
    """Answers pip calls from a list of (exit status, output) and remembers them."""

    def __init__(self, answers: list[tuple[int, str]], archive: Path | None = None) -> None:
        self.answers, self.archive, self.calls = list(answers), archive, []

    def __call__(self, arguments, *, pip_folder=None):
        self.calls.append((list(arguments), pip_folder))
        status, output = self.answers.pop(0)
        if status == 0 and arguments[0] == "download":
            self.archive.touch()
        return subprocess.CompletedProcess(arguments, status, stdout=output)


def test_download_is_hash_checked_and_unisolated(tmp_path, monkeypatch):
    pip = FakePip([(0, "")], tmp_path / "a.tar.gz")
    monkeypatch.setattr(install_detectron2, "_pip", pip)
    assert install_detectron2.fetch_sdist(tmp_path) == tmp_path / "a.tar.gz"
    ((arguments, _),) = pip.calls
    assert {"--require-hashes", "--no-build-isolation", "--no-deps"} <= set(arguments)
    wish = (tmp_path / "requirements.txt").read_text()
    assert wish.strip().endswith(f"--hash=sha256:{install_detectron2.SDIST_SHA256}")


def test_a_pip_that_refuses_the_metadata_is_replaced_for_the_download(tmp_path, monkeypatch):
    refusal = "ERROR: Distributions from PyPI cannot declare direct URL dependencies."
    pip = FakePip([(1, refusal), (0, ""), (0, "")], tmp_path / "a.tar.gz")
    monkeypatch.setattr(install_detectron2, "_pip", pip)
    assert install_detectron2.fetch_sdist(tmp_path) == tmp_path / "a.tar.gz"
    (download, none), (install, _), (again, folder) = pip.calls
    assert none is None
    assert install[-1] == install_detectron2.DOWNLOAD_PIP and str(folder) in install
    assert again == download


def test_unreachable_index_shows_pips_words_and_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install_detectron2, "_pip", FakePip([(1, "ERROR: No matching dist")]))
    monkeypatch.setattr(install_detectron2, "existing_installation", lambda: None)
    assert install_detectron2.main([]) == 1
    message = capsys.readouterr().err
    assert "No matching dist" in message and "--sdist FILE" in message


def test_wheel_only_from_a_wrong_archive_writes_nothing(tmp_path, capsys):
    (tmp_path / "a.tar.gz").write_bytes(b"not it")
    out = tmp_path / "out"
    status = install_detectron2.main(
        ["--wheel-only", str(out), "--sdist", str(tmp_path / "a.tar.gz")]
    )
    assert status == 1 and not out.exists()
    assert "not the expected" in capsys.readouterr().err


def test_the_installed_compatibility_wheel_works():
    version = importlib.metadata.version("detectron2")
    if version != install_detectron2.VERSION:
        pytest.skip(f"detectron2 {version} is not the compatibility wheel of this checkout")
    import detectron2
    import detectron2.export
    import detectron2.model_zoo
    import detectron2.utils.analysis
    from detectron2.evaluation import coco_evaluation

    assert coco_evaluation.COCOeval_opt is None
    package = Path(detectron2.__file__).parent
    for edit in EDITS:
        assert edit.replace in (package / edit.path).read_text(), edit
    name = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    assert Path(detectron2.model_zoo.get_config_file(name)).is_file()
