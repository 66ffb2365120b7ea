"""Damage to every kind of file that the project reads, kills, and double starts: `python -m tests.support.faults`.

A case is a copy of sound files in which bits of one are flipped, bytes are replaced, or the end is cut off, by a seed.
Files of our own must give what was written, or a `UserError` of one line. Files from elsewhere (images, weights) must
give something, or a `UserError` of one line. Anything else is a failure: another value, another exception, more than
`SECONDS` or more than `MEMORY`. The kinds share the cases equally.
"""

import argparse
import collections
import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

import dinojax
from converters.pretrained import read_model
from dinojax import UserError, VisionTransformer, ViTConfig
from dinojax.checkpoint import TrainingCheckpoints
from dinojax.images.decode import decode_rgb
from experiments.features.cache import ShardCache
from experiments.probing.classifiers import Classifier, load_classifiers, read_index, save_classifiers
from experiments.runs.log import RunLog, read_log
from experiments.runs.records import read_json, write_json
from tests.support.checkpoint_states import LIKE, save_steps
from tests.support.tiny_weights import TINY_V1, official_state, torch_bytes

SECONDS, MEMORY = 30, 6 * 2**30
_SOUND = {"same", "refused", "read"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file: `make` fills a folder, `read` gives a comparable value; `ours` says that only it is right."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    ours: bool = True


def _bits(tree: Any) -> Any:
    return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), tree)


def _make_model(folder: Path) -> None:
    config = ViTConfig(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1)
    dinojax.save(VisionTransformer(config, rngs=nnx.Rngs(0)), folder / "model")


def _read_model(folder: Path) -> Any:
    model = dinojax.load(folder / "model")
    return model.config, _bits(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def _make_classifiers(folder: Path) -> None:
    arrays = {"weights": np.arange(12, dtype=np.float32).reshape(4, 3), "bias": np.ones(3, np.float32)}
    settings = {"kind": "linear", "classes": 3}
    save_classifiers(folder, [Classifier("linear", arrays, settings)], {"class_names": ["a", "b", "c"]})


def _read_classifiers(folder: Path) -> Any:
    found = load_classifiers(folder)
    return read_index(folder), [(one.name, _bits(dict(one.arrays)), one.settings, one.part) for one in found]


def _make_log(folder: Path) -> None:
    with RunLog(folder, 0, tensorboard=False) as log:
        for step in range(20):
            log.write({"step": step, "loss": 1 / (step + 1)})


def _read_log(folder: Path) -> Any:
    """Sound lines are the right value: they must be among those that were written, in order."""
    written = [{"step": step, "loss": 1 / (step + 1)} for step in range(20)]
    found = [{name: record.get(name) for name in ("step", "loss")} for record in read_log(folder)]
    places = [written.index(record) for record in found]
    return places == sorted(places)


def _make_shard(folder: Path) -> None:
    ShardCache(folder, {"model": "tiny"}).write(0, np.arange(60, dtype=np.float32).reshape(5, 12))


def _read_shard(folder: Path) -> Any:
    found = ShardCache(folder, {"model": "tiny"}).read(0, (5, 12))
    if found is None:
        raise UserError("it is computed again")
    return found.tobytes()


def _read_checkpoint(folder: Path) -> Any:
    with TrainingCheckpoints(folder) as checkpoints:
        return _bits(checkpoints.restore(LIKE).state)


def _picture(kind: str) -> Kind:
    def make(folder: Path) -> None:
        rng = np.random.default_rng(0)
        exif = Image.Exif()
        exif[0x0112] = 6
        image = Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8))
        image.save(folder / "image", kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))

    return Kind(make, lambda folder: decode_rgb(folder / "image", "image"), ours=False)


def _make_pth(folder: Path) -> None:
    (folder / "weights.pth").write_bytes(torch_bytes(official_state(TINY_V1)))


def _make_safetensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(official_state(TINY_V1), folder / "weights.safetensors")


