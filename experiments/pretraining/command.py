"""What the pretraining commands share: their command line, and what they run."""

from collections.abc import Mapping, Sequence

from dinojax.commands import exit_on_user_error
from experiments.pretraining.config import PretrainConfig, PretrainResult
from experiments.pretraining.recipes import describe
from experiments.runs.command_line import command_line, recipes_type
from experiments.runs.host_memory import keep_freed_memory


def run(config: PretrainConfig) -> PretrainResult:
    """Runs a pretraining, or resumes it.

    Raises:
        UserError: data or settings that cannot be used, a run folder of other settings, or a loss that is not finite.
    """
    from experiments.pretraining.loop import pretrain

    return pretrain(config)


def run_recipe(
    name: str,
    recipes: Mapping[str, PretrainConfig],
    description: str,
    args: Sequence[str] | None,
    *,
    default: str | None = None,
) -> None:
    """The command line `NAME [RECIPE] [--setting value …]`.

    Args:
        name: of the command's module.
        recipes: by name.
        description: what `--help` says first.
        args: words of the command line; None takes the process's own.
        default: the recipe that is run unless one is named; None requires one.
    """
    options = {"default": recipes[default]} if default else {}
    with exit_on_user_error():
        kind = recipes_type(dict(recipes), {recipe: describe(config) for recipe, config in recipes.items()})
        config = command_line(kind, name, description, args, **options)
        if config.compute.accumulation_steps == 1:  # micro-batches need little memory and run slower with it
            keep_freed_memory()
        run(config)
