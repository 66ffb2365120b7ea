"""The one exception for mistakes that the user can mend, and the guard that turns it into exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake outside the program (a file, a flag, a missing package): one sentence, with the value and the way on.

    Everything else that is raised is a bug and keeps its traceback.
    """


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends a command with one line on stderr: exit code 2 for a `UserError`, 130 for Ctrl-C."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        raise SystemExit(130) from None
