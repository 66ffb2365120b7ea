"""`python -m dinojax`: the command that the installed package declares as `dinojax`.

The method does not know the commands above it. It looks the command up in the package's metadata, as a shell would.
"""

import sys
from importlib.metadata import entry_points


def main() -> None:
    """Runs the console script `dinojax` in this process."""
    scripts = entry_points(group="console_scripts", name="dinojax")
    if not scripts:
        print(
            "error: the command dinojax is not installed; in a checkout run: pip install --editable .", file=sys.stderr
        )
        raise SystemExit(2)
    next(iter(scripts)).load()()


if __name__ == "__main__":
    main()
