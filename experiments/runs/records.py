"""The run folder: its settings, its results and what they were computed on; written whole or not at all."""

import errno
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinojax.errors import UserError
from experiments.runs.settings import flat, unimportant

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CONFIG_FILE, METRICS_FILE, RESULT_FILE = "config.json", "metrics.json", "result.json"
TRACES_OF_TRAINING = ("checkpoints", "metrics.jsonl")  # what the run folder of a training holds from the start


def default_run_folder(command: str) -> Path:
    """`runs/<command>/<date-time>` in the working folder."""
    return Path("runs") / command / time.strftime("%Y%m%d-%H%M%S")


@contextmanager
def run_folder(path: Path) -> Iterator[Path]:
    """A temporary folder for the files of a run, which move to `path` at the end; an exception leaves `path` unchanged.

    Files of an earlier run in `path` are replaced by those of the same name.

    Raises:
        UserError: `path` is a file, the folder of a training, a folder that no run made, or cannot be written.
    """
    path = path.expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG_FILE).is_file():
        raise UserError(f"--out {path} holds other files; name a new folder")
    if any((path / trace).exists() for trace in TRACES_OF_TRAINING):
        raise UserError(f"--out {path} is the run folder of a training; name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}); name another folder") from error
    try:
        yield partial
        path.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir()):
            file.replace(path / file.name)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f"--out {path} cannot be written ({error.strerror}); free some space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_run(folder: Path, config: Any) -> None:
    """Makes the folder of a run that can be resumed, or checks that the run in it has the same settings.

    Args:
        folder: of the run.
        config: a dataclass of groups, which is kept in the folder; see `experiments.runs.settings`.

    Raises:
        UserError: it is a file, holds something else, or is a run with other settings.
    """
    path = folder / CONFIG_FILE
    if folder.is_file():
        raise UserError(f"--out {folder} is a file; name a folder")
    if path.is_file():
        try:
            stored = with_new_names(json.loads(path.read_text()))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); remove {folder} or name another --out") from error
        asked = json.loads(json.dumps(flat(config), default=str))
        may_differ = unimportant(type(config))
        for name in asked:
            if name not in may_differ and stored.get(name) != asked[name]:
                raise UserError(
                    f"{folder} is a run with {name} = {stored.get(name)}, not {asked[name]}; give the same settings to "
                    "resume it, or name another --out"
                )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out {folder} holds other files; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, flat(config))
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}); name another folder") from error


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings, where the recipe or protocol "seed" of version 0.1 is "reported"."""
    renamed = {name for name in ("recipe", "protocol") if settings.get(name) == "seed"}
    return {**settings, **dict.fromkeys(renamed, "reported")}


def write_json(path: Path, document: Any) -> None:
    """Writes JSON; paths become text."""
    write_whole(path, (json.dumps(document, indent=2, default=str) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); repeat the run that wrote it") from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under another name, then renames it, so that `path` is never half written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
