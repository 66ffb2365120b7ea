"""Published files from the cache, from the official address, or from a mirror of it."""

import os
from pathlib import Path

from converters.cache import cache_folder
from converters.download import download
from converters.sources import HOST, Source
from dinojax.errors import UserError


def fetch_source(title: str, source: Source, cache_dir: str | Path | None, *, flags: str, otherwise: str = "") -> Path:
    """The file of `source` in the cache; it is downloaded unless it is there.

    Args:
        title: what the file holds, for the message.
        source: where it is.
        cache_dir: as for `load_pretrained`.
        flags: how to pass a file that was downloaded elsewhere, for the message.
        otherwise: what else there is to do, which ends the message.

    Raises:
        UserError: the download failed.
    """
    file = cache_folder(cache_dir) / "downloads" / source.filename
    if file.is_file():
        return file
    mirror = (os.environ.get("DINOJAX_WEIGHTS_URL") or HOST).rstrip("/")
    try:
        return download(f"{mirror}/{source.path}", file, size=source.size, sha256=source.sha256)
    except UserError as error:
        raise UserError(
            f"{title} is not in {cache_folder(cache_dir)} and its download failed: {error}. Other ways: get "
            f"{source.url} on another machine and pass the file ({flags}), or set DINOJAX_WEIGHTS_URL to a mirror"
            f"{otherwise}"
        ) from error
