"""Reduces checkpoint files to official names: without wrappers, prefixes, block chunks and Hugging Face names.

Known layouts: a bare backbone; DINO training checkpoints `{"student": …, "teacher": …, "args": …}` whose
entries hold `backbone.*` and `head.*`, the student's under `module.`; DINOv2 training checkpoints with
`teacher.backbone.*`, `teacher.dino_head.*` and chunked blocks (`blocks.CHUNK.INDEX.*`, the index counting through all
chunks); Hugging Face's DINO, DINOv2 and DINOv3 files. `converters.dinov3` has the names of DINOv3's.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.dinov3.hugging_face import from_dinov3_names, has_dinov3_names
from converters.huggingface.names import from_hugging_face
from converters.weight_files.tensors import raise_unless_named, raise_unless_readable, to_numpy
from dinojax.errors import UserError

_CLASSIFIER = "classifier."
_WRAPPERS = ("model", "state_dict")
_DEEPEST = 8  # dictionaries inside each other; a dictionary may hold itself
_PREFIXES = {
    "backbone": ("module.", "_orig_mod.", "backbone.", "dinov2.", "dinov2_with_registers.", "vit."),
    "head": ("module.", "_orig_mod.", "head.", "dino_head."),
}
# Prefixes of other parts that a checkpoint may hold; anything else is reported as an extra tensor.
_COMPANIONS = ("backbone.", "head.", "dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.", _CLASSIFIER)


def part_of_checkpoint(checkpoint: Mapping[str, Any], *, part: str, which: str) -> dict[str, np.ndarray]:
    """The tensors of the backbone or the head of one network: bare official name → numpy array.

    Args:
        checkpoint: a state dict, or dictionaries around one.
        part: "backbone" or "head".
        which: "teacher" or "student", for checkpoints that hold both.

    Raises:
        UserError: there is no such network in the checkpoint, two tensors have the same name, or a value is not a
            float tensor.
    """
    if which not in ("teacher", "student"):
        raise UserError(f"which={which!r} is not 'teacher' or 'student'")
    unwrapped, _ = _unwrap(checkpoint, which)
    tensors = _strip(unwrapped, part, which)
    raise_unless_readable(tensors)
    state = {name: to_numpy(name, tensor) for name, tensor in tensors.items()}
    if any(name.startswith("embeddings.") for name in state):
        state = from_dinov3_names(state) if has_dinov3_names(state) else from_hugging_face(state)
    return _unchunk(state)


def has_hugging_face_names(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a state dict is one of `transformers`."""
    return any(re.match(r"(\w+\.)?embeddings\.", str(name)) for name in checkpoint)


def with_mask_token(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict of `transformers`, with a mask token of zeros if it is a DINOv2 without one."""
    names = [str(name) for name in checkpoint]
    token = next((name for name in names if name.endswith("embeddings.cls_token")), "")
    mask = token.removesuffix("cls_token") + "mask_token"
    if not token or mask in names or not any(".layer_scale1." in name for name in names):
        return checkpoint
    raise_unless_readable({token: checkpoint[token]})
    return {**checkpoint, mask: np.zeros((1, to_numpy(token, checkpoint[token]).size), np.float32)}


def classifier_of_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The classifier beside a backbone of `transformers`: "weight" and "bias", in torch's layout; {} without one.

    Raises:
        UserError: a value is not a float tensor.
    """
    if not has_hugging_face_names(checkpoint):
        return {}
    tensors = {str(name): value for name, value in checkpoint.items() if str(name).startswith(_CLASSIFIER)}
    raise_unless_readable(tensors)
    return {name.removeprefix(_CLASSIFIER): to_numpy(name, tensor) for name, tensor in tensors.items()}


def unwrapped(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dictionary of named tensors inside the dictionaries of a training checkpoint.

    Raises:
        UserError: there is none.
    """
    return _unwrap(checkpoint, "state_dict")[0]


def left_out(checkpoint: Mapping[str, Any], which: str) -> str | None:
    """One sentence on which of several networks is taken; None if the checkpoint leaves no choice.

    The entry `which` comes first, then "model", then "state_dict"; averages such as "model_ema" are never taken.
    """
    _, path = _unwrap(checkpoint, which)
    others = []
    for key in path:
        others += [
            str(other)
            for other, value in checkpoint.items()
            if other not in (key, "teacher", "student") and isinstance(value, Mapping) and _holds_tensors(value)
        ]
        checkpoint = checkpoint[key]
    return f"the weights are those of {path[-1]!r}; {', '.join(map(repr, others))} is left out" if others else None


def _holds_tensors(entry: Mapping[str, Any]) -> bool:
    return any(hasattr(value, "detach") or isinstance(value, np.ndarray) for value in entry.values())


def _unwrap(checkpoint: Mapping[str, Any], which: str) -> tuple[Mapping[str, Any], list[str]]:
    """Descends through nested dictionaries to the one that maps names to tensors; also the keys on the way."""
    path: list[str] = []
    while any(isinstance(value, Mapping) for value in checkpoint.values()):
        inner = next((key for key in (which, *_WRAPPERS) if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            raise UserError(f"the checkpoint holds no {which!r} weights, only {_first(checkpoint)}")
        if len(path) == _DEEPEST:
            raise UserError(f"the checkpoint holds more than {_DEEPEST} dictionaries inside each other")
        checkpoint = checkpoint[inner]
        path.append(inner)
    if not checkpoint:
        raise UserError("the checkpoint holds no tensors")
    return checkpoint, path


def _first(names: Mapping[str, Any], count: int = 8) -> str:
    shown = sorted(str(name)[:40] for name in names)
    return ", ".join(map(repr, shown[:count])) + (f" and {len(shown) - count} more" if len(shown) > count else "")


def _strip(tensors: Mapping[str, Any], part: str, which: str) -> dict[str, Any]:
    """Removes prefixes, and the tensors of the other network and the other part."""
    raise_unless_named(tensors)
    tensors = dict(tensors)
    networks = {name.split(".")[0] for name in tensors} & {"teacher", "student"}
    if networks and which not in networks:
        raise UserError(f"the checkpoint holds no {which!r} weights, only those of the {networks.pop()!r}")
    other = "student." if which == "teacher" else "teacher."
    pending = [f"{which}.", *_PREFIXES[part]]
    while prefix := next((p for p in pending if any(name.startswith(p) for name in tensors)), None):
        beside = {name: v for name, v in tensors.items() if not name.startswith((prefix, other, *_COMPANIONS))}
        within = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        if twice := within.keys() & beside.keys():
            raise UserError(f"two tensors of the checkpoint are named {min(twice)}, one of them {prefix}{min(twice)}")
        tensors = within | beside
    return tensors


def _unchunk(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`blocks.CHUNK.INDEX.*` → `blocks.INDEX.*`."""
    flat: dict[str, np.ndarray] = {}
    for name, array in state.items():
        bare = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)
        if bare in flat:
            raise UserError(f"two tensors of the checkpoint are named {bare}, one of them {name}")
        flat[bare] = array
    return flat
