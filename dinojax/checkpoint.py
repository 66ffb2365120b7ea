"""The checkpoints of a training: one folder of Orbax checkpoints, `step_300` and so on.

Each holds the whole state as the arrays `state` (OCDBT, every leaf under its dotted path), and a JSON `manifest` with
the SHA-256 of every leaf. Finished models are kept by `dinojax.models.files`.

Orbax writes, TensorStore reads, and what is kept is decided here. Orbax 0.12's `CheckpointManager` was tried instead.
Its preservation policies count a damaged checkpoint among the newest, so that sound ones are removed for it; its errors
do not say which array is damaged; and its cleaning removes folders that are not ours. The version of Orbax is bounded
in pyproject.toml because the layout of its files is read here.
"""

import concurrent.futures
import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from dinojax.documents import sha256_of_array, sha256_of_json
from dinojax.errors import UserError, require

_STEP = "step_"
_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's own suffix: it renames a folder when all is in it
# Before the freeze of the last layer was `optax.conditionally_mask`, these leaves of its state had other names.
_FROZEN = "opt_state.inner_states.last_layer.inner_state."
_RENAMED = ((f"{_FROZEN}count", f"{_FROZEN}step"), (f"{_FROZEN}inner.", f"{_FROZEN}inner_state."))


class Restored(NamedTuple):
    """A checkpoint that was read, and one sentence for every damaged checkpoint that was skipped."""

    step: int
    state: PyTree
    record: dict[str, Any]
    skipped: list[str]


