"""Claims as commands: each file is one `python -m experiments.<name>`, one config, one result."""

import sys

if sys.argv[:1] == ["-m"]:  # a command is about to be imported, which takes seconds
    _excepthook = sys.excepthook

    def _without_traceback(kind: type[BaseException], error: BaseException, traceback: object) -> None:
        """Ctrl-C during the imports ends a command in one line, as it does later on."""
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            _excepthook(kind, error, traceback)

    sys.excepthook = _without_traceback
