"""What every command line shares: what its output may hold, and how mistakes, signals and a full disk end it."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TypeVar

from dinojax.errors import UserError

T = TypeVar("T")

_NO_HOME = "Could not determine home directory."  # of `Path.expanduser`
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOOK_SECONDS = 0.1  # between two looks at the signals while another thread works
_left_behind: list[threading.Event] = []  # of each thread, set when its work is done


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends a command with one line on stderr: exit code 2 for a `UserError` or a full disk, 130 for Ctrl-C.

    SIGTERM and SIGHUP end it with 128 plus their number, after temporary files are removed; so does a reader of its
    output that leaves, such as `head`. Letters that the terminal
    or the locale does not have are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _exit)
    try:
        with _one_line():
            yield
    except SystemExit as stop:
        _end_at_once(stop.code)
        raise
    _end_at_once(0)


def answering_signals(work: Callable[[], T]) -> T:
    """The result of `work`, which runs in another thread while this one answers signals.

    XLA compiles without returning to Python: in the main thread, a signal would wait until it is done. If a handler
    raises, the thread is left behind, and `exit_on_user_error` ends the process without it.
    """
    future: Future[T] = Future()
    done = threading.Event()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        done.set()

    try:
        threading.Thread(target=run, name="work", daemon=True).start()
        # Not `Thread.join`: in Python 3.11, a thread counts as ended when a signal has interrupted that.
        while not done.wait(_LOOK_SECONDS):
            pass
    except BaseException:
        _left_behind.append(done)
        raise
    return future.result()


def _end_at_once(code: object) -> None:
    """Ends the process if a thread was left behind: the interpreter would wait for it, or crash."""
    if all(done.is_set() for done in _left_behind):
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as `head` does: nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
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
