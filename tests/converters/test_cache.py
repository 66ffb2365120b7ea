"""The folder of downloads and features: named by a flag, by the environment, or in the user's home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from converters.cache import cache_folder
from tests.support.house import ROOT

# A user without a home, as `docker run -u 54321` makes: HOME is unset, and /etc/passwd has no entry.
_NO_HOME = """
import pwd, runpy, sys
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown
module, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def test_a_flag_comes_before_the_environment_and_that_before_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("DINOJAX_CACHE", raising=False)
    assert cache_folder() == Path("/home/ada/.cache/dinojax")
    monkeypatch.setenv("DINOJAX_CACHE", "~/elsewhere")
    assert cache_folder(None) == Path("/home/ada/elsewhere")
    assert cache_folder("~/given") == Path("/home/ada/given")


@pytest.mark.parametrize(("place", "code"), [(None, 2), ("cache", 0)])
@pytest.mark.slow  # starts a command that computes features
def test_without_a_home_a_command_names_the_way_on_or_works(tmp_path, place, code):
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "DINOJAX_CACHE")}
    if place:
        environment["DINOJAX_CACHE"] = str(tmp_path / place)
    words = ["--data", "digits", "--max-train", "20", "--max-test", "20", "--weights", "random:dino_vits16",
             "--image-size", "16", "--classifiers", "knn", "--no-figures", "--out", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _NO_HOME, "experiments.cifar10_probe", *words],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert (tmp_path / "cache" / "features").exists() == (code == 0)
    if code:
        assert done.stderr.splitlines()[-1].startswith("error: there is no home folder for ~/.cache/dinojax; name ")
        assert "Traceback" not in done.stderr
