"""Checks on eight simulated devices: `python -m tests.support.mesh_runs CHECK` in a process of their own.

The number of devices is fixed when JAX starts, so the tests start this file; a check that fails is a traceback.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.work.compiled import collectives

DEVICES = 8
MESHES = ("data=8", "data=4,fsdp=2", "fsdp=8")
_FLAG = f"--xla_force_host_platform_device_count={DEVICES}"


def run(check: str, module: str = "tests.support.mesh_runs") -> str:
    """What a check prints; fails with its traceback."""
    environment = os.environ | {"XLA_FLAGS": _FLAG, "JAX_PLATFORMS": "cpu", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", module, check]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def largest_difference(one: Any, other: Any) -> float:
    """The largest absolute difference between the numbers of two trees."""
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max()) for a, b in pairs)


def networks(family: str, *, shared: bool = False, prototypes: int = 512) -> Any:
    """A small DINO or DINOv2 in float64, whose large tensors are worth dividing."""
    import jax
    from flax import nnx

    from dinojax import DINOHead, VisionTransformer, ViTConfig
    from dinojax.pretraining import DINO, DINOv2

    rngs = nnx.Rngs(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "drop_path_rate": 0.3}
    backbone = VisionTransformer(ViTConfig(**shape, family=family), rngs=rngs)

    def head() -> DINOHead:
        return DINOHead(64, prototypes, hidden_dim=64, bottleneck_dim=32, rngs=rngs)

    model = DINO(backbone, head()) if family == "dino" else DINOv2(backbone, head(), None if shared else head())
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(float), state))


def step_and_state(family: str, *, images: int = 16, rate: float = 1e-3, **options: Any) -> tuple[Callable, Any]:
    """A training step, which takes crops and a key, and the state before it."""
    import jax

    from dinojax import pretraining as p

    model = networks(family, shared=options.pop("shared", False))
    schedules = {"teacher_temp": lambda step: 0.05, "teacher_momentum": lambda step: 0.9}
    rates = (lambda step: rate), (lambda step: 0.04)
    if family == "dino":
        optimizer = p.dino_optimizer(*rates)
        return p.make_train_step(model, optimizer, **schedules, **options), p.init_state(model, optimizer)
    optimizer, masking = p.dinov2_optimizer(*rates), p.BlockMasking(4, 4)
    own = {name: options.pop(name) for name in ("centering", "koleo_group") if name in options}
    crops = 2 * images
    step = p.make_dinov2_train_step(
        model,
        optimizer,
        most_masked=masking.most_masked(crops, crops // options.get("accumulation_steps", 1)),
        objective=p.DINOv2Objective(**own),
        **schedules,
        **options,
    )
    return p.with_masks(step, masking, jax.random.key(3)), p.init_dinov2_state(model, optimizer)


def check_steps(cases: list[tuple[str, dict[str, Any], bool]]) -> None:
    """Steps with the same crops on every mesh; of what is divided, of the work, and of what the devices exchange."""
    import jax
    import numpy as np

    from dinojax import parallel

    rng = np.random.default_rng(0)
    crops = [rng.normal(size=(2, 16, 16, 16, 3)), rng.normal(size=(4, 16, 8, 8, 3))]
    for family, options, drop in cases:
        step, state = step_and_state(family, **options)
        alone, flops = None, 0.0
        for text in ("data=1", *MESHES):
            mesh = parallel.make_mesh(text)
            places = parallel.state_shardings(mesh, state)
            given = jax.device_put(crops, parallel.batch_sharding(mesh, axis=1))
            key = jax.device_put(jax.random.key(5), parallel.replicated(mesh)) if drop else None
            current = jax.device_put(state, places)
            compiled = jax.jit(parallel.on_mesh(step, mesh)).lower(current, given, key).compile()
            for _ in range(2):
                current, metrics = compiled(current, given, key)
            found = jax.tree.map(np.asarray, (current, metrics))
            if alone is None:
                alone, flops = found, compiled.cost_analysis()["flops"]
                continue
            difference = largest_difference(alone, found)
            share = compiled.cost_analysis()["flops"] * mesh.size / flops
            print(f"{family} {options} drop path {drop}, {text}: {difference:.1e}, {share:.3f} of the work")
            assert difference < 1e-12
            # Dropped subsets are not computed on one device, but on a mesh they are.
            assert share < (1.25 if drop and family == "dinov2" else 1.1)
            for leaf, place in zip(jax.tree.leaves(current), jax.tree.leaves(places), strict=True):
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            check_memory(mesh, current.student)
            check_exchange(collectives(compiled.as_text()))


def check_memory(mesh: Any, parameters: Any) -> None:
    """With `fsdp`, a device holds its share of the parameters, and of all else little."""
    import jax

    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(parameters))
    total = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert held < total / mesh.shape["fsdp"] * 1.25, (held, total)


def check_exchange(found: dict[tuple[str, str, tuple[int, ...]], int]) -> None:
    """Neither logits nor pixels are gathered; of what is as wide as the prototypes, only the prototypes are."""
    wide = [math.prod(shape) for kind, _, shape in found if kind != "all-reduce" and shape[-1:] == (512,)]
    assert max(wide, default=0) <= 512 * 64, found
    assert not [shape for kind, _, shape in found if kind == "all-gather" and shape[-1:] == (3,)], found


def check_golden() -> None:
    """The official steps of batches of 3 and 4, on as many devices."""
    import jax

    from dinojax.parallel import make_mesh
    from tests.support.reference_files import names, read

    meshes = {3: ("data=3", "fsdp=3"), 4: ("data=4", "data=2,fsdp=2", "fsdp=4")}
    for name in names("*_training_*"):
        reference = read(name)
        batch = reference.config["batch"]
        for text in meshes[batch]:
            mesh = make_mesh(text, jax.devices()[:batch])
            compare = _compare_dino if name.startswith("dino_v1") else _compare_dinov2
            compare(f"{name} on {text}", reference, mesh)


def _compare_dino(what: str, reference: Any, mesh: Any) -> None:
    import numpy as np

    from tests.support import training_parity as parity

    alone, found = (parity.train(reference, np.float64, one) for one in (None, mesh))
    assert not parity.too_large(parity.differences(reference, found), "float64")
    numbers = largest_difference(*((one.losses, one.centers, one.gradients) for one in (alone, found)))
    report(what, numbers, *((one.student, one.teacher) for one in (alone, found)))


def _compare_dinov2(what: str, reference: Any, mesh: Any) -> None:
    import numpy as np

    from tests.support import dinov2_parity as parity

    alone, found = (parity.train(reference, np.float64, one) for one in (None, mesh))
    assert not parity.too_large(parity.differences(reference, found), "float64")
    numbers = largest_difference(*((one.metrics, one.gradients) for one in (alone, found)))
    last = [(one.model, one.states[-1]) for one in (alone, found)]
    networks = [tuple(parity.official(model, part) for part in (state.student, state.teacher)) for model, state in last]
    report(what, numbers, *networks)


def report(what: str, numbers: float, alone: tuple[dict, ...], found: tuple[dict, ...]) -> None:
    """Losses, centers and gradients are those of one device, and so are student and teacher.

    The gradient of the key part of `qkv.bias` is zero in exact arithmetic: AdamW turns rounding into steps.
    """
    import numpy as np

    rest, key_bias = 0.0, 0.0
    for one, other in zip(alone, found, strict=True):
        for name, array in one.items():
            difference = np.abs(array - other[name])
            if name.endswith("attn.qkv.bias"):
                query, key, value = np.split(difference, 3)
                key_bias, difference = max(key_bias, key.max()), np.concatenate([query, value])
            rest = max(rest, difference.max())
    print(
        f"{what}: numbers {numbers:.1e}, parameters {rest:.1e}, key biases {key_bias:.1e} from one device", flush=True
    )
    assert numbers < 1e-12 and rest < 1e-12 and key_bias < 1e-7, what


def pretraining(mesh: Any, family: str) -> tuple[Callable, Any, Any]:
    """Compiled steps with augmentation, the state before them, and 48 images on the devices, in float32."""
    import jax
    import numpy as np

    from dinojax import parallel
    from dinojax import pretraining as p

    step, state = step_and_state(family, rate=1e-4)  # at a higher rate, rounding grows from step to step
    state = jax.device_put(state, parallel.state_shardings(mesh, state))
    crops = p.MultiCropConfig(global_size=16, local_size=8, local_crops=2)
    steps = p.make_pretrain_steps(step, crops, jax.random.key(1), drop_path=True)
    images = np.random.default_rng(0).integers(0, 256, (48, 20, 24, 3), np.uint8)
    compiled = jax.jit(parallel.on_mesh(steps, mesh), donate_argnums=0)
    return compiled, state, jax.device_put(images, parallel.replicated(mesh))


def batches(first: int, count: int) -> Any:
    """The images of steps `first` to `first + count` of a run."""
    import numpy as np

    from dinojax.pretraining import Batches

    rows = np.stack([np.random.default_rng(step).permutation(48)[:16] for step in range(first, first + count)])
    return Batches(rows.astype(np.int32), rows.astype(np.int32), np.zeros(count, np.int32))


def check_augmented() -> None:
    """Twenty steps with augmentation and drop path, in float32; and the bits of the views."""
    import jax
    import numpy as np

    from dinojax import parallel
    from dinojax.pretraining import MultiCropConfig, multi_crop

    for family in ("dino", "dinov2"):
        alone = None
        for text in ("data=1", *MESHES):
            steps, state, images = pretraining(parallel.make_mesh(text), family)
            losses = np.asarray(steps(state, images, batches(0, 20), 20)[1]["loss"])
            alone = losses if alone is None else alone
            print(f"{family}, twenty augmented steps on {text}: {np.abs(losses - alone).max():.1e}")
            np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-5)
    crops, alone = MultiCropConfig(global_size=16, local_size=8, local_crops=2), None
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 24, 3), np.uint8)
    for text in ("data=1", "data=2", *MESHES):
        mesh = parallel.make_mesh(text)
        views = jax.jit(parallel.on_mesh(lambda images: multi_crop(jax.random.key(2), images, crops), mesh))
        found = jax.tree.map(np.asarray, views(jax.device_put(pixels, parallel.batch_sharding(mesh))))
        alone = found if alone is None else alone
        for one, other in zip(alone, found):
            np.testing.assert_array_equal(one, other)


def check_checkpoints() -> None:
    """A state moves from mesh to mesh; on the same mesh the run continues bit for bit."""
    import tempfile

    import jax
    import numpy as np

    from dinojax import parallel
    from dinojax.checkpoint import TrainingCheckpoints

    meshes = {text: parallel.make_mesh(text) for text in ("data=1", *MESHES)}
    steps, state, images = pretraining(meshes["data=4,fsdp=2"], "dino")
    state, _ = steps(state, images, batches(0, 2), 2)
    with tempfile.TemporaryDirectory() as folder, TrainingCheckpoints(folder) as checkpoints:
        checkpoints.save(2, state, record={})
        saved = jax.tree.map(np.asarray, state)
        after, metrics = steps(state, images, batches(2, 2), 2)
        after, loss = jax.tree.map(np.asarray, after), np.asarray(metrics["loss"])
        for text, mesh in meshes.items():
            steps, state, images = pretraining(mesh, "dino")
            restored = checkpoints.restore(parallel.abstract_on(mesh, state)).state
            for leaf, place in zip(jax.tree.leaves(restored), jax.tree.leaves(parallel.state_shardings(mesh, state))):
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            assert largest_difference(saved, restored) == 0
            state, found = steps(restored, images, batches(2, 2), 2)
            print(f"from data=4,fsdp=2 to {text}: loss {np.abs(np.asarray(found['loss']) - loss).max():.1e}")
            np.testing.assert_allclose(found["loss"], loss, rtol=0, atol=1e-5)
            if text == "data=4,fsdp=2":
                assert largest_difference(after, state) == 0


def check_neighbours() -> None:
    """The bank is divided, and the neighbours are those of plain numpy, ties included."""
    import numpy as np

    from dinojax.parallel import make_mesh
    from dinojax.probes import nearest_neighbours

    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(301, 8)).astype(np.float32), rng.normal(size=(20, 8)).astype(np.float32)
    bank[200:260] = bank[:60]  # ties
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)]
    order = np.argsort(-np.round(unit[1] @ unit[0].T, 5), axis=1, kind="stable")
    for text in ("data=1", "data=8", "data=4,fsdp=2"):
        for chunk, k in ((None, 20), (5, 70)):
            scores, found = nearest_neighbours(bank, queries, k, chunk=chunk, mesh=make_mesh(text))
            np.testing.assert_array_equal(found, order[:, :k])
            np.testing.assert_allclose(scores, np.take_along_axis(unit[1] @ unit[0].T, found, axis=1), atol=1e-6)


def check_sweep() -> None:
    """Heads that devices share equal those of one device; 13 rates are not divided by eight."""
    import jax
    import numpy as np

    from dinojax.parallel import make_mesh
    from dinojax.probes import fit_linear_sweep

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 3, 8))
    labels = rng.integers(0, 3, 101)
    features = (centres[labels] + rng.normal(size=(101, 3, 8))).astype(np.float32)
    given = features[:61], labels[:61], features[61:], labels[61:]
    options = {"num_classes": 3, "key": jax.random.key(0), "steps": 40, "batch_size": 16}
    alone = fit_linear_sweep(*given, **options)
    for text in MESHES[:2]:
        found = fit_linear_sweep(*given, mesh=make_mesh(text), **options)
        assert (found.settings, found.best) == (alone.settings, alone.best)
        np.testing.assert_allclose(found.heldout_loss, alone.heldout_loss, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.heldout_accuracy, alone.heldout_accuracy, rtol=0, atol=1e-7)
        for one, other in zip(found.head, alone.head):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


STEPS: list[tuple[str, dict[str, Any], bool]] = [
    ("dino", {}, True),
    ("dino", {"accumulation_steps": 2}, False),
    ("dino", {"prototype_chunk": 128}, False),
    ("dinov2", {}, True),
    ("dinov2", {"centering": "sinkhorn_knopp", "shared": True, "koleo_group": 2}, False),
    ("dinov2", {"accumulation_steps": 2, "koleo_group": 4}, False),
    ("dinov2", {"centering": "sinkhorn_knopp", "prototype_chunk": 128}, False),
]
CHECKS: dict[str, tuple[bool, Callable[[], None]]] = {
    "dino_steps": (True, lambda: check_steps(STEPS[:3])),
    "dinov2_steps": (True, lambda: check_steps(STEPS[3:])),
    "golden": (True, check_golden),
    "augmented": (False, check_augmented),
    "checkpoints": (False, check_checkpoints),
    "neighbours": (False, check_neighbours),
    "sweep": (False, check_sweep),
}

if __name__ == "__main__":
    import jax

    in_64_bits, check = CHECKS[sys.argv[1]]
    jax.config.update("jax_enable_x64", in_64_bits)
    jax.config.update("jax_default_matmul_precision", "highest")
    check()
