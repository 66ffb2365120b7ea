"""The command line that a dataclass of settings makes: flags, help, and the names of earlier releases."""

import dataclasses
import inspect
import shutil
import sys
import textwrap
import typing
from collections.abc import Sequence
from typing import Any

import docstring_parser
import tyro

from experiments.runs.settings import REQUIRED

_REGISTRY = tyro.constructors.ConstructorRegistry()


def command_line(kind: Any, name: str, description: str, args: Sequence[str] | None, **options: Any) -> Any:
    """The settings that a command was given.

    Args:
        kind: a dataclass, or the union that `recipes_type` makes.
        name: of the command's module, such as "experiments.evaluate".
        description: what `--help` says first.
        args: words of the command line; None takes the process's own.
        options: for `tyro.cli`.
    """
    words = renamed(sys.argv[1:] if args is None else args, recipes=not dataclasses.is_dataclass(kind))
    return tyro.cli(
        kind, args=words, prog=f"python -m {name}", description=wrapped(description), registry=_REGISTRY, **options
    )


def wrapped(text: str) -> str:
    """A module's docstring, its paragraphs filled to the terminal's width; indented lines (commands) stay as they are.

    Every line starts with a space: tyro joins lines that start with a letter and does not wrap them again. It prints an
    empty line as two, so lines between paragraphs hold a zero-width space.
    """
    width = min(shutil.get_terminal_size().columns - 2, 100)
    paragraphs = inspect.cleandoc(text).split("\n\n")
    filled = [p if p.startswith(" ") else textwrap.fill(p, width) for p in paragraphs]
    return textwrap.indent("\n\u200b\n".join(filled), " ")


def renamed(args: Sequence[str], *, recipes: bool) -> list[str]:
    """The same words with "reported" for "seed", the old name of a protocol and of a recipe.

    The old name is accepted until version 0.2.

    Args:
        args: words of a command line.
        recipes: whether the first word is the name of a recipe.
    """
    words = ["--protocol=reported" if word == "--protocol=seed" else word for word in args]
    for place, word in enumerate(words):
        if word == "seed" and (words[place - 1] == "--protocol" if place else recipes):
            words[place] = "reported"
            print('note: "seed" is now called "reported" here; the old name will go in version 0.2', file=sys.stderr)
    return words


def recipes_type(recipes: dict[str, Any], descriptions: dict[str, str]) -> Any:
    """What `command_line` takes for named recipes, each with a line about it in `--help`."""
    return tyro.extras.subcommand_type_from_defaults(recipes, descriptions=descriptions)


@_REGISTRY.struct_rule
def _settings(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """The fields of a documented dataclass. tyro's own rule keeps their descriptions' line breaks; here they flow."""
    helps = _descriptions(info.type) if dataclasses.is_dataclass(info.type) else {}
    if not helps:
        return None
    hints = typing.get_type_hints(info.type, include_extras=True)
    fields = [
        tyro.constructors.StructFieldSpec(
            field.name, hints[field.name], _default(field, info.default), helptext=helps.get(field.name)
        )
        for field in dataclasses.fields(info.type)
    ]
    return tyro.constructors.StructConstructorSpec(info.type, tuple(fields))


def _default(field: dataclasses.Field, parent: Any) -> Any:
    """What the field is in the default of its dataclass, else its own default."""
    if dataclasses.is_dataclass(parent):
        value = getattr(parent, field.name)
        return tyro.MISSING if isinstance(value, str) and value == REQUIRED else value
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is dataclasses.MISSING else field.default


def _descriptions(kind: type) -> dict[str, str]:
    """Field → its description without line breaks; a class that declares a field again may leave it as it is."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        for doc in docstring_parser.parse_from_object(base).params:
            found[doc.arg_name] = " ".join((doc.description or "").split())
    return found