class TrainingCheckpoints(contextlib.AbstractContextManager):
    """The checkpoints of one training: written in the background, whole or not at all, and verified when read.

    Use it as a context manager, which waits for the last write. One process may write, any number may read.

    Args:
        folder: used for nothing else; the first `save` creates it.
        keep_newest: number of newest checkpoints to keep.
        keep_best: number of checkpoints with the highest score to keep as well.

    Raises:
        UserError: `keep_newest` is below 1, or `keep_best` below 0.
    """

    def __init__(self, folder: str | Path, *, keep_newest: int = 3, keep_best: int = 1):
        require(keep_newest >= 1, "keep_newest", keep_newest, "1 or more")
        require(keep_best >= 0, "keep_best", keep_best, "0 or more")
        self._folder = Path(folder).absolute()
        self._keep_newest, self._keep_best = keep_newest, keep_best
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._current: int | None = None  # the step that was saved or restored last
        self._damaged: set[int] = set()  # passed over by `restore`; the next save removes them

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps on disk in ascending order, including damaged ones."""
        names = [path.name.removeprefix(_STEP) for path in self._folder.glob(f"{_STEP}*")]
        return sorted(step for step in {int(name) for name in names if name.isdecimal()} if self._path(step).is_dir())

    def save(self, step: int, state: PyTree, *, record: Mapping[str, object], score: float | None = None) -> None:
        """Copies the state to the host, and writes it in the background.

        The state may be donated or changed as soon as this returns. Nothing is written if `step` is the one that was
        saved or restored last, so it is always safe to save before leaving.

        Args:
            step: larger than every step saved before.
            state: any pytree of non-empty arrays; typed keys are allowed.
            record: JSON values to store with the state, such as the settings and the position in the data.
            score: higher is better; None or a number that is not finite means no score.

        Raises:
            TypeError: a leaf that is not an array, or is empty.
            UserError: the disk is full, a write failed (this one or the one before), or the folder belongs to another
                run.
        """
        self.wait()
        if step == self._current:
            return
        sound = [other for other in self.steps if other not in self._damaged]
        if sound and step <= sound[-1]:
            raise UserError(
                f"{self._folder} holds checkpoints up to step {sound[-1]}, and now step {step} is to be saved there; "
                "resume from them or name another folder"
            )
        leaves = _named_leaves(state)
        manifest = {
            "step": step,
            "score": float(score) if score is not None and math.isfinite(score) else None,
            "record": json.loads(json.dumps(dict(record))),
            "leaves": {name: _description(leaf) for name, leaf in leaves.items()},
        }
        arrays = _on_host(leaves)
        self._make_room(sum(array.nbytes for array in arrays.values()))
        self._current = step
        self._pending = self._thread.submit(self._write, step, arrays, manifest)

    def wait(self) -> None:
        """Waits until the last `save` is on disk.

        Raises:
            UserError: the checkpoint could not be written.
        """
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending])  # Ctrl-C here leaves it pending
        pending, self._pending = self._pending, None
        pending.result()

    def close(self) -> None:
        """Waits as `wait` does, and ends the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(self, like: PyTree, *, step: int | None = None) -> Restored | None:
        """The newest undamaged checkpoint, or None if the folder holds no checkpoint.

        Every array is compared with its hash; damaged checkpoints are skipped.

        Args:
            like: a real or abstract state with the expected structure, shapes and dtypes, and optionally shardings.
            step: of the checkpoint to restore instead of the newest one; the next `save` removes later ones.

        Raises:
            UserError: the checkpoint is of another architecture or optimiser, every checkpoint is damaged, or there is
                none of `step`.
        """
        self.wait()
        self._raise_unless_there(step)
        restored = self._first_sound(reversed(self.steps) if step is None else [step], self._state_like(like))
        if restored is not None:
            self._current = restored.step
            self._damaged = {step for step in self.steps if step > restored.step}
        return restored

    def restore_best(self, like: PyTree) -> Restored | None:
        """The undamaged checkpoint with the highest score, or the newest of several; otherwise like `restore`.

        If every checkpoint with a score is damaged, the newest undamaged one takes their place.
        """
        self.wait()
        scores = self._scores()
        best = sorted(scores, key=lambda step: (scores[step], step), reverse=True)
        others = [step for step in reversed(self.steps) if step not in scores] if best else []
        return self._first_sound([*best, *others], self._state_like(like))

    def read(self, prefixes: tuple[str, ...], *, step: int | None = None) -> Restored | None:
        """Some arrays of the newest checkpoint in which they are undamaged, or None if the folder holds no checkpoint.

        It needs no state, writes nothing, and may be called while a training saves to the folder.

        Args:
            prefixes: of dotted paths; those of all other arrays are not read.
            step: of the checkpoint to read instead of the newest one.

        Returns:
            A dictionary from dotted path to array as the state.

        Raises:
            UserError: every checkpoint is damaged, or there is no sound one of `step`.
        """

        def named(manifest: dict[str, Any]) -> dict[str, np.ndarray]:
            return self._verified_arrays(manifest, [name for name in manifest["leaves"] if name.startswith(prefixes)])

        self._raise_unless_there(step)
        steps = self.steps
        try:
            found = self._first_sound(reversed(steps) if step is None else [step], named)
        except UserError:
            if self.steps == steps:
                raise
        else:
            if found is None or not found.skipped or self.steps == steps:
                return found
        return self.read(prefixes, step=step)  # the training has removed checkpoints meanwhile

    def _first_sound(self, steps: Iterable[int], state_of: Callable[[dict[str, Any]], PyTree]) -> Restored | None:
        """The first checkpoint from whose manifest `state_of` reads a state."""
        skipped: list[str] = []
        for step in steps:
            try:
                manifest = self._manifest(step)
                return Restored(step, state_of(manifest), manifest["record"], skipped)
            except _DamagedError as error:
                skipped.append(f"the checkpoint of step {step} is damaged: {error}")
        if skipped:
            raise UserError(
                f"{self._folder} holds no sound checkpoint ({'; '.join(skipped)}); "
                "remove the folder to start again or name another"
            )
        return None

    def _state_like(self, like: PyTree) -> Callable[[dict[str, Any]], PyTree]:
        """Reads the state of a manifest, which must have the structure, shapes and dtypes of `like`."""

        def state_of(manifest: dict[str, Any]) -> PyTree:
            self._raise_unless_fitting(manifest, like)
            arrays, leaves = self._verified_arrays(manifest, list(manifest["leaves"])), manifest["leaves"]
            placed = [_placed(arrays[name], leaves[name], leaf) for name, leaf in _named_leaves(like).items()]
            return jax.tree.unflatten(jax.tree.structure(like), placed)

        return state_of

    def _raise_unless_there(self, step: int | None) -> None:
        if step is not None and step not in self.steps:
            known = ", ".join(map(str, self.steps)) or "none"
            raise UserError(f"{self._folder} holds no checkpoint of step {step}; its steps are: {known}")

    def _path(self, step: int) -> Path:
        return self._folder / f"{_STEP}{step}"

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            manifest = json.loads((self._path(step) / "manifest" / "metadata").read_text())
            written = manifest.pop("sha256") == sha256_of_json(manifest) and manifest["step"] == step
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise _DamagedError(f"its manifest cannot be read ({type(error).__name__})") from error
        if not written:
            raise _DamagedError("its manifest is not the one that was written")
        leaves = manifest["leaves"].items()
        manifest["leaves"] = {_current_name(name): {**leaf, "stored": name} for name, leaf in leaves}
        return manifest

    def _raise_unless_fitting(self, manifest: dict[str, Any], like: PyTree) -> None:
        stored = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in manifest["leaves"].items()}
        wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named_leaves(like).items()}
        differing = [
            f"{name} is {stored.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
            for name in stored | wanted
            if stored.get(name) != wanted.get(name)
        ]
        if differing:
            raise UserError(
                f"the checkpoint of step {manifest['step']} in {self._folder} is another model's or optimiser's: "
                f"{'; '.join(differing[:3])}{f'; and {len(differing) - 3} more' if len(differing) > 3 else ''}; "
                "give the settings it was made with or name another folder"
            )

    def _verified_arrays(self, manifest: dict[str, Any], names: list[str]) -> dict[str, np.ndarray]:
        """Reads with TensorStore, as Orbax does: Orbax itself leaves tracebacks on stderr when a file is damaged."""
        import tensorstore

        context = tensorstore.Context()
        base = {"driver": "file", "path": f"{self._path(manifest['step'])}/state/"}

        def verified(name: str) -> np.ndarray:
            stored = manifest["leaves"][name]["stored"]
            spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{stored}/"}}
            try:
                array = tensorstore.open(spec, context=context, open=True, read=True).result().read().result()
            except Exception as error:
                raise _DamagedError(f"{name} cannot be read ({str(error).partition(':')[0]})") from error
            if sha256_of_array(array) != manifest["leaves"][name]["sha256"]:
                raise _DamagedError(f"{name} is not what was written (its SHA-256 differs)")
            return array

        with concurrent.futures.ThreadPoolExecutor() as pool:
            return dict(zip(names, pool.map(verified, names)))

    def _scores(self) -> dict[int, float]:
        """Step → score, where it has one; ∞ for a damaged manifest, so that `restore_best` reads and reports it."""
        scores = {}
        for step in self.steps:
            try:
                scores[step] = self._manifest(step)["score"]
            except _DamagedError:
                scores[step] = math.inf
        return {step: score for step, score in scores.items() if score is not None}

    def _make_room(self, size: int) -> None:
        """Creates the folder, removes what a killed process left there, and refuses a disk that is too full."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise UserError(f"{self._folder} cannot be written to ({error}); name another folder") from error
        needed = size + 2**20  # a megabyte for the manifest and the index
        if free < needed:
            raise UserError(
                f"a checkpoint needs {needed / 1e6:.0f} MB, and {self._folder} has {free / 1e6:.0f} MB left; "
                "make room, and the same command resumes from the last checkpoint"
            )

    def _write(self, step: int, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
        """Writes one atomic Orbax checkpoint; the hashes are of the arrays in memory, not of what reached the disk."""
        import orbax.checkpoint as ocp

        for name, array in arrays.items():
            manifest["leaves"][name]["sha256"] = sha256_of_array(array)
        manifest["sha256"] = sha256_of_json(manifest)
        # Compression takes seconds to save 8 % of trained weights; the format is the one `_verified_arrays` reads.
        state_handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
        handler = ocp.CompositeCheckpointHandler(state=state_handler, manifest=ocp.JsonCheckpointHandler())
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(manifest))
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(self._path(step), args=items, force=True)
            self._damaged.discard(step)
            self._remove_superseded()
        except Exception as error:
            self._current = None
            self._remove_unfinished()
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self._folder} "
                f"({str(error).rpartition(': ')[2]}); "
                "make room or name another folder; the earlier checkpoints are untouched"
            ) from error

    def _remove_superseded(self) -> None:
        steps, scores = self.steps, self._scores()
        sound = [step for step in steps if step not in self._damaged]
        scored = [step for step in sound if scores.get(step, math.inf) < math.inf]
        best = sorted(scored, key=lambda step: (scores[step], step), reverse=True)[: self._keep_best]
        for step in set(steps) - {*sound[-self._keep_newest :], *best}:
            # Renamed first, so that a folder that is half removed is not taken for a checkpoint.
            shutil.rmtree(self._path(step).rename(self._folder / f"{_STEP}{step}.removed{_UNFINISHED}"))
        self._damaged.clear()

    def _remove_unfinished(self) -> None:
        for path in self._folder.glob(f"{_STEP}*{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)


class _DamagedError(Exception):
    """Says what is wrong with a checkpoint; the message ends a sentence."""


def _current_name(name: str) -> str:
    return next((new + name.removeprefix(old) for old, new in _RENAMED if name.startswith(old)), name)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Dotted path → leaf, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two leaves of the state have the same dotted path")
    for name, leaf in named.items():
        if not (hasattr(leaf, "dtype") and math.prod(leaf.shape)):
            raise TypeError(f"{name} of the state is {leaf!r}; only arrays can be kept, and no empty ones")
    return named


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _description(leaf: jax.Array | np.ndarray) -> dict[str, Any]:
    description = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    return description | ({"key": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {})


def _on_host(leaves: Mapping[str, jax.Array | np.ndarray]) -> dict[str, np.ndarray]:
    """Copies that nothing changes later. On a CPU JAX may give a view, but then it no longer donates the buffer."""
    data = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()}
    host = jax.device_get(data)
    return {name: host[name] if isinstance(leaf, jax.Array) else np.array(leaf) for name, leaf in data.items()}


def _placed(array: np.ndarray, description: Mapping[str, Any], like: Any) -> jax.Array:
    """The leaf on the devices of `like`, or on the default device if `like` is not bound to any."""
    leaf = (
        jax.random.wrap_key_data(jax.numpy.asarray(array), impl=description["key"]) if "key" in description else array
    )
    bound = getattr(like, "committed", True)
    placed = jax.device_put(leaf, getattr(like, "sharding", None) if bound else None)
    if placed.dtype != like.dtype:
        raise UserError(f"the checkpoint is in {like.dtype}, which JAX makes {placed.dtype}; set JAX_ENABLE_X64=1")
    return placed
