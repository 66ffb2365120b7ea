"""The lock of a run folder: one process at a time writes to it."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from dinojax.errors import UserError

LOCK_FILE = ".lock"


class RunLock(contextlib.AbstractContextManager):
    """An advisory lock on a folder, held until the end of the block or of the process, however it ends.

    The kernel holds the lock, so a file that a killed process leaves behind locks nothing. The file names the process
    for the message of others.

    Args:
        folder: exists.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK_FILE
        self._descriptor = self._locked(folder)
        identity = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(identity).encode(), 0)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)

    def _locked(self, folder: Path) -> int:
        """The descriptor of the locked file."""
        while True:
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise UserError(f"{folder} cannot be written ({error.strerror}); name another --out") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise UserError(
                    f"{folder} is in use by {holder}; wait until it has ended, or name another --out"
                ) from None
            except OSError:  # a file system without locks
                return descriptor
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)  # the holder removed the file between the two calls


def _holder(descriptor: int) -> str:
    """The process that holds the lock, as far as the file tells."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
