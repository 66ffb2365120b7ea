"""The lock of a run folder, held by real processes."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from dinojax import UserError
from experiments.runs.lock import LOCK_FILE, RunLock

HOLDER = """
import pathlib, sys, time
from experiments.runs.lock import RunLock
with RunLock(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_the_second_process_is_told_who_holds_the_folder(tmp_path, holder):
    expected = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since "
    with pytest.raises(UserError, match=f"^{re.escape(expected)}.*; wait until it has ended, or name another --out$"):
        RunLock(tmp_path)
    holder.communicate("end\n")
    with RunLock(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_stale(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with RunLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_a_process_may_lock_again_what_it_has_released(tmp_path):
    for _ in range(3):
        with RunLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} "):
            RunLock(tmp_path)
