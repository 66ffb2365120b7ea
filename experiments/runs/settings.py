"""Settings: the groups that several commands share, bounds that stand at the field, and settings by flat names.

A command's `Config` is a dataclass of groups. `Flags[Group]` makes every field of a group a flag without a prefix, so
that `config.dataset.max_train` is `--max-train`. Files keep settings flat, by the names of the flags.
"""

import dataclasses
import operator
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from dinojax.errors import UserError

T = TypeVar("T")
Flags = tyro.conf.OmitArgPrefixes
Dtype = Literal["auto", "float32", "bfloat16"]
REQUIRED = "(required)"  # the value of a setting that a recipe leaves to the command line


@dataclasses.dataclass(frozen=True)
class Bound:
    """A rule for the value of a field; `wanted` ends the sentence "--name value is not …"."""

    holds: Callable[[Any], bool]
    wanted: str


@dataclasses.dataclass(frozen=True)
class Unimportant:
    """Marks a field that does not change what a run computes: an interrupted run resumes under another value."""


POSITIVE = Bound(lambda value: value > 0, "a positive number")
NOT_NEGATIVE = Bound(lambda value: value >= 0, "0 or more")
BELOW_ONE = Bound(lambda value: 0 <= value < 1, "0 or more and below 1")
PROBABILITY = Bound(lambda value: 0 <= value <= 1, "between 0 and 1")
INNER_FRACTION = Bound(lambda value: 0 < value < 1, "above 0 and below 1")
UNIMPORTANT = Unimportant()


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The labelled images, and how many of them to use."""

    data: str
    """Name or folder of the data set: digits (in scikit-learn, no download); a folder with train/<class>/… and
    test/<class>/…; tiny_imagenet; or a TensorFlow Datasets name such as cifar10, cifar100 or stl10."""
    data_dir: Annotated[Path | None, UNIMPORTANT] = None
    """Folder of prepared TensorFlow Datasets, and of tiny-imagenet-200. None takes ~/tensorflow_datasets and the
    working folder."""
    max_train: Annotated[int | None, POSITIVE] = None
    """Number of training images to use, drawn from every class in proportion. None uses all."""
    max_test: Annotated[int | None, POSITIVE] = None
    """Number of test images to use, drawn from every class in proportion. None uses all."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The pretrained model."""

    weights: str = "dinov2_vits14"
    """A published checkpoint by its torch.hub name (dino_vits16 … dinov2_vitg14_reg); dinojax_vitt, a small model
    trained on CIFAR-10 that comes with the package; a .pth or .safetensors file; a folder written by `python -m
    converters`; the run folder of a training; or "random:NAME" for random weights."""
    image_size: Annotated[int | None, POSITIVE] = None
    """Side in pixels of the square image that the model sees: the shorter side is resized (bicubic, antialiased), then
    the centre is cropped. None takes the size the model was trained at, 224 for published weights."""
    dtype: Dtype = "auto"
    """Number type of the model's computation. auto is float32 on a CPU and bfloat16 on a GPU or TPU."""


@dataclasses.dataclass(frozen=True)
class DeviceSettings:
    """The devices, and how they share the work."""

    mesh: Annotated[str | None, UNIMPORTANT] = None
    """Division of the work among devices: data=8 divides each batch among eight, and data=4,fsdp=2 divides weights and
    optimiser state between pairs of them as well. None divides batches among all devices."""


@dataclasses.dataclass(frozen=True)
class BatchSettings(DeviceSettings):
    """How features are computed."""

    batch_size: Annotated[int | None, POSITIVE] = None
    """Images per forward pass. None takes as many as fit the cache of a CPU, or 256 on a GPU or TPU."""


@dataclasses.dataclass(frozen=True)
class BackboneSettings(BatchSettings, ModelSettings):
    """The backbone, and how it computes features."""


