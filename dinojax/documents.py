"""Files that are written whole, and JSON documents that vouch for themselves and for the files beside them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dinojax.errors import UserError

HASH = "document_sha256"
FILES = "files_sha256"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` at the end of the block: `path` never holds half of it.

    It has another name, is flushed to the disk, and is then renamed; an exception removes it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        flush_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; see `whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def flush_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk; a rename survives a power cut only then."""
    with contextlib.suppress(OSError):  # some file systems do not flush folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_document(path: Path, document: Mapping[str, Any], *, files: Iterable[str] = ()) -> None:
    """Writes JSON with a hash of its own contents; paths become text.

    Args:
        path: of the document.
        document: JSON values and paths.
        files: names of files in the same folder that the document relies on; their hashes become part of it.
    """
    whole = json.loads(json.dumps(dict(document), default=str))
    if names := sorted(files):
        whole[FILES] = {name: sha256_of_file(path.parent / name) for name in names}
    whole[HASH] = sha256_of_json(whole)
    write_whole(path, (json.dumps(whole, indent=2) + "\n").encode())


def read_document(path: Path, *, files: Iterable[str] | None = None, remedy: str) -> dict[str, Any]:
    """Reads a document, and checks its hash and those of the files it relies on. The hashes are left out.

    Documents of releases before 0.2 have no hash and are taken as they are.

    Args:
        path: of the document.
        files: names of the files that are about to be read; None checks all that the document relies on.
        remedy: what the user can do, such as "repeat the run that wrote it"; ends the message.

    Raises:
        UserError: the document or one of the files is missing, damaged or not the one that was written.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged ({_reason(error)}); {remedy}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is damaged (a JSON object was expected); {remedy}")
    stated = document.pop(HASH, None)
    if stated is None and FILES not in document:
        return document
    if stated != sha256_of_json(document):
        raise UserError(f"{path} is damaged or was edited (its SHA-256 is not the stored one); {remedy}")
    hashes = document.pop(FILES, {})
    for name in hashes if files is None else files:
        _check_file(path.parent / name, hashes.get(name), remedy)
    return document


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_array(array: np.ndarray) -> str:
    """The SHA-256 of an array's dtype, shape and values."""
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def sha256_of_json(document: Mapping[str, Any]) -> str:
    """The SHA-256 of a document's values, whatever their order and spacing in the file."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _check_file(path: Path, stated: str | None, remedy: str) -> None:
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise UserError(f"{path} is missing or cannot be read ({_reason(error)}); {remedy}") from error
    if found != stated:
        raise UserError(f"{path} is damaged (its SHA-256 is not the stored one); {remedy}")


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
