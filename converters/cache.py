"""The folder of what is kept from one command to the next: downloads, converted models, features."""

import os
from pathlib import Path

from dinojax.errors import UserError

_DEFAULT = "~/.cache/dinojax"


def cache_folder(given: str | Path | None = None) -> Path:
    """`given`, or else `$DINOJAX_CACHE`, or else `~/.cache/dinojax`.

    Raises:
        UserError: the folder is inside the user's home, and there is none.
    """
    chosen = Path(given or os.environ.get("DINOJAX_CACHE") or _DEFAULT)
    try:
        return chosen.expanduser()
    except RuntimeError as error:
        raise UserError(
            f"there is no home folder for {chosen}; name another folder with --cache-dir or $DINOJAX_CACHE"
        ) from error
