"""Set-up, Makefile, wheelhouse and doctor: what they do, and what they say when they cannot."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import collect_wheels
import doctor
import pytest
import setup_env
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]

TARGETS = ("3.10", "3.11", "3.12", "3.13")


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files set-up needs, without an environment."""
    (tmp_path / "tools/setup").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("setup_env.py", "install_detectron2.py", "detectron2_edits.py"):
        shutil.copy(ROOT / "tools/setup" / name, tmp_path / "tools/setup")
    return tmp_path


# --- requirements


@pytest.mark.parametrize("python", TARGETS)
def test_every_declared_dependency_has_one_pin_inside_its_range(python):
    environment = collect_wheels.target_environment(python, "x86_64")
    lines = [
        line.partition("#")[0].strip()
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    pins: dict[str, str] = {}
    for requirement in map(Requirement, filter(None, lines)):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            assert canonicalize_name(requirement.name) not in pins
            pins[canonicalize_name(requirement.name)] = pin.version
    for declared in map(Requirement, importlib.metadata.requires("asag")):
        if declared.name == "wandb":  # the client of a service, which sets the version it needs
            assert "wandb" not in pins
            continue
        assert declared.specifier.contains(pins[canonicalize_name(declared.name)]), declared
    for package, pin in (tool.split("==") for tool in (*setup_env.BUILD_TOOLS, setup_env.PROBE)):
        assert pins.get(package, pin) == pin
    assert "detectron2" not in pins


# --- set-up


def test_old_python_is_refused_with_the_way_out():
    with pytest.raises(setup_env.SetupError, match=r"3\.9\.18 is too old.*PYTHON=python3\.11"):
        setup_env.check_interpreter((3, 9, 18))
    setup_env.check_interpreter((3, 10, 0))


def test_missing_venv_module_names_the_system_package(monkeypatch):
    find_spec = setup_env.importlib.util.find_spec
    monkeypatch.setattr(
        setup_env.importlib.util,
        "find_spec",
        lambda name: None if name == "ensurepip" else find_spec(name),
    )
    with pytest.raises(setup_env.SetupError, match=r"no module ensurepip.*python3\.12-venv"):
        setup_env.check_interpreter((3, 12, 1))


def test_too_small_a_disk_is_refused(tmp_path, monkeypatch):
    free = {"bytes": 6e9}
    monkeypatch.setattr(
        setup_env.shutil, "disk_usage", lambda place: SimpleNamespace(free=free["bytes"])
    )
    with pytest.raises(setup_env.SetupError, match=r"has 6\.0 GB free"):
        setup_env.check_disk_space(tmp_path / ".venv")
    free["bytes"] = 12e9
    setup_env.check_disk_space(tmp_path / ".venv")


def test_no_index_is_noticed_before_the_long_download(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(setup_env.SetupError, match="pip cannot fetch yacs") as caught:
        setup_env.check_index(Path(sys.executable))
    assert "make wheelhouse" in str(caught.value)
    assert "No matching distribution" in str(caught.value)


def test_a_working_environment_is_left_alone(tmp_path, monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(setup_env, "_run", lambda command, *_, **__: commands.append(command))
    site = tmp_path / "lib" / "python3.11" / "site-packages" / "torch"
    site.mkdir(parents=True)
    (site / "__init__.py").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(
        setup_env.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0)
    )
    assert setup_env.create_environment(tmp_path) == tmp_path / "bin" / "python"
    assert commands == []


def test_a_failed_setup_leaves_no_stamp(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise setup_env.SetupError("pip said no")

    monkeypatch.setattr(setup_env, "VENV", tmp_path)
    monkeypatch.setattr(setup_env, "create_environment", lambda: Path(sys.executable))
    monkeypatch.setattr(setup_env, "install_packages", fail)
    assert setup_env.main() == 1
    assert "setup: pip said no" in capsys.readouterr().err
    assert not (tmp_path / setup_env.STAMP).exists()
    monkeypatch.setattr(setup_env, "install_packages", lambda python: None)
    assert setup_env.main() == 0
    assert (tmp_path / setup_env.STAMP).exists()


def test_make_lists_every_public_target():
    listed = re.findall(r"make (\w+)", run_make(ROOT).stdout)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    assert set(phony) <= set(listed)


def test_make_setup_refuses_unsuitable_interpreters(checkout):
    result = run_make(checkout, "setup", "PYTHON=no-such-python")
    assert result.returncode != 0 and "there is no 'no-such-python'" in result.stderr
    old = checkout / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1\nexit 1\n')
    old.chmod(0o755)
    result = run_make(checkout, "setup", f"PYTHON={old}")
    assert result.returncode != 0 and "Python 3.8.1 is too old" in result.stderr


def test_make_repeats_setup_only_when_its_inputs_change(checkout):
    ready = checkout / ".venv" / ".ready"
    ready.parent.mkdir()
    ready.touch()
    assert "setup_env.py" not in run_make(checkout, "-n", "setup").stdout
    run_make(checkout, "-n", "setup")
    result = run_make(checkout, "-n", "-W", "requirements.txt", "setup")
    assert "setup_env.py" in result.stdout


def test_make_wheelhouse_takes_a_target_version(checkout):
    out = run_make(checkout, "-n", "wheelhouse", "PYTHON=3.12", "WITHOUT=timm scipy").stdout
    assert 'tools/setup/collect_wheels.py --python "3.12" --without timm scipy' in out
    assert "python3 tools/setup/setup_env.py" in out


# --- wheelhouse


def write_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name.replace('-', '_')}-{version}.dist-info/METADATA", "\n".join(lines))


def test_dependencies_follow_the_targets_markers_not_ours(tmp_path):
    write_wheel(
        tmp_path,
        "top",
        "1.0",
        "torch>=2",
        "old-helper; python_version < '3.11'",
        "new-helper>=2; python_version >= '3.11'",
        "mac-only; sys_platform == 'darwin'",
        "wanted-extra; extra == 'fast'",
        "other-extra; extra == 'slow'",
    )
    direct = [Requirement("top[fast]")]
    found = {
        python: set(
            collect_wheels.unmet(
                tmp_path, direct, collect_wheels.target_environment(python, "x86_64")
            )
        )
        for python in ("3.10", "3.12")
    }
    assert found == {
        "3.10": {"old-helper", "wanted-extra"},
        "3.12": {"new-helper", "wanted-extra"},
    }


def test_demands_are_intersected_and_exclusions_prune(tmp_path):
    environment = collect_wheels.target_environment("3.12", "x86_64")
    write_wheel(tmp_path, "a", "1.0", "shared<3")
    write_wheel(tmp_path, "b", "1.0", "shared>=2", "only-b")
    write_wheel(tmp_path, "shared", "3.1")
    direct = [Requirement("a"), Requirement("b")]
    requested = collect_wheels.unmet(tmp_path, direct, environment)
    assert set(requested) == {"shared", "only-b"}
    assert {str(part) for part in requested["shared"].specifier} == {"<3", ">=2"}
    assert set(collect_wheels.unmet(tmp_path, direct, environment, {"b"})) == {"shared"}


def test_direct_requirements_choose_the_targets_pins():
    text = "torch==2\nscipy==1; python_version < '3.11'\nscipy==2; python_version >= '3.11' # x\n\n"
    for python, pin in (("3.10", "==1"), ("3.12", "==2")):
        environment = collect_wheels.target_environment(python, "x86_64")
        (found,) = collect_wheels.direct_requirements(text, environment)
        assert (found.name, str(found.specifier)) == ("scipy", pin)
        assert collect_wheels.direct_requirements(text, environment, {"scipy"}) == []


def test_collecting_fetches_round_by_round_until_complete(tmp_path, monkeypatch):
    index = {"top": ["middle"], "middle": ["bottom"], "bottom": []}
    fetched: list[str] = []

    def fetch(folder, requested, python, machine):
        fetched.extend(requested)
        for name in requested:
            write_wheel(folder, name, "1.0", *index[name])

    monkeypatch.setattr(collect_wheels, "fetch", fetch)
    monkeypatch.setattr(collect_wheels, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text("top==1.0\n")
    folder = tmp_path / "wheels"
    folder.mkdir()
    direct = collect_wheels.collect(folder, "3.12", "x86_64", {"detectron2"})
    assert fetched == ["top", "middle", "bottom"]
    assert [str(requirement) for requirement in direct] == ["top==1.0"]


def test_contradicting_demands_end_with_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(
        collect_wheels, "fetch", lambda folder, requested, *_: write_wheel(folder, "top", "2.0")
    )
    monkeypatch.setattr(collect_wheels, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text("top==1.0\n")
    with pytest.raises(collect_wheels.WheelhouseError, match=r"contradict each other: top==1\.0"):
        collect_wheels.collect(tmp_path, "3.12", "x86_64", {"detectron2"})


def test_fetch_asks_pip_for_the_target(tmp_path, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(
        collect_wheels, "_pip", lambda arguments, what: calls.append(list(arguments))
    )
    requested = {"fvcore": collect_wheels.Requested(), "scipy": collect_wheels.Requested()}
    collect_wheels.fetch(tmp_path, requested, "3.12", "x86_64")
    build, download = calls
    assert build[0] == "wheel" and build[-1] == "fvcore" and "scipy" not in build
    assert download[0] == "download" and download[-1] == "scipy" and "fvcore" not in download
    pairs = set(itertools.pairwise(download))
    assert {("--python-version", "3.12"), ("--abi", "cp312"), ("--abi", "abi3")} <= pairs
    assert ("--platform", "manylinux_2_28_x86_64") in pairs


def test_install_command_skips_dependencies_only_when_some_are_left_out():
    complete = collect_wheels.install_command("wheelhouse")
    assert complete.endswith("--find-links wheelhouse -r wheelhouse/requirements.txt")
    partial = collect_wheels.install_command("wheelhouse", ["matplotlib"])
    assert "--no-deps wheelhouse/*.whl" in partial and "matplotlib" in partial


def test_wheelhouse_failure_keeps_the_old_one(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise collect_wheels.WheelhouseError("pip could not fetch scipy")

    monkeypatch.setattr(collect_wheels, "collect", fail)
    write_wheel(tmp_path, "kept", "1.0")
    assert collect_wheels.main(["--python", "3.12", "--output", str(tmp_path)]) == 1
    assert "pip could not fetch scipy" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.whl"))) == 1
    with pytest.raises(SystemExit):
        collect_wheels.main(["--python", "pypy3.10"])


# --- doctor


def test_doctor_finds_this_environment_in_order(capsys):
    status = doctor.main()
    out = capsys.readouterr().out
    assert status == 0, out
    assert "WRONG" not in out
    assert "one training step on" in out


def test_doctor_exits_with_one_and_prints_the_remedy(monkeypatch, capsys):
    lines = [doctor.Line("ok", "fine"), doctor.Line("WRONG", "torn", "sew it")]
    monkeypatch.setattr(doctor, "CHECKS", {"Cloth": lambda: iter(lines)})
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert re.search(r"WRONG +torn\n +-> sew it", out)


def test_doctor_names_missing_and_misfitting_packages(monkeypatch):
    declared = [
        "torch>=2.1",
        "numpy>=99",
        "no-such-package>=1",
        'no-such-extra>=1; extra == "fast"',
        'no-such-tool; extra == "dev"',
    ]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: declared)
    found = [(line.status, line.text.split()[0]) for line in doctor.check_packages()]
    assert found[1:] == [
        ("ok", "torch"),
        ("WRONG", "numpy"),
        ("WRONG", "no-such-package"),
        ("note", "no-such-extra"),
    ]
    assert all(line.remedy for line in doctor.check_packages() if line.status != "ok")


def test_doctor_without_the_package_or_detectron2(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    (line,) = doctor.check_packages()
    assert line.status == "WRONG" and line.remedy.endswith(doctor.INSTALL_PACKAGE)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    (line,) = doctor.check_detectron2()
    assert line == doctor.Line("WRONG", "detectron2 is not installed", doctor.INSTALL_DETECTRON2)


def test_doctor_reports_a_broken_detectron2(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    (line,) = doctor.check_detectron2()
    assert line.status == "WRONG" and "undefined symbol" in line.text
    assert "rebuild it against the installed torch" in line.remedy


def test_doctor_knows_the_setuptools_trap(monkeypatch, tmp_path):
    (tmp_path / "model_zoo").mkdir()
    (tmp_path / "model_zoo" / "model_zoo.py").write_text("import pkg_resources\n")
    specs = {"detectron2": SimpleNamespace(origin=str(tmp_path / "__init__.py"))}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", specs.get)
    statuses = [line.status for line in doctor.check_detectron2()]
    assert statuses == ["ok", "ok", "note"]
    specs["pkg_resources"] = SimpleNamespace(origin="somewhere")
    assert [line.status for line in doctor.check_detectron2()] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("version", "status", "text"),
    [
        ("0.5+purepy.1", "ok", "the tests of asag pass on"),
        ("0.6", "ok", "the tests of asag pass on"),
        ("0.7", "note", "this Detectron2 was not tested"),
    ],
)
def test_doctor_says_what_was_tested(monkeypatch, version, status, text):
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    (line,) = [line for line in doctor.check_detectron2() if "tests of asag" in line.text]
    assert line.status == status and line.text.startswith(text)
    assert "02b5c4e of 2026-06-06" in line.text


@pytest.mark.parametrize(
    ("version", "compiled", "words"),
    [
        ("0.5+purepy.1", False, "compatibility wheel"),
        ("0.6", True, "official build with compiled"),
        ("0.6", False, "official Python sources"),
        (None, False, "official Python sources"),
    ],
)
def test_doctor_tells_the_detectron2s_apart(version, compiled, words):
    assert words in doctor.detectron2_origin(version, compiled)


def test_doctor_says_when_the_step_fails(tmp_path):
    (line,) = doctor.check_step(tmp_path / "absent.yaml")
    assert line.status == "WRONG" and "absent.yaml" in line.text and line.remedy
