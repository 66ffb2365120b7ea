"""How every command starts and ends: letters that the terminal lacks, and homes that do not exist."""

import os
import subprocess
import sys

import pytest

from tests.support.house import ROOT


def run(code, **environment):
    words = [
        sys.executable,
        "-c",
        f"from dinojax.commands import exit_on_user_error\nwith exit_on_user_error(): {code}",
    ]
    return subprocess.run(words, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, check=False)


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_letters_that_the_terminal_lacks_do_not_stop_a_command(environment):
    done = run(r"print('1 \xb1 2 \udce9'); raise __import__('dinojax').UserError('no caf\xe9')", **environment)
    assert (done.stdout, done.stderr) == (b"1 \\xb1 2 \\udce9\n", b"error: no caf\\xe9\n")
    assert done.returncode == 2


def test_names_that_are_not_utf_8_are_printed_on_a_usual_terminal():
    done = run(r"print('1 \xb1 2 \udce9')", PYTHONIOENCODING="utf-8")
    assert (done.stdout, done.returncode) == (b"1 \xc2\xb1 2 \\udce9\n", 0)


def test_a_home_that_does_not_exist_is_one_sentence():
    done = run("__import__('pathlib').Path('~nobody-has-this-name/x').expanduser()")
    assert done.stderr.startswith(b"error: a path begins with ~, but there is no such home folder")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
