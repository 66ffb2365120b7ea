"""`python -m converters NAME|FILE|FOLDER`: PyTorch weights → a folder that `dinojax.load` reads, or back, proven."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from converters.export import export, raise_unless_new
from converters.pretrained import (
    convert,
    describe,
    fetch_converted,
    load_pretrained,
    model_folder,
    raise_unless_architecture,
    store,
    variant,
)
from converters.state_dicts import num_heads_beside, read_state_dict
from converters.torch_to_flax import to_torch
from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from dinojax.models.files import is_model_folder, load, named_parameters, shipped_folder
from dinojax.models.variants import VARIANTS
from dinojax.models.vit import VisionTransformer

_DESCRIPTION = """Converts DINO and DINOv2 weights from PyTorch to Flax, and models of dinojax to PyTorch.

  python -m converters dinov2_vits14            download the official file, convert it, keep the result in the cache
  python -m converters dinov2_vits14 --verify   the same, and compare every output with PyTorch first
  python -m converters checkpoint.pth           convert a file of your own into the folder checkpoint-flax beside it
  python -m converters model.safetensors --name dinov2_vitb14   refuse it unless it is a ViT-B/14
  python -m converters runs/mine/teacher --out teacher.pth      a trained model, under the official names

Afterwards: model = dinojax.load(FOLDER), or converters.load_pretrained(NAME); in PyTorch
torch.hub.load("facebookresearch/dinov2", NAME, pretrained=False).load_state_dict(torch.load(FILE)).

Exit code 0 is success, 1 a difference above the bound under --verify (nothing is written then), 2 a mistake that the
message explains."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to convert, and where to."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|FILE|FOLDER")]
    """A published model by its torch.hub name (dino_vits16 … dinov2_vitg14_reg); or a .pth or .safetensors file, also
    a training checkpoint; or a Hugging Face folder. From a folder that dinojax wrote, or dinojax_vitt, the model inside
    the package, it goes back to PyTorch."""
    out: Path | None = None
    """Folder to write. Default: the cache for a NAME; for a FILE a folder beside it, named FILE-flax. Back to PyTorch:
    the .pth or .safetensors file to write."""
    name: str | None = None
    """For a FILE or FOLDER: the model it must be. Without it the architecture is read off the shapes."""
    which: Literal["teacher", "student"] = "teacher"
    """For a training checkpoint: the network to take. DINO's results are the teacher's."""
    num_heads: int | None = None
    """For a FILE: number of attention heads, which shapes do not tell. Default: config.json beside it, else one head
    for every 64 channels, as in all published models."""
    verify: bool = False
    """Run PyTorch and Flax on the same images and print the largest difference of every output. Needs transformers;
    upstream's own code is compared too where GitHub can be reached (torch.hub downloads and runs it)."""
    cache_dir: Path | None = None
    """Default: $DINOJAX_CACHE, else ~/.cache/dinojax."""


def run(config: Config) -> bool:
    """Converts and prints; False means that `--verify` found a difference above its bound, and nothing was written."""
    if config.num_heads is not None and config.num_heads < 1:
        raise UserError(f"--num-heads {config.num_heads} is not a positive number")
    if config.name is not None:
        variant(config.name)
    is_file, shipped = config.source not in VARIANTS, shipped_folder(config.source)
    folder = shipped or Path(config.source).expanduser()
    if shipped or (is_file and is_model_folder(folder)):
        return _export(config, folder)
    if is_file and not Path(config.source).expanduser().exists() and not any(c in config.source for c in "./\\"):
        variant(config.source)  # most likely a misspelt name: its error suggests others
    return _convert_file(config) if is_file else _convert_published(config)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(Config, args=args, prog="python -m converters", description=_DESCRIPTION)
    with exit_on_user_error():
        if not run(config):
            raise SystemExit(1)


def _convert_published(config: Config) -> bool:
    name, folder = config.source, config.out or model_folder(config.source, config.cache_dir)
    if config.name not in (None, name):
        raise UserError(f"--name {config.name} beside the published model {name}: --name is for files")
    _raise_if_foreign(folder)
    if not config.verify:
        model = load_pretrained(name, cache_dir=config.cache_dir)
        if config.out is not None:
            store(model, folder, {"name": name})
        _print_model(name, model, folder)
        return True
    file, checkpoint, model = fetch_converted(name, config.cache_dir)
    if not _equals_pytorch(model, checkpoint, config):
        return False
    store(model, folder, describe(file, name))
    file.unlink()
    _print_model(name, model, folder)
    return True


def _convert_file(config: Config) -> bool:
    file = Path(config.source).expanduser()
    folder = config.out or file.with_name(f"{file.name if file.is_dir() else file.stem}-flax")
    _raise_if_foreign(folder)
    checkpoint = read_state_dict(file)
    model = convert(checkpoint, str(file), num_heads=config.num_heads or num_heads_beside(file), which=config.which)
    if config.name is not None:
        raise_unless_architecture(model, config.name, str(file))
    if config.verify and not _equals_pytorch(model, checkpoint, config):
        return False
    store(model, folder, describe(file) | {"which": config.which})
    _print_model(file.name, model, folder)
    return True


def _export(config: Config, folder: Path) -> bool:
    if config.out is None:
        raise UserError(
            f"{folder} is converted already: dinojax.load reads it, and --out FILE.pth or FILE.safetensors writes it "
            "for PyTorch"
        )
    if config.num_heads is not None or config.which != "teacher":
        raise UserError(f"--num-heads and --which are for weight files, and {folder} is one network that knows its own")
    file = config.out.expanduser()
    raise_unless_new(file)
    model = load(folder)
    if config.name is not None:
        raise_unless_architecture(model, config.name, str(folder))
    state = to_torch(model)
    if config.verify and not _equals_pytorch(model, state, config):
        return False
    export(state, file)
    print(f"{folder}: {sum(array.size for array in state.values()):,} parameters, written to {file} for PyTorch")
    return True


def _raise_if_foreign(folder: Path) -> None:
    """Before minutes of work, not after."""
    if folder.exists() and not is_model_folder(folder):
        raise UserError(f"{folder} exists and is no converted model; name another folder with --out")


def _equals_pytorch(model: VisionTransformer, checkpoint: Mapping[str, Any], config: Config) -> bool:
    from converters.verify import BOUND, table, verify, worst

    differences, notes = verify(model, checkpoint, which=config.which)
    share = worst(differences)
    print(table(differences), *notes, sep="\n")
    verdict = "equal" if share <= BOUND else "NOT equal: nothing is written"
    print(f"largest difference: {share:.1e} of the output's largest value (bound {BOUND:.0e}): {verdict}\n")
    return share <= BOUND


def _print_model(title: str, model: VisionTransformer, folder: Path) -> None:
    count = sum(array.size for array in named_parameters(model).values())
    print(f"{title}: {count:,} parameters")
    for field in dataclasses.fields(model.config):
        print(f"  {field.name:<22} {getattr(model.config, field.name)}")
    print(f"written to {folder}; read it with dinojax.load({str(folder)!r})")


if __name__ == "__main__":
    main()
