"""The DINO benchmark compares equal work: PyTorch steps as we do, Pillow crops as torchvision does; FLOPs add up."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.work import dino_work, jax_dino, pillow_crops, torch_dino
from converters.torch_to_flax import to_torch
from tests.support import pillow_reference

MODEL = dino_work.Model(
    img_size=16, patch_size=4, prototypes=24, embed_dim=12, depth=2, num_heads=3, hidden_dim=32, bottleneck_dim=16
)

pytestmark = pytest.mark.slow  # minutes of compilation; run by make test-all
ROW = dino_work.StepRow(MODEL, local_size=8, batch=3)
# So tight a clip touches most tensors.
RECIPE = dino_work.Recipe(clip_norm=0.01)


@pytest.fixture(scope="module")
def crops() -> list[np.ndarray]:
    return [group.astype(np.float64) for group in dino_work.random_crops(ROW, ROW.batch)]


@pytest.fixture(scope="module")
def ours(crops) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Initial parameters, and what the first steps make of them, in float64."""
    with jax.enable_x64(True):
        graphdef, state = nnx.split(jax_dino.build(MODEL), nnx.Param)
        model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(np.float64), state))
        initial = {name: array.copy() for name, array in to_torch(model).items()}
        return initial, dino_work.first_steps(jax_dino.Trainer(model, RECIPE), crops)[0]


def torch_steps(initial, crops, recipe):
    trainer = torch_dino.Trainer(MODEL, initial, recipe)
    return dino_work.first_steps(trainer, torch_dino.to_torch(crops, "cpu"))[0]


def test_the_torch_step_is_ours(ours, crops):
    initial, expected = ours
    found = torch_steps(initial, crops, RECIPE)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        keep = slice(None)
        if name.endswith("qkv.bias"):  # the key part has no gradient but rounding
            keep = np.r_[: len(array) // 3, 2 * len(array) // 3 : len(array)]
        np.testing.assert_allclose(found[name][keep], array[keep], rtol=1e-9, atol=1e-9, err_msg=name)
    assert max(dino_work.differences(initial, expected, found).values()) < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"weight_decay": 0.0},
        {"freeze_last_layer_steps": 0},
        {"learning_rate": 5.1e-4},
        {"teacher_momentum": 0.99},
        {"teacher_temp": 0.045},
        {"student_temp": 0.11},
        {"center_momentum": 0.8},
        {"clip_norm": 1e-7},
    ],
    ids=str,
)
def test_other_work_is_refused(ours, crops, change):
    initial, expected = ours
    with pytest.raises(RuntimeError, match="the work differs"):
        dino_work.differences(initial, expected, torch_steps(initial, crops, dataclasses.replace(RECIPE, **change)))


def test_a_missing_tensor_is_refused(ours):
    initial, expected = ours
    with pytest.raises(RuntimeError, match="center"):
        dino_work.differences(initial, expected, {k: v for k, v in expected.items() if k != "center"})


def test_flops_are_those_of_the_products(ours, crops):
    trainer = torch_dino.Trainer(MODEL, ours[0], RECIPE)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trainer.step(torch_dino.to_torch(crops, "cpu"))
    assert counter.get_total_flops() == ROW.flops


def test_pillow_crops_are_those_of_the_reference():
    random = pillow_crops.Random(0)
    for index, pixels in enumerate(pillow_reference.photo_like(40, 40)):
        for crop in range(10):
            view = pillow_crops.draw_view(random, 40, crop)
            found = pillow_crops.make_crop(Image.fromarray(pixels), view, 24)
            reference = pillow_reference.view(pixels, view._asdict(), 24) / 255
            expected = (reference - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"image {index}, {view}")


def test_pillow_makes_all_crops_of_a_batch():
    images = dino_work.pictures(3, 32)
    assert images.std(axis=(1, 2, 3)).min() > 20
    globals_, locals_ = pillow_crops.multi_crop(pillow_crops.Random(0), images, 24, 16)
    assert globals_.shape == (2, 3, 24, 24, 3) and locals_.shape == (8, 3, 16, 16, 3)
    assert globals_.dtype == locals_.dtype == np.float32
    assert min(globals_.std(axis=(2, 3, 4)).min(), locals_.std(axis=(2, 3, 4)).min()) > 0


def test_crops_of_other_views_are_refused():
    images, random = dino_work.pictures(2, 32), pillow_crops.Random(0)
    arrays = {}
    for kind, crops, size in (("global", 2, 24), ("local", 8, 16)):
        views = [[pillow_crops.draw_view(random, 32, crop) for _ in images] for crop in range(crops)]
        arrays[f"{kind}_crops"] = np.stack(
            [
                [pillow_crops.make_crop(Image.fromarray(pixels), view, size) for pixels, view in zip(images, row)]
                for row in views
            ]
        )
        for field in pillow_crops.View._fields:
            arrays[f"{kind}_{field}"] = np.array([[getattr(view, field) for view in row] for row in views])
    assert pillow_crops.repeat(images, arrays)["largest_difference"] == 0
    arrays["local_flip"] = ~arrays["local_flip"]
    with pytest.raises(RuntimeError, match="the work differs"):
        pillow_crops.repeat(images, arrays)
