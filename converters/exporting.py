"""Models written for other programs, as `python -m converters --to` asks: PyTorch, Hugging Face, StableHLO, ONNX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from converters.exports.onnx_graph import INPUT, onnx_model
from converters.exports.outputs import description_of, parse_outputs, raise_unless_exportable, write_description
from converters.exports.pytorch import export, raise_unless_new
from converters.huggingface.folder import model_settings, raise_unless_new_folder, write_folder
from converters.huggingface.positions import difference_from_transformers
from converters.torch_to_flax import to_torch
from converters.weight_files.optional import import_onnx, import_torch
from dinojax.documents import write_whole
from dinojax.errors import UserError
from dinojax.models.vit import VisionTransformer

Target = Literal["torch", "huggingface", "stablehlo", "onnx"]
_SUFFIX = {"stablehlo": ".stablehlo", "onnx": ".onnx"}


def raise_unless_new_target(target: Target, out: Path, outputs: str) -> None:
    """Refuses what cannot be written, and missing packages, before anything is read."""
    if target == "torch":
        raise_unless_new(out)
        if out.suffix == ".pth":
            import_torch()
    elif target == "huggingface":
        raise_unless_new_folder(out)
    else:
        parse_outputs(outputs)
        if out.suffix != _SUFFIX[target]:
            raise UserError(f"{out} does not end in {_SUFFIX[target]}, which files of --to {target} do")
        for file in (out, description_of(out)):
            if file.exists():
                raise UserError(f"{file} exists; remove it or name another file with --out")
        if target == "onnx":
            import_onnx()


def write_model(model: VisionTransformer, target: Target, out: Path, *, size: int | None, outputs: str) -> str:
    """Writes a model, whole or not at all.

    Args:
        model: of any architecture.
        target: the program that reads it.
        out: a new file, or a new folder for "huggingface".
        size: side in pixels of the images of a StableHLO or ONNX program; None takes that of the preprocessing.
        outputs: names of the program's outputs with commas between them.

    Returns:
        What to tell the user: where it is, and how it is used.

    Raises:
        UserError: the file or folder exists or cannot be written, or `target` has no such architecture.
    """
    raise_unless_new_target(target, out, outputs)
    if target == "torch":
        export(to_torch(model), out)
        return f"written to {out} for PyTorch"
    if target == "huggingface":
        model_settings(model.config)
        write_folder(model, to_torch(model), out)
        return _about_folder(model, out)
    side = model.preprocessing.image_size if size is None else size
    raise_unless_exportable(model, side)
    return _write_program(model, target, out, side, parse_outputs(outputs))


def _about_folder(model: VisionTransformer, out: Path) -> str:
    pooler = ", add_pooling_layer=False" if model.config.family == "dino" else ""
    lines = [
        f"written to {out} for transformers; read it with",
        f'  AutoModel.from_pretrained("{out}"{pooler})',
        f'  AutoImageProcessor.from_pretrained("{out}")',
    ]
    if model.config.family == "dino":
        lines.append(
            f"for images of another size than {model.config.img_size} px, call it with interpolate_pos_encoding=True"
        )
    difference = difference_from_transformers(model.config)
    return "\n".join(lines + ([f"note: {difference}"] if difference else []))


def _write_program(model: VisionTransformer, target: Target, out: Path, size: int, outputs: Sequence[str]) -> str:
    channels = model.config.in_chans
    if target == "onnx":
        content = onnx_model(model, to_torch(model), size, outputs).SerializeToString()
        taken, axes = INPUT, ["batch", channels, size, size]
        lines = ["import onnxruntime", f'run = onnxruntime.InferenceSession("{out}").run']
        lines.append(f'outputs = dict(zip({list(outputs)}, run({list(outputs)}, {{"{INPUT}": images}})))')
    else:
        from converters.exports.stablehlo import stablehlo

        content = bytes(stablehlo(model, size, outputs))
        taken, axes = "images", ["batch", size, size, channels]
        read = f'bytearray(pathlib.Path("{out}").read_bytes())'
        lines = ["import jax.export, pathlib", f"run = jax.export.deserialize({read}).call"]
        lines.append(f"outputs = run(images)  # a dictionary: {', '.join(outputs)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, content)
        write_description(model, out, size, outputs, format=target, input={"name": taken, "axes": axes})
    except OSError as error:
        for file in (out, description_of(out)):
            file.unlink(missing_ok=True)
        raise UserError(f"{out} could not be written ({error}); make room or name another file") from error
    shape = ", ".join(map(str, axes))
    return (
        f"written to {out} ({len(content) / 1e6:.1f} MB); {description_of(out).name} holds mean, deviation and size. "
        "Run it with\n  " + "\n  ".join(lines) + f"\nimages: float32 [{shape}], normalised"
    )
