"""Settings in groups: flags without prefixes, flat files, bounds at the field, and old names."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from dinojax import UserError
from experiments.runs.command_line import command_line, recipes_type
from experiments.runs.settings import (
    INNER_FRACTION,
    POSITIVE,
    DataSettings,
    Flags,
    GivenBackbone,
    RunSettings,
    check_bounds,
    create,
    flat,
    replace,
    unimportant,
)


@dataclasses.dataclass(frozen=True)
class Crops:
    """How crops are made."""

    size: Annotated[int, POSITIVE] = 32
    """Side of a crop in pixels."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How the model is trained."""

    epochs: Annotated[int, POSITIVE] = 3
    """Number of passes through the training images, with a description that is
    longer than
    (the width of) one line of this file, so that its line breaks would show."""
    heldout: Annotated[float | None, INNER_FRACTION] = None
    """Share of the training images that is held out."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A command."""

    model: Flags[GivenBackbone]
    dataset: Flags[DataSettings] = DataSettings("digits")
    training: Flags[Training] = Training()
    crops: Crops = Crops()
    run: Flags[RunSettings] = RunSettings()
    recipe: tyro.conf.Suppress[str] = "small"


def parse(*args: str) -> Config:
    return command_line(Config, "experiments.example", "An example.", args)


def test_fields_of_groups_are_flags_without_a_prefix_and_others_keep_theirs():
    config = parse("weights.pth", "--data", "cifar10", "--epochs", "5", "--crops.size", "16", "--out", "here")
    assert config.model.weights == "weights.pth"
    assert config.dataset.data == "cifar10"
    assert config.training.epochs == 5
    assert config.crops.size == 16
    assert config.run.out == Path("here")


def test_files_keep_settings_flat_by_the_names_of_the_flags():
    settings = flat(parse("weights.pth", "--epochs", "5"))
    assert settings["weights"] == "weights.pth"
    assert settings["epochs"] == 5
    assert settings["crops"] == {"size": 32}
    assert not {"model", "dataset", "training", "run"} & set(settings)


def test_settings_are_created_and_replaced_by_flat_names():
    config = create(Config, weights="a.pth", epochs=7, max_train=10)
    assert config == parse("a.pth", "--epochs", "7", "--max-train", "10")
    changed = replace(config, data="cifar10", recipe="large")
    assert (changed.dataset.data, changed.recipe) == ("cifar10", "large")
    assert changed.dataset.max_train == 10
    for make in (lambda: create(Config, weights="a.pth", epoch=7), lambda: replace(config, epoch=7)):
        with pytest.raises(TypeError, match="epoch"):
            make()
    with pytest.raises(TypeError, match="weights"):
        create(Config, epochs=7)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--epochs", "0"), "--epochs 0 is not a positive number"),
        (("--heldout", "1"), "--heldout 1.0 is not above 0 and below 1"),
        (("--max-train", "-2"), "--max-train -2 is not a positive number"),
    ],
)
def test_a_value_outside_its_bound_is_refused_by_flag_and_value(flags, sentence):
    check_bounds(parse("weights.pth"))
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        check_bounds(parse("weights.pth", *flags))


def test_settings_that_change_no_number_are_marked_at_the_field():
    assert unimportant(Config) == {"data_dir", "out", "cache_dir", "mesh"}


def test_the_help_shows_flowing_descriptions_and_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert "usage: python -m experiments.example [-h] [OPTIONS] RUN_OR_WEIGHTS" in shown
    assert re.search(r"a description that is longer than (│\n│ +)?\(the width of\) one line", shown)
    assert "A published checkpoint by its torch.hub name" in shown
    for group in ("dataset options", "training options", "run options"):
        assert group in shown


def test_the_old_name_of_a_recipe_and_a_protocol_is_understood(capsys):
    recipes = {"small": create(Config, weights="a"), "reported": create(Config, weights="a", epochs=300)}
    kind = recipes_type(recipes, {"small": "A small one.", "reported": "As reported."})
    config = command_line(kind, "experiments.example", "An example.", ["seed", "--seed", "4"])
    assert (config.training.epochs, config.run.seed) == (300, 4)
    assert '"seed" is now called "reported"' in capsys.readouterr().err
    assert parse("seed").model.weights == "seed"  # a file of that name, not a recipe
