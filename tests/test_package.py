"""The front door `dinojax COMMAND`, lazy imports, and the wheel."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import dinojax
from experiments.__main__ import COMMANDS
from tests.support.house import ROOT, python_files


def run_in(folder: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=os.environ | environment)


def door(*args: str) -> subprocess.CompletedProcess[str]:
    return run_in(ROOT, sys.executable, "-m", "experiments", *args)


def test_the_door_leads_to_every_command():
    expected = ["probe", "predict", "evaluate", "embed", "visualize", "patches"]
    expected += ["finetune", "dense", "pretrain", "summarize", "search", "duplicates", "cluster", "convert", "demo"]
    assert list(COMMANDS) == expected
    assert {module for module, _ in COMMANDS.values()} <= set(python_files())
    assert all(callable(importlib.import_module(module).main) for module, _ in COMMANDS.values())


def test_help_lists_every_command_on_a_line_with_nothing_but_python_imported():
    """So it takes a fifth of a second; JAX alone takes more than one."""
    code = (
        "import sys; before = set(sys.modules); import experiments.__main__ as door; door.main(['--help'])\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert loaded - sys.stdlib_module_names <= {'dinojax', 'experiments'}, loaded"
    )
    done = run_in(ROOT, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^  (\w+) +\S.*$", done.stdout, re.MULTILINE) == list(COMMANDS)
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


def test_without_words_the_door_says_what_there_is():
    assert door().stdout == door("--help").stdout == door("-h").stdout


def test_an_unknown_command_is_one_sentence_with_a_close_match():
    done = door("visualise", "photo.jpg")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: dinojax has no command 'visualise'; did you mean visualize?\n"
    assert door("xyz").stderr == "error: dinojax has no command 'xyz'; dinojax --help lists the commands\n"


def test_the_version_is_the_package_s():
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert written[1] == dinojax.__version__
    assert door("--version").stdout == f"dinojax {dinojax.__version__}\n"


@pytest.mark.slow  # starts two commands
def test_a_command_behind_the_door_is_its_module():
    through = door("summarize", "no/such/run")
    direct = run_in(ROOT, sys.executable, "-m", "experiments.summarize", "no/such/run")
    assert through.returncode == direct.returncode == 2, direct.stderr
    assert through.stderr == direct.stderr != ""


def test_a_missing_extra_is_named():
    code = (
        "import sys; sys.modules['tyro'] = None\n"  # as if it were not installed
        "from experiments.__main__ import main; main(['convert', 'x'])"
    )
    done = run_in(ROOT, sys.executable, "-c", code)
    assert done.returncode == 2
    assert done.stderr == (
        "error: dinojax convert needs the package tyro; pip install 'dinojax[experiments,torch]' installs it\n"
    )


def test_the_package_is_a_door_to_the_installed_command():
    code = "import sys, runpy; sys.argv = ['dinojax', '--version']; runpy.run_module('dinojax', run_name='__main__')"
    done = run_in(ROOT, sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, f"dinojax {dinojax.__version__}\n"), done.stderr


def test_names_come_when_they_are_used():
    names = [*dinojax.__all__, *dinojax._MODULES]
    assert set(names) <= set(dir(dinojax))
    code = (
        "import sys, dinojax; assert 'jax' not in sys.modules\n"
        f"for name in {names}:\n"
        "    exec(f'from dinojax import {name} as found'); assert found is getattr(dinojax, name)"
    )
    done = run_in(ROOT, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dinojax' has no attribute 'laod'"):
        dinojax.laod  # noqa: B018


@pytest.mark.slow  # installs JAX and the commands' libraries from the package index into an empty environment: minutes
@pytest.mark.timeout(1200)
def test_the_wheel_works_away_from_the_checkout(tmp_path):
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("dinojax", "converters", "experiments", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")

    # pip tells a build's warnings only with -v; "byte-compiling is disabled" comes from the caller's environment.
    plain = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}
    built = run_in(tmp_path, binaries / "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, checkout, **plain)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    log = re.sub(r"WARNING: Location .* is ignored.*", "", built.stdout + built.stderr)
    assert "warn" not in log.lower(), [line for line in log.splitlines() if "warn" in line.lower()]

    installed = run_in(elsewhere, binaries / "pip", "install", "-q", f"{wheel}[experiments]", **plain)
    assert installed.returncode == 0, installed.stderr
    packages = {path.parent.name for path in (tmp_path / "venv").glob("lib/python*/site-packages/*/__init__.py")}
    assert {"dinojax", "converters", "experiments"} <= packages
    assert not {"benchmarks", "tests"} & packages

    dinojax_command = binaries / "dinojax"
    assert "probe" in run_in(elsewhere, dinojax_command, "--help", **plain).stdout
    assert run_in(elsewhere, dinojax_command, "--version", **plain).stdout == f"dinojax {dinojax.__version__}\n"
    probe = run_in(
        elsewhere, dinojax_command, "probe", "--data", "digits", "--weights", "dinojax_vitt", "--image-size", "32",
        "--max-train", "200", "--max-test", "50", "--epochs", "1", "--classifiers", "knn,linear", "--out", "run",
        "--cache-dir", "cache", **plain,
    )  # fmt: skip
    assert probe.returncode == 0, probe.stderr
    assert "linear" in probe.stdout
    assert (elsewhere / "run" / "metrics.json").is_file()
    again = run_in(elsewhere, binaries / "python", "-m", "dinojax", "--version", **plain)
    assert again.stdout == f"dinojax {dinojax.__version__}\n"
