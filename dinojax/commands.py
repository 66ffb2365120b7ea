"""What every command line shares: what its output may hold, and how mistakes, signals and a full disk end it."""

import errno
import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dinojax.errors import UserError

_NO_HOME = "Could not determine home directory."  # of `Path.expanduser`
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends a command with one line on stderr: exit code 2 for a `UserError` or a full disk, 130 for Ctrl-C.

    SIGTERM and SIGHUP end it with 128 plus their number, after temporary files are removed. Letters that the terminal
    or the locale does not have are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _exit)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if str(error) != _NO_HOME:
            raise
        print("error: a path begins with ~, but there is no such home folder; write the path in full", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _FULL:
            raise
        place = f" {error.filename}" if error.filename else ""
        print(
            f"error: cannot write{place} ({error.strerror}); free some space, and run the same command again",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from what is saved", file=sys.stderr)
        raise SystemExit(130) from None


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)
