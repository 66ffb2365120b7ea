"""The fine-tuning benchmark compares equal work: PyTorch's step is ours in every mode, and FLOPs add up."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import finetune
from benchmarks.finetune_work import OurTrainer, TorchTrainer, random_batch, same_work, to_torch
from benchmarks.work import dino_work

pytestmark = pytest.mark.slow  # minutes of compilation; run by make test-all

ROOT = Path(__file__).parents[2]
# The position table is of another size than the images, as in ViT-S/14.
TINY = {"classes": 5, "img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
ROWS = {mode: finetune.Row(mode, size=12, batch=3, **TINY) for mode in finetune.MODES}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ours():
    """Initial parameters of each mode, and what our first steps make of them."""
    found = {}
    for mode, row in ROWS.items():
        trainer = OurTrainer(row, row.recipe)
        found[mode] = trainer.everything(), dino_work.first_steps(trainer, random_batch(row, row.batch))[0]
    return found


def differences(ours, mode, part=None, **changes):
    """Between our first steps and PyTorch's with other constants."""
    row, (initial, expected) = ROWS[mode], ours[mode]
    trainer = TorchTrainer(row, initial, dataclasses.replace(row.recipe, **changes), part=part)
    found = dino_work.first_steps(trainer, to_torch(random_batch(row, row.batch), "cpu"))[0]
    return same_work(row, initial, expected, found)


@pytest.mark.parametrize("part", [None, 2], ids=["whole", "in unequal parts"])
@pytest.mark.parametrize("mode", finetune.MODES)
def test_the_torch_step_is_ours(ours, mode, part):
    found = differences(ours, mode, part)
    assert max(found.values()) < 1e-4
    assert ("teacher" in found) == (mode == "llrd")
    trained = {name.removeprefix("student.") for name in ours[mode][1] if name.startswith("student.")}
    names = ours[mode][0].keys()
    assert (
        trained
        == {
            "linear": {"head.kernel", "head.bias"},
            "finetune": names,
            "llrd": names,
            "lora": {name for name in names if name.endswith((".a", ".b")) or name.startswith("head.")},
        }[mode]
    )


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("linear", {"momentum": 0.8}),
        ("linear", {"learning_rate": 0.11}),
        ("finetune", {"momentum": 0.8}),
        ("finetune", {"weight_decay": 0.0}),
        ("finetune", {"label_smoothing": 0.0}),
        ("llrd", {"layer_decay": 0.8}),
        ("llrd", {"weight_decay": 0.0}),
        ("llrd", {"ema_decay": 0.9}),
        ("lora", {"lora_alpha": 8.0}),
        ("lora", {"weight_decay": 0.0}),
        ("lora", {"learning_rate": 2.1e-3}),
    ],
    ids=str,
)
def test_other_work_is_refused(ours, mode, change):
    with pytest.raises(RuntimeError, match="the work differs"):
        differences(ours, mode, **change)


@pytest.mark.parametrize("mode", finetune.MODES)
def test_flops_are_those_of_the_products(ours, mode):
    row = ROWS[mode]
    trainer = TorchTrainer(row, ours[mode][0], row.recipe)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trainer.step(to_torch(random_batch(row, row.batch), "cpu"))
    assert counter.get_total_flops() == row.flops


def test_the_last_line_is_json():
    row = ROWS["llrd"]
    code = (
        "import json, sys; from benchmarks.finetune import Row, finish, measure\n"
        "finish(measure([Row(**json.loads(sys.argv[1]))], gpu=False, quick=True, rounds=2), None)"
    )
    command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(row))]
    passive = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin would take the cores from other tests
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=passive)
    assert not run.returncode, run.stderr
    *table, last = run.stdout.splitlines()
    result = json.loads(last)
    assert result["benchmark"] == "finetune"
    assert result["ratios"].keys() == result["rows"].keys() == {row.name}
    numbers = result["rows"][row.name]
    assert result["ratios"][row.name] == numbers["ratio"]["median"] > 0
    assert numbers["baseline"] == "torch eager"
    assert numbers["same_work"].keys() == {"loss", "gradient_norm", "student", "teacher"}
    assert numbers["variants"].keys() == {"dinojax", "torch eager", "A/A control"}
    for name, variant in numbers["variants"].items():
        assert any(name in line for line in table)
        assert {"tflops", "compile_seconds", "peak_mib"} <= variant.keys()
        assert variant["images_per_second"] > 0
