"""Downloads of one file over HTTP: resumable, verified, and in place only when complete."""

import errno
import http.client
import shutil
import urllib.error
import urllib.request
from http.client import HTTPResponse
from pathlib import Path

from dinojax.documents import sha256_of_file
from dinojax.errors import UserError

SILENCE_SECONDS = 15.0  # how long a server may say nothing
_CHUNK = 1 << 20


def download(url: str, target: Path, *, size: int | None = None, sha256: str | None = None) -> Path:
    """Downloads `url` to `target` with a progress bar, and resumes what an earlier call left in `target.part`.

    Args:
        url: an http or https address.
        target: the file to write; its folder is created.
        size: expected size in bytes; None compares only with the size that the server announces.
        sha256: expected digest in hexadecimal; None skips the comparison.

    Returns:
        `target`.

    Raises:
        UserError: the file cannot be reached or found, a web page came instead of it, the connection broke (what
            arrived is kept), size or digest are not the expected ones (what arrived is removed), or the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    with _request(url, partial) as response:
        offset = partial.stat().st_size if response.status == 206 else 0
        total = _announced_total(response, offset)
        if size is not None and total not in (None, size):
            raise UserError(f"{url} is announced with {total} bytes, but {size} are published: not the official file")
        _remember_version(partial, response)
        raise_unless_room(target.parent, (total or size or 0) - offset)
        _receive(response, partial, offset, total or size, url)
    _verify(partial, url, total or size, sha256)
    partial.replace(target)
    _version_file(partial).unlink(missing_ok=True)
    return target


def _request(url: str, partial: Path) -> HTTPResponse:
    """The open response: status 206 resumes where `partial` ends, 200 starts again."""
    version = _version_file(partial)
    headers, offset = {"User-Agent": "dinojax"}, 0
    if partial.is_file() and version.is_file():
        # Without If-Range, a file that has changed on the server would be appended to the old beginning.
        offset = partial.stat().st_size
        headers |= {"Range": f"bytes={offset}-", "If-Range": version.read_text()}
    try:
        request = urllib.request.Request(url, headers=headers)
        if not request.type.startswith("http"):
            raise ValueError("only http and https are supported")
        response = urllib.request.urlopen(request, timeout=SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:  # nothing is left to send, or the file has become shorter
            partial.unlink()
            return _request(url, partial)
        raise UserError(f"{url} is answered with {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{url} cannot be reached ({getattr(error, 'reason', error)})") from error
    problem = None
    if response.headers.get_content_type() == "text/html":
        problem = "with a web page, not a file; is there a login or proxy page in between?"
    elif response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        problem = "with another part of the file than was asked for"
    if problem:
        response.close()
        raise UserError(f"{url} is answered {problem}")
    return response


def reachable(url: str, seconds: float = 4.0) -> bool:
    """Whether a server answers for `url` in time; a refusal counts as an answer."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError as refusal:
        refusal.close()
    except (OSError, http.client.HTTPException):
        return False
    return True


def _announced_total(response: HTTPResponse, offset: int) -> int | None:
    length = response.headers.get("Content-Length")
    return None if length is None else offset + int(length)


def _version_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".version")


def _remember_version(partial: Path, response: HTTPResponse) -> None:
    """Keeps the server's strong name of this version of the file; without one, a later call cannot resume."""
    etag = response.headers.get("ETag", "")
    version = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    if version:
        _version_file(partial).write_text(version)
    else:
        _version_file(partial).unlink(missing_ok=True)


def raise_unless_room(folder: Path, needed: int) -> None:
    """Refuses to write `needed` bytes to `folder`, which need not exist yet, if its disk is too full."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} has {free / 1e6:.0f} MB left, but {needed / 1e6:.0f} MB are needed; make room")


def _receive(response: HTTPResponse, partial: Path, offset: int, total: int | None, url: str) -> None:
    from tqdm import tqdm

    problem = "the connection was closed"
    name = partial.name.removesuffix(".part")
    with (
        partial.open("ab" if offset else "wb") as file,
        tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=name) as bar,
    ):
        try:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise UserError(f"the disk of {partial.parent} is full; what arrived of {name} is kept") from error
            problem = str(error) or type(error).__name__
        arrived = file.tell()
    if total is not None and arrived < total:
        raise UserError(
            f"the download of {url} stopped after {arrived} of {total} bytes ({problem}); "
            "run the same command again to resume"
        )


def _verify(partial: Path, url: str, size: int | None, sha256: str | None) -> None:
    """Compares what arrived with what was expected, and removes it if it differs."""
    problem = None
    if size is not None and partial.stat().st_size != size:
        problem = f"{partial.stat().st_size} bytes arrived, but {size} were expected"
    elif sha256 is not None and (digest := sha256_of_file(partial)) != sha256:
        problem = f"its SHA-256 is {digest[:12]}…, but {sha256[:12]}… is on record"
    if problem:
        partial.unlink()
        _version_file(partial).unlink(missing_ok=True)
        raise UserError(f"{url} arrived damaged or is another file ({problem}); it was removed, run the command again")
