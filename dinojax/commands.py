"""What every command line shares: how mistakes end it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dinojax.errors import UserError


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends a command with one line on stderr: exit code 2 for a `UserError`, 130 for Ctrl-C."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from what is saved", file=sys.stderr)
        raise SystemExit(130) from None
