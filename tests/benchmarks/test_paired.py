"""When a row of a benchmark counts."""

import subprocess
import sys
import time

import pytest

from benchmarks.work.paired import Comparison, _foreign_share

STEADY = [1.0, 1.01, 0.99, 1.0, 1.0]


@pytest.mark.parametrize(
    ("theirs", "control", "foreign", "valid"),
    [
        ([2.0, 2.02, 1.98, 2.0, 2.0], STEADY, 0.0, True),
        ([2.0, 2.02, 1.98, 2.0, 2.0], [1.1] * 5, 0.0, False),  # the same program beside itself
        ([1.0, 3.0, 2.0, 3.0, 1.0], STEADY, 0.0, False),  # quartiles far apart
        ([2.0, 2.02, 1.98, 2.0, 2.0], STEADY, 0.1, False),  # others took a tenth of the machine
    ],
)
def test_a_row_counts_where_the_machine_was_quiet(theirs, control, foreign, valid):
    found = Comparison({"ours": STEADY, "theirs": theirs, "control": control}, {}, foreign)
    verdict = found.verdict(found.ratio("control", "ours"), found.ratio("ours", "theirs"))
    assert verdict == {"valid": valid, "foreign_share": foreign}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_work_of_other_processes_is_seen():
    """A process that computes is foreign, unless it is named as our own."""
    loop = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(loop) as other:
        try:
            seen, ours = _foreign_share([]), _foreign_share([other.pid])
            time.sleep(0.5)
            assert seen() - ours() > 0.02
        finally:
            other.kill()