KINDS = {
    "model folder": Kind(_make_model, _read_model),
    "fitted classifiers": Kind(_make_classifiers, _read_classifiers),
    "result": Kind(
        lambda folder: write_json(folder / "result.json", {"accuracy": 0.1, "names": ["a", "b"]}),
        lambda folder: {k: v for k, v in read_json(folder / "result.json").items() if k in ("accuracy", "names")},
    ),
    "log": Kind(_make_log, _read_log),
    "cached features": Kind(_make_shard, _read_shard),
    "training checkpoint": Kind(lambda folder: save_steps(folder, 1), _read_checkpoint),
    **{f"{kind} image": _picture(kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM")},
    ".pth weights": Kind(_make_pth, lambda folder: read_model(folder / "weights.pth"), ours=False),
    ".safetensors weights": Kind(
        _make_safetensors, lambda folder: read_model(folder / "weights.safetensors"), ours=False
    ),
}


def damage_files(name: str, cases: int, seed: int = 0) -> collections.Counter[str]:
    """Outcomes of `cases` cases of a kind: "same", "read" and "refused" are sound, others say what went wrong."""
    kind, rng = KINDS[name], random.Random(f"{name} {seed}")
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        sound, copy = Path(place, "sound"), Path(place, "copy")
        sound.mkdir()
        kind.make(sound)
        expected = kind.read(sound)
        files = sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file())
        for _ in range(cases):
            shutil.copytree(sound, copy)
            _damage(copy / rng.choice(files), rng)
            outcomes[_outcome(kind, copy, expected)] += 1
            shutil.rmtree(copy)
    return outcomes


def _damage(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    way = rng.choice(["bit", "bit", "bytes", "cut", "grow"]) if content else "grow"
    if way == "bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif way == "bytes":
        for _ in range(rng.randint(1, 16)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif way == "cut":
        del content[rng.randrange(len(content)) :]
    else:
        content += rng.randbytes(rng.randint(1, 64))
    path.write_bytes(content)


def _outcome(kind: Kind, folder: Path, expected: Any) -> str:
    try:
        with _limited(SECONDS):
            found = kind.read(folder)
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except TimeoutError:
        return f"more than {SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    if not kind.ours:
        return "read"
    return "same" if found == expected else "SILENTLY ANOTHER VALUE"


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def kill_trainings(times: int, seed: int = 0, method: str = "dino") -> collections.Counter[str]:
    """A small training killed at random moments, and started twice at once, beside one that was left alone.

    What must be the same: every number of the log, among them the share of masked patches of each step, and every array
    of the last checkpoint, among them both centers of DINOv2, and the networks.
    """
    rng, outcomes = random.Random(seed), collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        _start(Path(place, "whole"), method).wait()
        expected = _hashes(Path(place, "whole"))
        for number in range(times):
            folder = Path(place, str(number))
            killed = _start(folder, method)
            while not (folder / "metrics.jsonl").exists() and killed.poll() is None:
                time.sleep(0.01)
            killed.send_signal(signal.SIGSTOP)  # or it may have ended before the second has started
            second = _start(folder, method)
            said = second.communicate()[0]
            refused = second.returncode == 2 and "is in use by process" in said
            outcomes["second starts refused" if refused else f"SECOND START: {said[-200:]}"] += 1
            killed.send_signal(signal.SIGCONT)
            time.sleep(rng.uniform(0, 2))
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            ended = _start(folder, method)
            ended.communicate()
            same = ended.returncode == 0 and _hashes(folder) == expected
            outcomes["resumed to the same bits" if same else "RESUMED TO OTHER BITS"] += 1
    return outcomes


def _start(folder: Path, method: str) -> subprocess.Popen:
    flags = {
        "data": "digits", "max-train": 320, "max-test": 100, "batch-size": 64, "epochs": 8, "patch-size": 4,
        "embed-dim": 16, "depth": 1, "num-heads": 2, "prototypes": 16, "head-hidden-dim": 16, "bottleneck-dim": 8,
        "warmup-epochs": 1, "knn-every": 4, "log-every": 2, "checkpoint-minutes": 1e-6, "crops.global-size": 12,
        "crops.local-size": 8, "crops.local-crops": 1, "out": folder, "cache-dir": folder.parent / "cache",
        "method": method, "centering": "centering", "patch-prototypes": 8,  # of DINOv2: two centers that move
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "experiments.pretrain", "smoke", "--no-evaluate", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _hashes(folder: Path) -> list[Any]:
    """Networks, log without times, and the hash of every array of the last checkpoint."""
    log = [{name: value for name, value in one.items() if "seconds" not in name} for one in read_log(folder)]
    networks = [(folder / name / "model.safetensors").read_bytes() for name in ("teacher", "student")]
    with TrainingCheckpoints(folder / "checkpoints") as checkpoints:
        manifest = checkpoints._manifest(max(checkpoints.steps))
    return [*networks, log, {name: leaf["sha256"] for name, leaf in manifest["leaves"].items()}]


def main() -> None:
    """Runs the campaign and prints a line for each kind; exit code 1 where something was not sound."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=12_000, help="number of damaged files over all kinds")
    parser.add_argument("--kills", type=int, default=10, help="number of killed trainings of each method")
    parser.add_argument("--methods", nargs="*", default=["dino", "dinov2"], help="methods of the killed trainings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.environ["JAX_PLATFORMS"] = "cpu"
    failed = False
    for name in KINDS:
        started = time.monotonic()
        found = damage_files(name, -(-options.cases // len(KINDS)), options.seed)
        failed |= not found.keys() <= _SOUND
        shown = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(found.items()))
        print(f"{name:22}{time.monotonic() - started:8.1f} s  {shown}", flush=True)
    for method in options.methods if options.kills else ():
        found = kill_trainings(options.kills, options.seed, method)
        failed |= any(outcome[0].isupper() for outcome in found)
        shown = ", ".join(f"{count} {outcome}" for outcome, count in found.items())
        print(f"{f'killed {method} trainings':34}  {shown}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
