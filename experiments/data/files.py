"""Image files of folders: which are found and in which order, what is said about the others, what stands for them.

One search serves every command: regular files only, at any depth, without hidden parts of the path, through links.
"""

import hashlib
import itertools
import os
import stat
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from dinojax.errors import UserError
from dinojax.images.decode import FORMATS, SUFFIXES, decode_rgb
from experiments.data.splits import Split, digest

# Files that usually lie beside images, of which nobody expects a picture.
_COMPANIONS = frozenset(
    {".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
)
_NOT_REGULAR = "(no regular file)"
_PIECE = 8192  # bytes
_THREADS, _CHUNK = 16, 256  # threads that open files: over a network most of the time is waiting


class Found(NamedTuple):
    """What a search found: image files sorted by path, the number of other files by suffix, and notes."""

    files: list[Path]
    left_out: Counter[str]
    notes: list[str]


class Stamp(NamedTuple):
    """What stands for a file: `content` is its name, its size and a hash of pieces; `times` adds the time of change."""

    content: str
    times: str


def find_images(folder: Path, suffixes: Collection[str] = SUFFIXES) -> Found:
    """The image files of a folder at any depth, or those of other suffixes, without hidden ones and `__MACOSX`.

    Links to folders are followed after everything else was read, each folder once, and never to one that holds
    `folder`. Links to nowhere are among the files: reading them names them.

    Raises:
        UserError: the folder itself cannot be read.
    """
    found, waiting = Found([], Counter(), []), deque([folder])
    above = {_inode(path) for place in (folder.absolute(), folder.resolve()) for path in place.parents}
    read: set[tuple[int, int] | Path] = set()

    def report(error: OSError) -> None:
        if error.filename == str(folder):
            raise UserError(f"{folder} cannot be read ({error.strerror}); change its permissions or remove it")
        found.notes.append(f"{error.filename} cannot be read ({error.strerror}): its images are left out")

    while waiting:
        for place, folders, names in os.walk(waiting.popleft(), onerror=report):
            inode = _inode(Path(place))
            if inode in above:
                found.notes.append(f"{place} is a link to a folder that holds it: it is left out")
            if inode in above or inode in read:
                folders.clear()
                continue
            read.add(inode)
            visible = {name for name in folders if not name.startswith(".") and name != "__MACOSX"}
            links = {name for name in visible if _is_link(Path(place, name))}
            folders[:] = sorted(visible - links)
            waiting.extend(Path(place, name) for name in sorted(links))
            _sort_out(place, names, found, suffixes)
    found.files.sort()
    return found


def _sort_out(place: str, names: Iterable[str], found: Found, suffixes: Collection[str]) -> None:
    """Adds the files of one folder to what was found."""
    for name in names:
        path = Path(place, name)
        suffix = path.suffix.lower()
        if name.startswith("."):
            continue
        if suffix not in suffixes:
            found.left_out[suffix] += 1
            if _is_link(path) and not path.exists():
                found.notes.append(f"{path} is a link to nowhere: it is left out")
        elif not _may_be_read(path):
            found.left_out[_NOT_REGULAR] += 1
        else:
            found.files.append(path)


def notes_about(root: Path, found: Mapping[Path, Found]) -> list[str]:
    """Notes about what searches left out; `found` is by folder, whose path inside `root` is shown."""
    notes, places = [note for one in found.values() for note in one.notes], {}
    for folder, one in found.items():
        for suffix in one.left_out:
            places.setdefault(suffix, []).append(folder)
    for suffix in sorted(places.keys() - _COMPANIONS):
        first, *more = places[suffix]
        where = readable_name(first.relative_to(root)) + (f" and {len(more):,} more" if more else "")
        count = sum(found[folder].left_out[suffix] for folder in places[suffix])
        notes.append(f"{where}: left out {_counted(suffix, count)}")
    return notes


def no_images(folder: Path, found: Found) -> str:
    """The beginning of a message about a folder without images."""
    others = [_counted(suffix, count) for suffix, count in found.left_out.items() if suffix not in _COMPANIONS]
    return f"{folder} holds no images ({', '.join(FORMATS)})" + (f"; left out {', '.join(others)}" if others else "")


def _counted(suffix: str, count: int) -> str:
    files, them = ("file", "it") if count == 1 else ("files", "them")
    if suffix == _NOT_REGULAR:
        return f"{count:,} {files} called like an image: a pipe, a device or a socket"
    if not suffix:
        return f"{count:,} {files} without a suffix"
    return f"{count:,} {suffix} {files}: Pillow does not read {them} here"


def readable_images(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Height and width of images, given as files or as folders that are searched at any depth.

    Files of a folder that are not readable images are left out, and named on stdout.

    Raises:
        UserError: a path that does not exist, a file that is not a readable image, or a folder without any.
    """
    sizes = {}
    for path in map(Path.expanduser, paths):
        if not path.exists():
            raise UserError(f"{path}: there is no such image or folder")
        found = find_images(path) if path.is_dir() else Found([path], Counter(), [])
        if not found.files:
            raise UserError(no_images(path, found))
        errors = []
        for file in found.files:
            try:
                sizes[file] = decode_rgb(file, str(file)).shape[:2]
            except UserError as error:
                errors.append(error)
        if len(errors) == len(found.files):
            raise errors[0]
        for text in (*notes_about(path.parent, {path: found}), *(f"left out: {error}" for error in errors)):
            print(text)
    return sizes


def own_names(files: Iterable[Path]) -> list[str]:
    """A name for the outputs of each file: its stem, with a number where another file has it, whatever its case."""
    names, taken = [], set()
    for file in files:
        stem = readable_name(file.stem)
        numbered = (stem if count == 1 else f"{stem}_{count}" for count in itertools.count(1))
        name = next(name for name in numbered if name.casefold() not in taken)
        taken.add(name.casefold())
        names.append(name)
    return names


def split_of_files(root: Path, name: str, files: Mapping[str, Sequence[Path]], classes: Sequence[str]) -> Split:
    """Images by class as a split: labels are indices of `classes`.

    Raises:
        UserError: a file that cannot be read.
    """
    paths = [path for found in files.values() for path in found]
    labels = np.repeat([classes.index(name) for name in files], [len(found) for found in files.values()])
    return split_of_paths(root, name, paths, labels)


def split_of_paths(root: Path, name: str, paths: Sequence[Path], labels: Int[np.ndarray, " images"]) -> Split:
    """Files as a split: ids are paths inside `root`.

    Raises:
        UserError: a file that cannot be read.
    """
    ids = [readable_name(path.relative_to(root)) for path in paths]
    stamps = stamp_files(ids, paths)
    fingerprint, identity = (digest(*texts) for texts in ([s.times for s in stamps], [s.content for s in stamps]))
    return Split(name, ids, labels, lambda i: decode_rgb(paths[i], str(paths[i])), fingerprint, identity, paths)


def stamp_files(names: Sequence[str], paths: Sequence[Path], *, unreadable: bool = False) -> list[Stamp]:
    """The stamp of each file: 5 to 8 s for 100,000 files that the system has in memory, on two busy cores.

    From a cold disk it takes as long as reading 24 KiB of each file; 16 threads share the waiting.

    Args:
        names: of the files, which become part of their stamps.
        paths: of the files.
        unreadable: whether to stamp a file that cannot be read by the reason, instead of raising it.

    Raises:
        UserError: a file that cannot be read, or is no regular file.
    """
    chunks = [range(start, min(start + _CHUNK, len(paths))) for start in range(0, len(paths), _CHUNK)]
    bar = tqdm(total=len(paths), desc="looking at the images", unit="file", dynamic_ncols=True, leave=False, delay=1)
    stamps, stamp = [], _stamp_or_reason if unreadable else _stamp
    with ThreadPoolExecutor(_THREADS, "stamp") as pool, bar:
        for some in pool.map(lambda rows: [stamp(names[i], paths[i]) for i in rows], chunks):
            stamps += some
            bar.update(len(some))
    return stamps


def _stamp(name: str, path: Path) -> Stamp:
    """Pieces of a file: all of it up to three pieces, else the first, the middle and the last one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is not a regular file; remove it")
            size = status.st_size
            places = range(0, size, _PIECE) if size <= 3 * _PIECE else (0, (size - _PIECE) // 2, size - _PIECE)
            pieces = b"".join(os.pread(descriptor, _PIECE, place) for place in places)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); replace or remove it") from error
    content = f"{name}\0{size}\0{hashlib.sha256(pieces).hexdigest()}\n"
    return Stamp(content, f"{content}{status.st_mtime_ns}\n")


def _stamp_or_reason(name: str, path: Path) -> Stamp:
    try:
        return _stamp(name, path)
    except UserError as error:
        return Stamp(f"{name}\0{error}\n", f"{name}\0{error}\n")


def readable_name(path: Path | str) -> str:
    """The path as text for tables, figures and files: bytes that are not UTF-8 are shown as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _may_be_read(path: Path) -> bool:
    """Whether it is a regular file, or one that cannot be looked at: reading that one names it."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:  # such as a name that is too long, which reading the folder reports
        return False


def _inode(folder: Path) -> tuple[int, int] | Path:
    """Device and number, which tell whether two paths are one folder; the path of one that cannot be looked at."""
    try:
        status = folder.stat()
    except OSError:
        return folder
    return status.st_dev, status.st_ino
