"""How every command starts and ends: letters that the terminal lacks, homes that do not exist, signals."""

import os
import signal
import subprocess
import sys

import pytest

from dinojax import UserError
from dinojax.commands import answering_signals
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


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_ends_a_command_in_silence(lines):
    code = f"from dinojax.commands import *\nwith exit_on_user_error():\n for i in range({lines}): print(i)"
    words, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe) as command:
        command.stdout.close()
        assert command.stderr.read() == b"" and command.wait() == 128 + signal.SIGPIPE


def test_a_home_that_does_not_exist_is_one_sentence():
    done = run("__import__('pathlib').Path('~nobody-has-this-name/x').expanduser()")
    assert done.stderr.startswith(b"error: a path begins with ~, but there is no such home folder")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_does_not_wait_for_work_that_does_not_return_to_python(number, code):
    """As XLA's compiler: the work holds on in C. The interpreter does not end in order, which might crash that work."""
    code_of_the_process = (
        "import atexit, ctypes, signal\n"
        "atexit.register(print, 'ended in order')\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dinojax.commands import answering_signals, exit_on_user_error\n"
        "def work():\n"
        "    print('begun', flush=True)\n"
        "    ctypes.CDLL(None).sleep(1000)\n"
        "with exit_on_user_error():\n"
        "    answering_signals(work)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code_of_the_process],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    rest, said = process.communicate(timeout=120)
    assert (process.returncode, rest) == (code, "")
    assert said == ("interrupted; the same command resumes from what is saved\n" if code == 130 else "")


def test_the_result_of_work_in_another_thread_and_its_mistakes_arrive():
    assert answering_signals(lambda: 3) == 3
    with pytest.raises(UserError, match="a mistake"):
        answering_signals(lambda: (_ for _ in ()).throw(UserError("a mistake")))