@dataclasses.dataclass(frozen=True)
class GivenBackbone(BackboneSettings):
    """The backbone, and how it computes features."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")] = dataclasses.field()


@dataclasses.dataclass(frozen=True)
class FolderSettings:
    """The folders that are written to."""

    out: Annotated[Path | None, UNIMPORTANT] = None
    """Folder of the run. None takes a folder under runs/<command>/."""
    cache_dir: Annotated[Path | None, UNIMPORTANT] = None
    """Folder of downloaded weights and cached features. None takes $DINOJAX_CACHE, or else ~/.cache/dinojax."""


@dataclasses.dataclass(frozen=True)
class RunSettings(FolderSettings):
    """The random seed, and the folders that are written to."""

    seed: int = 0
    """Random seed of everything that is drawn."""


@dataclasses.dataclass(frozen=True)
class ResumableSettings(RunSettings):
    """The random seed, the folders that are written to, and how an interrupted run resumes."""

    accept_changed_data: Annotated[bool, UNIMPORTANT] = False
    """Whether to resume although images were added, removed or changed since the run was started. data.json in the run
    folder notes it."""


def create(kind: type[T], **values: Any) -> T:
    """A dataclass of groups from flat values, `create(Config, data="digits", epochs=3)`; the rest are defaults.

    Raises:
        TypeError: a name that no field has, or a field without a value or default.
    """
    arguments = {}
    for field in dataclasses.fields(kind):
        group = group_of(kind, field.name)
        if group is None:
            arguments |= {field.name: values.pop(field.name)} if field.name in values else {}
            continue
        own = {name: values.pop(name) for name in _names(group) if name in values}
        has_default = field.default is not dataclasses.MISSING
        arguments[field.name] = replace(field.default, **own) if has_default else create(group, **own)
    if values:
        raise TypeError(f"{kind.__name__} has no setting {', '.join(values)}")
    return kind(**arguments)


def replace(config: T, **values: Any) -> T:
    """`dataclasses.replace` by flat names: each value goes to the group that has a field of its name."""
    arguments = {}
    for field in dataclasses.fields(config):
        group = group_of(type(config), field.name)
        if group is None:
            arguments |= {field.name: values.pop(field.name)} if field.name in values else {}
        elif own := {name: values.pop(name) for name in _names(group) if name in values}:
            arguments[field.name] = replace(getattr(config, field.name), **own)
    if values:
        raise TypeError(f"{type(config).__name__} has no setting {', '.join(values)}")
    return dataclasses.replace(config, **arguments)


def flat(config: Any) -> dict[str, Any]:
    """Setting → value, by the names of the flags; nested settings that keep a prefix (`crops`) are dictionaries."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if group_of(type(config), field.name):
            found |= flat(value)
        else:
            found[field.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if callable(own := getattr(value, "settings", None)):  # a ViTConfig
        return own()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def defaults(kind: type) -> dict[str, Any]:
    """Flat name → default value of the settings that have one."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        made = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if made else field.default
        if group_of(kind, field.name):
            group = group_of(kind, field.name)
            found |= defaults(group) if value is dataclasses.MISSING else flat(value)
        elif value is not dataclasses.MISSING:
            found[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return found


def unimportant(kind: type) -> set[str]:
    """Flat names of the settings under whose other values an interrupted run resumes."""
    found: set[str] = set()
    for name, hint in _hints(kind).items():
        if group := group_of(kind, name):
            found |= unimportant(group)
        elif UNIMPORTANT in getattr(hint, "__metadata__", ()):
            found.add(name)
    return found


def given_once(positional: T | None, flag: T | None, name: str) -> T | None:
    """What was given as the positional argument or as the flag `name`; None if neither was.

    Raises:
        UserError: both were given, and differ.
    """
    if positional is None or flag is None:
        return flag if positional is None else positional
    one, other = (Path(str(value)).expanduser().absolute() for value in (positional, flag))
    if one != other:
        raise UserError(f"{positional} and --{name} {flag} name different images; give one of them")
    return positional


def check_bounds(config: Any) -> None:
    """Raises a `UserError` for the first setting outside its bound; None is within every bound."""
    for name, value, marks in _leaves(config):
        for bound in (mark for mark in marks if isinstance(mark, Bound) and value is not None):
            require(bound.holds(value), name, value, bound.wanted)


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raises a `UserError` unless `holds`; `wanted` ends the sentence "--name value is not …"."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} {value} is not {wanted}")


def resolve_dtype(dtype: Dtype) -> str:
    """The number type that "auto" stands for on this machine's device."""
    import jax

    return {"cpu": "float32"}.get(jax.default_backend(), "bfloat16") if dtype == "auto" else dtype


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def group_of(kind: type, name: str) -> Any:
    """The dataclass of a field that is declared as `Flags[…]`; None for other fields."""
    hint = _hints(kind)[name]
    marks = getattr(hint, "__metadata__", ())
    flags = Flags[int].__metadata__
    return hint.__origin__ if any(mark in flags for mark in marks) else None


def _names(group: type) -> Iterator[str]:
    return map(operator.attrgetter("name"), dataclasses.fields(group))


def _leaves(config: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Flat name, value and marks of every setting."""
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if group_of(type(config), field.name):
            yield from _leaves(value)
        else:
            yield field.name, value, getattr(hints[field.name], "__metadata__", ())
