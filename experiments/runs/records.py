"""The run folder: its settings, its data, its results; locked while a process writes to it, and written whole."""

import contextlib
import errno
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinojax.documents import read_document, write_document
from dinojax.errors import UserError
from experiments.runs.lock import LOCK_FILE, RunLock
from experiments.runs.settings import defaults, flat, unimportant

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CONFIG_FILE, DATA_FILE, METRICS_FILE, RESULT_FILE = "config.json", "data.json", "metrics.json", "result.json"
TRACES_OF_TRAINING = ("checkpoints", "metrics.jsonl")  # what the run folder of a training holds from the start
_REMEDY = "repeat the run that wrote it"


def default_run_folder(command: str) -> Path:
    """A new folder `runs/<command>/<date-time>` in the working folder, numbered if that second has one already.

    Raises:
        UserError: the working folder cannot be written.
    """
    base = Path("runs") / command / time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); name another folder with --out") from error
        return path
    raise AssertionError("unreachable")


@contextmanager
def run_folder(path: Path) -> Iterator[Path]:
    """A temporary folder for the files of a run, which move to `path` at the end; an exception leaves `path` unchanged.

    Files of an earlier run in `path` are replaced by those of the same name. An empty `path` is removed if the run
    fails.

    Raises:
        UserError: `path` is a file, the folder of a training, a folder that no run made or another process writes to,
            or cannot be written.
    """
    path = path.expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; name a folder")
    if _holdings(path) and not (path / CONFIG_FILE).is_file():
        raise UserError(f"--out {path} holds other files; name a new folder")
    if any((path / trace).exists() for trace in TRACES_OF_TRAINING):
        raise UserError(f"--out {path} is the run folder of a training; name a new folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}); name another folder") from error
    try:
        with RunLock(path):
            yield partial
            for file in sorted(partial.iterdir()):
                file.replace(path / file.name)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f"--out {path} cannot be written ({error.strerror}); free some space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.rmdir()  # only where it is empty


@contextmanager
def open_run(
    folder: Path,
    config: Any,
    data: Mapping[str, Any],
    *,
    accept_changed_data: bool = False,
    other_settings: bool = False,
) -> Iterator[None]:
    """Locks the folder of a run that can be resumed, made here or holding a run of the same settings and data.

    Settings and data are kept in the folder. A folder with nothing else in it holds no run yet, and takes new ones.

    Args:
        folder: of the run.
        config: a dataclass of groups; see `experiments.runs.settings`.
        data: from `data_record`.
        accept_changed_data: resume on other images of the same classes, and note it in data.json.
        other_settings: resume under other settings, which replace the kept ones.

    Raises:
        UserError: it is a file, holds something else, is a run of other settings or data, or is in use.
    """
    if folder.is_file():
        raise UserError(f"--out {folder} is a file; name a folder")
    if _holdings(folder) and not (folder / CONFIG_FILE).is_file():
        raise UserError(f"--out {folder} holds other files; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}); name another folder") from error
    with RunLock(folder):
        begun = bool(_holdings(folder) - {CONFIG_FILE, DATA_FILE})
        if begun and not other_settings:
            _check_settings(folder, config)
        write_json(folder / DATA_FILE, _checked_data(folder, data, accept_changed_data) if begun else data)
        if other_settings or not begun:
            write_json(folder / CONFIG_FILE, flat(config))
        yield


def data_record(class_names: Sequence[str], splits: Mapping[str, Any]) -> dict[str, Any]:
    """What a run folder keeps of its data: class names, and number and identity of the images of each split."""
    return {
        "class_names": list(class_names),
        "splits": {name: {"images": len(split), "identity": split.identity} for name, split in splits.items()},
    }


def _holdings(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LOCK_FILE} if folder.is_dir() else set()


def _check_settings(folder: Path, config: Any) -> None:
    stored = with_new_names(read_document(folder / CONFIG_FILE, remedy=f"remove {folder} or name another --out"))
    # Earlier versions did without some settings: they did as their defaults say.
    stored = json.loads(json.dumps(defaults(type(config)), default=str)) | stored
    asked = json.loads(json.dumps(flat(config), default=str))
    may_differ = unimportant(type(config))
    for name in asked:
        if name not in may_differ and stored.get(name) != asked[name]:
            raise UserError(
                f"{folder} is a run with {name} = {stored.get(name)}, not {asked[name]}; give the same settings to "
                "resume it, or name another --out"
            )


def _checked_data(folder: Path, data: Mapping[str, Any], accept: bool) -> dict[str, Any]:
    """The record to keep: the data of this start, and what was accepted before."""
    path = folder / DATA_FILE
    if not path.is_file():
        print(f"note: {folder} was made by an earlier version, which did not record its images; they are now recorded")
        return dict(data)
    stored = read_json(path)
    if stored["class_names"] != data["class_names"]:
        raise UserError(
            f"{folder} is a run on other classes ({_few(stored['class_names'])}, not {_few(data['class_names'])}); "
            "name another --out"
        )
    changed = [
        name for name in stored["splits"] | data["splits"] if stored["splits"].get(name) != data["splits"].get(name)
    ]
    history = stored.get("accepted_changes", [])
    if not changed:
        return stored
    before, now = (record["splits"].get(changed[0], {}).get("images", 0) for record in (stored, data))
    if not accept:
        raise UserError(
            f"the {changed[0]} images are not those that {folder} was made with ({before:,} then, {now:,} now; names, "
            "sizes or contents differ); name another --out, or accept them with --accept-changed-data"
        )
    print(f"note: the {', '.join(changed)} images have changed since {folder} was made; accepted, and noted in {path}")
    change = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "before": stored["splits"]}
    return {**data, "accepted_changes": [*history, change]}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings, where the recipe or protocol "seed" of version 0.1 is "reported"."""
    renamed = {name for name in ("recipe", "protocol") if settings.get(name) == "seed"}
    return {**settings, **dict.fromkeys(renamed, "reported")}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes JSON with a hash of its contents; paths become text."""
    write_document(path, document)


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        UserError: the file is missing, damaged or was edited.
    """
    return read_document(path, remedy=_REMEDY)


def environment() -> dict[str, Any]:
    """Versions, device and commit: what a number depends on apart from the settings."""
    import jax

    packages = ("dinojax", "jax", "jaxlib", "flax", "optax", "numpy", "pillow")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "cpu_count": os.cpu_count(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the project's checkout, with "+changes" if files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    answers = [
        subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    ]
    return (answers[0] + ("+changes" if answers[1] else "")) or None
