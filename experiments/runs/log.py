"""The log of a training: metrics.jsonl, which a resumed run continues, and TensorBoard's files."""

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dinojax.documents import write_whole
from dinojax.errors import UserError

LOG_FILE = "metrics.jsonl"
DAMAGED_FILE = "metrics.damaged"
_CHECK = "crc32"


class RunLog(contextlib.AbstractContextManager):
    """One JSON object per line, each with the number of steps done as "step" and, last, a CRC-32 of the line before it.

    Args:
        folder: the run folder.
        step: lines of later steps, which an interrupted run left behind, are removed. Damaged lines move to
            metrics.damaged.
        tensorboard: also write the numbers for TensorBoard, to `tensorboard/`.

    Raises:
        UserError: TensorBoard's writer is not installed, or the log cannot be written.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool):
        self.path = folder / LOG_FILE
        self._board = _board(folder / "tensorboard", step) if tensorboard else None
        records, damaged = _read(self.path)
        with _said(self.path):
            if damaged:
                numbers = ", ".join(map(str, damaged))
                print(f"note: damaged lines of {self.path} move to {DAMAGED_FILE}: {numbers}", flush=True)
                with (folder / DAMAGED_FILE).open("ab") as file:
                    file.write(b"".join(line + b"\n" for line in damaged.values()))
            write_whole(self.path, "".join(_line(record) for record in records if record["step"] <= step).encode())
            self._file = self.path.open("a", buffering=1)

    def __exit__(self, *_: object) -> None:
        with _said(self.path):
            self._file.close()
        if self._board:
            self._board.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a line.

        Raises:
            UserError: the disk is full; the lines before are whole.
        """
        with _said(self.path):
            self._file.write(_line(record))
        if self._board:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, record["step"])


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The sound lines of a run's log, in order; none where there is no log."""
    return _read(folder / LOG_FILE)[0]


def damaged_lines(folder: Path) -> list[int]:
    """The numbers, from 1, of the lines of a run's log that cannot be read or were changed."""
    return list(_read(folder / LOG_FILE)[1])


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """Sound records, and damaged lines by number. A last line that was cut off is neither: its run writes it again."""
    records, damaged, checked = [], {}, False
    content = path.read_bytes() if path.is_file() else b""
    *whole, _unfinished = content.split(b"\n")
    for number, line in enumerate(whole, 1):
        try:
            record, has_check = _checked(line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            damaged[number] = line
            continue
        if checked and not has_check:  # its check is damaged: lines of releases before 0.2 come before all others
            damaged[number] = line
            continue
        checked |= has_check
        records.append(record)
    return records, damaged


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(dict(record))
    return f'{text[:-1]}, "{_CHECK}": {zlib.crc32(text.encode())}}}\n'


def _checked(line: bytes) -> tuple[dict[str, Any], bool]:
    """The record of a line, and whether it has a CRC."""
    record = json.loads(line)
    stated = record.pop(_CHECK, None)
    if stated is not None and stated != zlib.crc32(json.dumps(record).encode()):
        raise ValueError("the line is not the one that was written")
    record["step"] + 0
    return record, stated is not None


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); make room, and run the command again") from error


def _board(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package: pip install 'dinojax[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=step)
