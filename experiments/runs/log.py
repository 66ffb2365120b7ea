"""What a long run writes while it goes: metrics.jsonl, which a resumed run continues, and TensorBoard's files."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinojax.errors import UserError

LOG_FILE = "metrics.jsonl"


class RunLog(contextlib.AbstractContextManager):
    """One JSON object a line, each with the number of steps done as "step".

    Args:
        folder: the run folder.
        step: lines of later steps, which an interrupted run left behind, are removed.
        tensorboard: write the numbers for TensorBoard as well, to `tensorboard/`.

    Raises:
        UserError: TensorBoard's writer is not installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool):
        self.path = folder / LOG_FILE
        self._board = _board(folder / "tensorboard", step) if tensorboard else None
        kept = [record for record in read_log(folder) if record["step"] <= step]
        partial = self.path.with_name(f".{LOG_FILE}")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(self.path)
        self._file = self.path.open("a", buffering=1)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a line."""
        self._file.write(json.dumps(dict(record)) + "\n")
        if self._board:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, record["step"])


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; the last one may be cut off, and is left out then."""
    path = folder / LOG_FILE
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _board(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package: pip install 'dinojax[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=step)
