"""Run folders: one run, one data set, one process; nothing half written, and nothing read that was changed."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

from dinojax import UserError
from dinojax.commands import exit_on_user_error
from experiments.runs.lock import RunLock
from experiments.runs.records import (
    data_record,
    default_run_folder,
    open_run,
    read_json,
    run_folder,
    write_json,
)
from experiments.runs.settings import UNIMPORTANT


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    epochs: int = 3
    threads: Annotated[int, UNIMPORTANT] = 1


@dataclasses.dataclass(frozen=True)
class Images:
    """As much of a split as a run folder keeps."""

    identity: str
    count: int = 60

    def __len__(self) -> int:
        return self.count


def record(identity: str = "abc", classes: tuple[str, ...] = ("bird", "frog"), count: int = 60) -> dict:
    return data_record(classes, {"train": Images(identity, count), "test": Images("test")})


@pytest.fixture
def begun(tmp_path) -> Path:
    """A run that has made a step."""
    with open_run(tmp_path / "run", Config(), record()):
        (tmp_path / "run" / "metrics.jsonl").write_text("")
    return tmp_path / "run"


def test_the_same_run_resumes_also_under_other_unimportant_settings(begun):
    with open_run(begun, Config(threads=8), record()):
        assert read_json(begun / "config.json") == {"epochs": 3, "threads": 1}
    with (
        pytest.raises(UserError, match=r"is a run with epochs = 3, not 4; give the same settings"),
        open_run(begun, Config(epochs=4), record()),
    ):
        pass


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (record(classes=("cat", "dog")), r"is a run on other classes \(bird, frog, not cat, dog\); name another --out"),
        (record("other"), r"the train images are not those .* \(60 then, 60 now; names, sizes or contents differ\)"),
        (record("more", count=70), r"\(60 then, 70 now; .*accept them with --accept-changed-data"),
    ],
)
def test_a_run_on_other_data_is_refused_by_name(begun, data, sentence):
    with pytest.raises(UserError, match=sentence), open_run(begun, Config(), data):
        pass


def test_changed_images_are_accepted_on_request_and_noted(begun, capsys):
    with open_run(begun, Config(), record("more", count=70), accept_changed_data=True):
        pass
    assert "the train images have changed since" in capsys.readouterr().out
    (change,) = read_json(begun / "data.json")["accepted_changes"]
    assert change["before"]["train"] == {"images": 60, "identity": "abc"}
    with open_run(begun, Config(), record("more", count=70)):
        pass
    with (
        pytest.raises(UserError, match="other classes"),
        open_run(begun, Config(), record(classes=("cat", "dog")), accept_changed_data=True),
    ):
        pass


def test_a_folder_without_a_step_takes_other_settings(tmp_path):
    """A refused setting must not stand in the way of the corrected command."""
    with pytest.raises(UserError, match="mixed sizes"), open_run(tmp_path, Config(), record()):
        raise UserError("mixed sizes")
    with open_run(tmp_path, Config(epochs=5), record("other")):
        assert read_json(tmp_path / "config.json")["epochs"] == 5


def test_going_back_takes_other_settings(begun):
    with open_run(begun, Config(epochs=9), record(), other_settings=True):
        pass
    assert read_json(begun / "config.json")["epochs"] == 9


def test_a_run_of_an_earlier_version_records_its_data(begun, capsys):
    (begun / "data.json").unlink()
    (begun / "config.json").write_text('{"epochs": 3, "threads": 1}')  # without a hash
    with open_run(begun, Config(), record("other")):
        pass
    assert "earlier version" in capsys.readouterr().out
    with pytest.raises(UserError, match="the train images are not those"), open_run(begun, Config(), record()):
        pass


def test_a_run_folder_in_use_is_refused_and_left_alone(begun, tmp_path):
    before = sorted(path.name for path in begun.iterdir())
    in_use = pytest.raises(UserError, match=f"is in use by process {os.getpid()}")
    with RunLock(begun), in_use, open_run(begun, Config(), record()):
        pass
    assert sorted(path.name for path in begun.iterdir()) == before
    with run_folder(tmp_path / "probe") as partial:
        (partial / "config.json").write_text("{}")
        with pytest.raises(UserError, match="is in use by process"), run_folder(tmp_path / "probe"):
            pass
    assert [path.name for path in (tmp_path / "probe").iterdir()] == ["config.json"]


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-120000")
    folders = [default_run_folder("probe") for _ in range(3)]
    assert [folder.name for folder in folders] == ["20260101-120000", "20260101-120000-2", "20260101-120000-3"]


def test_a_failed_run_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), run_folder(tmp_path / "a" / "run") as partial:
        (partial / "result.json").write_text("{}")
        raise ZeroDivisionError
    assert list((tmp_path / "a").iterdir()) == []


def test_an_edited_result_is_refused(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"accuracy": 0.5, "out": Path("here")})
    assert read_json(path) == {"accuracy": 0.5, "out": "here"}
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"accuracy": 0.9}))
    with pytest.raises(UserError, match=r"result.json is damaged or was edited .*; repeat the run that wrote it"):
        read_json(path)


def test_a_full_disk_anywhere_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/curves.png")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: cannot write runs/a/curves.png (No space left on device); free some space, and run the same command "
        "again\n"
    )


STOPPED = """
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background ignores it
import pathlib, sys, time
from dinojax.commands import exit_on_user_error
from experiments.runs.records import run_folder
with exit_on_user_error(), run_folder(pathlib.Path(sys.argv[1])) as partial:
    (partial / "half").write_text("")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stopped_command_leaves_no_temporary_folder(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (128 + number if number != signal.SIGINT else 130)
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
