"""The log of a training: sound lines are kept whatever happens to others, and nothing unreadable is deleted."""

import json
import math
import subprocess
import sys

import pytest

from dinojax import UserError
from experiments.runs.log import DAMAGED_FILE, LOG_FILE, RunLog, damaged_lines, read_log

RECORDS = [{"step": step, "loss": 1 / (step + 3), "collapse": "no: é"} for step in range(1, 6)]


def write(folder, records=RECORDS, step=0):
    with RunLog(folder, step, tensorboard=False) as log:
        for record in records:
            log.write(record)
    return folder / LOG_FILE


def test_lines_are_json_with_the_records_and_a_check(tmp_path):
    lines = [json.loads(line) for line in write(tmp_path).read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "crc32"} for line in lines] == RECORDS
    assert read_log(tmp_path) == RECORDS


def test_every_flipped_bit_costs_its_own_line_at_most(tmp_path):
    path = write(tmp_path)
    content = path.read_bytes()
    second = content.index(b"\n") + 1
    third = content.index(b"\n", second)
    for place in range(second, third):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            found = read_log(tmp_path)
            without = [record for record in RECORDS if record["step"] != 2]
            assert found in (RECORDS, without), bytes(damaged[second:third])
            if found == without:
                assert damaged_lines(tmp_path)[0] == 2


def test_a_resumed_run_keeps_sound_lines_and_puts_damaged_ones_aside(tmp_path):
    path = write(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[1] = b'{"step": 2, "lo\xff'
    path.write_bytes(b"\n".join(lines))
    write(tmp_path, [{"step": 5}], step=4)
    assert [record["step"] for record in read_log(tmp_path)] == [1, 3, 4, 5]
    assert (tmp_path / DAMAGED_FILE).read_bytes() == b'{"step": 2, "lo\xff\n'
    assert damaged_lines(tmp_path) == []


def test_a_last_line_that_was_cut_off_is_no_damage(tmp_path):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    assert read_log(tmp_path) == RECORDS[:-1]
    assert damaged_lines(tmp_path) == []
    write(tmp_path, RECORDS[-1:], step=4)
    assert read_log(tmp_path) == RECORDS
    assert not (tmp_path / DAMAGED_FILE).exists()


def test_lines_of_an_earlier_release_and_infinite_numbers_are_read(tmp_path):
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 2.5}\n')
    write(tmp_path, [{"step": 2, "loss": math.inf}], step=1)
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": math.inf}]


FILLING = """
import pathlib, resource, signal, sys
from experiments.runs.log import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
log = RunLog(pathlib.Path(sys.argv[1]), 0, tensorboard=False)
for step in range(100):
    log.write({"step": step})
"""


def test_a_log_that_cannot_grow_is_said_in_one_sentence_and_stays_whole(tmp_path):
    ended = subprocess.run([sys.executable, "-c", FILLING, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "metrics.jsonl cannot be written (File too large); make room, and run the command again" in ended.stderr
    assert [record["step"] for record in read_log(tmp_path)] == list(range(len(read_log(tmp_path))))
    assert 3 < len(read_log(tmp_path)) < 10
    assert damaged_lines(tmp_path) == []


def test_a_log_forgets_later_steps_and_a_line_that_was_cut_off(tmp_path):
    with RunLog(tmp_path, 0, tensorboard=False) as log:
        for step in (2, 4, 6):
            log.write({"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    with RunLog(tmp_path, 4, tensorboard=False) as log:
        log.write({"step": 5, "loss": 2.0})
    assert [record["step"] for record in read_log(tmp_path)] == [2, 4, 5]


def test_tensorboard_without_its_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="--tensorboard needs a package"):
        RunLog(tmp_path, 0, tensorboard=True)
