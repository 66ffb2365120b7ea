"""Steps of every fine-tuning mode equal PyTorch's; what trains, what it costs, what it becomes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dinojax import VARIANTS, UserError, VisionTransformer, ViTConfig
from dinojax.finetune import (
    MODES,
    ImageClassifier,
    balanced_class_weights,
    count_parameters,
    finetune_optimizer,
    head_logits,
    init_finetune_state,
    make_finetune_step,
    make_logits,
    merge_parameters,
    split_parameters,
    weighted_cross_entropy,
)
from dinojax.models.files import named_parameters, with_parameters

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.support import torch_finetune as reference  # noqa: E402 (needs both)
from tests.support.torch_finetune import ALPHA, CLASSES, CONFIG, DEPTH, RANK, TorchClassifier  # noqa: E402

BATCH, STEPS = 6, 4
DECAY, LAYER_DECAY, EMA_DECAY = 0.3, 0.6, 0.2
WEIGHTS = np.array([0.5, 2.0, 1.0, 3.0, 0.25])
RNG = np.random.default_rng(0)
BATCHES = [(RNG.standard_normal((BATCH, 16, 16, 3)), RNG.integers(0, CLASSES, BATCH)) for _ in range(STEPS)]
IMAGES, LABELS = BATCHES[0][0].astype(np.float32), BATCHES[0][1]


def abstract_classifier(config=CONFIG, classes=CLASSES):
    return nnx.eval_shape(
        lambda: ImageClassifier(VisionTransformer(config, rngs=nnx.Rngs(0)), classes, rngs=nnx.Rngs(0))
    )


def classifier(parameters=None, **changes):
    """A classifier that holds exactly `parameters`, or random ones in float32."""
    model = abstract_classifier(dataclasses.replace(CONFIG, **changes))
    if parameters is None:
        rng, state = np.random.default_rng(1), nnx.to_flat_state(nnx.state(model, nnx.Param))
        draw = {path: rng.standard_normal(param.shape, np.float32) for path, param in state}
        parameters = {".".join(map(str, path)): 0.2 * array for path, array in draw.items()}
    return with_parameters(model, parameters)


@jax.jit
def run(model, images):
    return model(images)


def split(model, mode):
    return split_parameters(model, mode, lora_rank=RANK, key=jax.random.key(1))


def constant(mode, rate=0.02, **options):
    """The optimiser with a rate that stays."""
    return finetune_optimizer(mode, DEPTH, learning_rate=lambda step: rate, **options)


def dotted(state):
    return {".".join(map(str, path)): np.asarray(param[...]) for path, param in nnx.to_flat_state(state)}


def train(logits_of, parameters, optimizer, *, embed=None, ema_decay=None, **options):
    """Four steps; the state before them and after each, and the metrics of each."""
    trainable, frozen = parameters
    step = jax.jit(make_finetune_step(logits_of, optimizer, ema_decay=ema_decay, **options))
    states, metrics = [init_finetune_state(trainable, optimizer, ema=ema_decay is not None)], []
    for images, labels in BATCHES:
        state, found = step(states[-1], frozen, images if embed is None else embed(images), labels, jax.random.key(0))
        states.append(state)
        metrics.append({name: float(value) for name, value in found.items()})
    return states, metrics


def train_torch(model, optimizer, loss_of, clip_norm=math.inf, scheduler=None):
    """The same steps in PyTorch; their metrics."""
    metrics = []
    for images, labels in BATCHES:
        optimizer.zero_grad()
        logits, labels = model(images), torch.from_numpy(labels)
        loss = loss_of(logits, labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        accuracy = (logits.argmax(1) == labels).double().mean()
        metrics.append({"loss": loss.item(), "accuracy": accuracy.item(), "gradient_norm": norm.item()})
    return metrics


def assert_same_metrics(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-13)


def assert_same(found, expected, before):
    """Equal but for rounding, and those named in `before` have moved, all but the mask token, which no image uses.

    Returns:
        The largest difference.
    """
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-12, err_msg=name)
    for name, array in before.items():
        assert (np.abs(found[name] - array).max() > 1e-6) == ("mask_token" not in name), name
    return max(np.abs(found[name] - array).max() for name, array in expected.items())


@pytest.mark.parametrize("cached", [False, True], ids=["images", "cached features"])
def test_linear_steps_equal_pytorch(cached, record_difference):
    """SGD at a rate that falls in steps, weighted classes, smoothed labels."""
    with jax.enable_x64(True):
        theirs = TorchClassifier(depth=1)
        before = reference.our_parameters(theirs)
        theirs.backbone.requires_grad_(False)
        optimizer = torch.optim.SGD(theirs.head.parameters(), lr=0.05, momentum=0.9, weight_decay=DECAY)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.1)
        loss = torch.nn.CrossEntropyLoss(torch.from_numpy(WEIGHTS), label_smoothing=0.2)
        expected = train_torch(theirs, optimizer, loss, scheduler=scheduler)

        model, rate = classifier(before, depth=1), optax.piecewise_constant_schedule(0.05, {2: 0.1})
        states, metrics = train(
            head_logits if cached else make_logits(model),
            split(model, "linear"),
            finetune_optimizer("linear", DEPTH, learning_rate=rate, weight_decay=DECAY),
            embed=jax.jit(lambda images: model.backbone(images).cls_token) if cached else None,
            class_weights=WEIGHTS,
            label_smoothing=0.2,
        )
        assert_same_metrics(metrics, expected)
        after = dotted(merge_parameters(states[-1].trainable, split(model, "linear")[1]))
        head = {name: before[name] for name in ("head.kernel", "head.bias")}
        difference = assert_same(after, reference.our_parameters(theirs), head)
        record_difference(f"linear head, {STEPS} steps of SGD (float64)", "parameters", difference)
        for name in before.keys() - head.keys():
            assert after[name].tobytes() == before[name].tobytes(), f"{name} was to be left as it is"


def test_finetune_steps_equal_pytorch(record_difference):
    """SGD on everything, decayed and clipped; on our side rematerialised and in two parts."""
    with jax.enable_x64(True):
        theirs = TorchClassifier(depth=1)
        before = reference.our_parameters(theirs)
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.02, momentum=0.9, weight_decay=DECAY)
        expected = train_torch(theirs, optimizer, torch.nn.CrossEntropyLoss(), clip_norm=0.5)
        assert min(step["gradient_norm"] for step in expected) > 0.5, "nothing to clip"

        model, ours = classifier(before, depth=1), constant("finetune", weight_decay=DECAY, clip_norm=0.5)
        logits_of, parameters = make_logits(model, remat=True), split(model, "finetune")
        states, metrics = train(logits_of, parameters, ours, accumulation_steps=2)
        assert_same_metrics(metrics, expected)
        difference = assert_same(dotted(states[-1].trainable), reference.our_parameters(theirs), before)
        record_difference(f"everything, {STEPS} steps of SGD (float64)", "parameters", difference)


def test_layer_wise_steps_equal_pytorch(record_difference):
    """AdamW, one group a parameter on PyTorch's side; a model with registers."""
    with jax.enable_x64(True):
        theirs = TorchClassifier(registers=2)
        before = reference.our_parameters(theirs)
        optimizer = torch.optim.AdamW(reference.layer_wise_groups(theirs, 2e-3, DECAY, LAYER_DECAY))
        expected = train_torch(theirs, optimizer, torch.nn.CrossEntropyLoss(), clip_norm=1.0)

        model = classifier(before, num_register_tokens=2)
        ours = constant("llrd", 2e-3, weight_decay=DECAY, layer_decay=LAYER_DECAY, clip_norm=1.0)
        states, metrics = train(make_logits(model), split(model, "llrd"), ours)
        assert_same_metrics(metrics, expected)
        difference = assert_same(dotted(states[-1].trainable), reference.our_parameters(theirs), before)
        record_difference(f"layer-wise rates, {STEPS} steps of AdamW (float64)", "parameters", difference)


def test_lora_steps_equal_pytorch(record_difference):
    """Merged kernels here, a path beside the layer there; the moving average against a plain loop."""
    with jax.enable_x64(True):
        theirs = TorchClassifier()
        model = classifier(reference.our_parameters(theirs))
        trainable, frozen = split(model, "lora")
        before = dotted(trainable)
        trained = reference.add_lora(theirs, {name: x for name, x in before.items() if not name.startswith("head")})
        groups = [
            {"params": [theirs.head.bias], "weight_decay": 0.0},
            {"params": [theirs.head.weight, *trained.values()], "weight_decay": DECAY},
        ]
        expected = train_torch(theirs, torch.optim.AdamW(groups, lr=5e-3), torch.nn.CrossEntropyLoss())

        logits_of = make_logits(model, lora_alpha=ALPHA)
        ours = constant("lora", 5e-3, weight_decay=DECAY)
        states, metrics = train(logits_of, (trainable, frozen), ours, ema_decay=EMA_DECAY)
        assert_same_metrics(metrics, expected)
        after = {name: parameter.detach().numpy() for name, parameter in trained.items()}
        after |= {"head.kernel": theirs.head.weight.detach().numpy().T, "head.bias": theirs.head.bias.detach().numpy()}
        difference = assert_same(dotted(states[-1].trainable), after, before)
        record_difference(f"LoRA, {STEPS} steps of AdamW (float64)", "parameters", difference)

        average = before
        for count, state in enumerate(states[1:]):
            new, decay = dotted(state.trainable), min(EMA_DECAY, (1 + count) / (10 + count))
            average = {name: decay * array + (1 - decay) * new[name] for name, array in average.items()}
        assert_same(dotted(states[-1].ema), average, before)

        exported = classifier(dotted(merge_parameters(states[-1].trainable, frozen, lora_alpha=ALPHA)))
        images = BATCHES[0][0]
        np.testing.assert_allclose(run(exported, images), theirs(images).detach(), rtol=0, atol=1e-12)
        assert np.abs(run(exported, images) - run(model, images)).max() > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_starts_as_the_model_itself(mode):
    """And what becomes of the model later does not reach what was split."""
    model = classifier()
    before = {name: np.array(array) for name, array in named_parameters(model).items()}
    trainable, frozen = split(model, mode)
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    merged = dotted(merge_parameters(trainable, frozen))
    assert merged.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(merged[name], array, err_msg=name)


@pytest.mark.parametrize("mode", ["linear", "lora"])
def test_merged_parameters_are_an_ordinary_model(mode):
    model = classifier()
    trainable, frozen = split(model, mode)
    trained = jax.tree.map(lambda x: x + 0.1, trainable)
    logits = jax.jit(make_logits(model, lora_alpha=ALPHA))(trained, frozen, IMAGES)
    assert np.abs(run(model, IMAGES) - logits).max() > 0.01
    nnx.update(model, merge_parameters(trained, frozen, lora_alpha=ALPHA))
    np.testing.assert_allclose(run(model, IMAGES), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_pytorchs(weighted, smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((7, CLASSES)), rng.integers(0, CLASSES, 7)
    weights = WEIGHTS if weighted else None
    theirs = torch.nn.CrossEntropyLoss(torch.from_numpy(WEIGHTS) if weighted else None, label_smoothing=smoothing)
    with jax.enable_x64(True):
        found = weighted_cross_entropy(jnp.asarray(logits), labels, weights, smoothing)
        np.testing.assert_allclose(found, theirs(torch.from_numpy(logits), torch.from_numpy(labels)), rtol=1e-14)
    assert weighted_cross_entropy(jnp.asarray(logits, jnp.bfloat16), labels, weights, smoothing).dtype == jnp.float32


def test_class_weights_are_scikit_learns_balanced():
    compute_class_weight = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    labels = np.repeat(np.arange(4), [1301, 131, 7, 42])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_array_equal(balanced_class_weights(labels, 4), expected)
    with pytest.raises(UserError, match="class 4 of 5"):
        balanced_class_weights(labels, 5)
    with pytest.raises(UserError, match="label 3"):
        balanced_class_weights(labels, 3)


def test_parameters_are_counted():
    """22,059,656 and 3,080 are the article's, for 8 classes and S/14."""
    model = abstract_classifier(VARIANTS["dinov2_vits14"], classes=8)
    counts = {}
    for mode in MODES:
        trainable, frozen = split_parameters(model, mode, lora_rank=4, key=jax.random.key(0))
        counts[mode] = count_parameters(trainable), count_parameters(frozen)
    factors = 12 * 4 * ((384 + 3 * 384) + (384 + 384))
    assert counts == {
        "linear": (3_080, 22_056_576),
        "finetune": (22_059_656, 0),
        "llrd": (22_059_656, 0),
        "lora": (3_080 + factors, 22_056_576),
    }


def test_the_first_head_and_the_first_factors():
    config = ViTConfig(embed_dim=192, num_heads=3, depth=1)
    backbone = nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))
    model = ImageClassifier(backbone, 100, rngs=nnx.Rngs(1))
    sampling_error = (2 * model.head.kernel.size) ** -0.5  # relative, of a deviation of so many normal numbers
    assert np.std(model.head.kernel) == pytest.approx(0.01, rel=4 * sampling_error)
    assert not model.head.bias[...].any()
    factors = dotted(split_parameters(model, "lora", lora_rank=32, key=jax.random.key(0))[0])
    qkv, proj = (factors[f"backbone.blocks.0.attn.{name}.a"] for name in ("qkv", "proj"))
    # Of n uniform numbers the largest falls short of the bound by a share of about 1 / n; their deviation errs by
    # √(0.2 / n).
    assert np.abs(qkv).max() == pytest.approx(192**-0.5, rel=10 / qkv.size)
    assert np.std(qkv) == pytest.approx((3 * 192) ** -0.5, rel=4 * (0.2 / qkv.size) ** 0.5)
    assert abs(np.corrcoef(qkv.ravel(), proj.ravel())[0, 1]) < 0.1, "each layer has a draw of its own"


def test_misuse_is_named():
    model = abstract_classifier()
    with pytest.raises(UserError, match="lora_rank=0"):
        split_parameters(model, "lora", lora_rank=0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="mode='full'"):
        split_parameters(model, "full")
    with pytest.raises(ValueError, match="mode='full'"):
        constant("full")
    trainable, frozen = split(classifier(), "linear")
    step = make_finetune_step(head_logits, constant("linear"), ema_decay=0.9)
    with pytest.raises(ValueError, match="no average"):
        step(init_finetune_state(trainable, constant("linear")), frozen, np.zeros((2, 32), np.float32), LABELS[:2])


def test_donated_states_leave_the_model_alone():
    model = classifier()
    state = init_finetune_state(split(model, "finetune")[0], constant("finetune"), ema=True)
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert all(array.is_deleted() for array in jax.tree.leaves((state.trainable, state.ema)))
    assert not any(array.is_deleted() for array in named_parameters(model).values())


@pytest.mark.parametrize("mode", ["linear", "lora"])
def test_drop_path_is_drawn_only_where_the_backbone_trains(mode):
    model = classifier(drop_path_rate=0.5)
    logits_of = jax.jit(make_logits(model))
    drawn = logits_of(*split(model, mode), IMAGES, jax.random.key(2))
    assert np.array_equal(drawn, logits_of(*split(model, mode), IMAGES)) == (mode == "linear")


def test_a_network_in_bfloat16_leaves_state_and_loss_in_float32():
    model = classifier()
    for mode in MODES:
        trainable, frozen = split(model, mode)
        step = make_finetune_step(make_logits(model, compute_dtype=jnp.bfloat16), constant(mode))
        found = jax.eval_shape(step, init_finetune_state(trainable, constant(mode)), frozen, IMAGES, LABELS)
        assert {x.dtype for x in jax.tree.leaves(found)} <= {np.dtype("float32"), np.dtype("int32")}, mode
    half = jax.jit(make_logits(model, compute_dtype=jnp.bfloat16))(*split(model, "linear"), IMAGES)
    assert half.dtype == jnp.bfloat16
    # It keeps 8 bits, 2⁻⁸ of logits up to 0.63, a few roundings in a row: 0.0037 measured.
    np.testing.assert_allclose(np.asarray(half, np.float32), run(model, IMAGES), rtol=0, atol=0.008)


def test_a_frozen_backbone_costs_no_backward():
    model = classifier()

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).cost_analysis()["flops"]

    forward, relative = flops(lambda images: model(images), IMAGES), {}
    for mode in MODES:
        trainable, frozen = split(model, mode)
        step = make_finetune_step(make_logits(model), constant(mode))
        state = init_finetune_state(trainable, constant(mode))
        relative[mode] = flops(step, state, frozen, IMAGES, LABELS, jax.random.key(0)) / forward
    assert relative["linear"] < 1.05
    assert min(relative["finetune"], relative["llrd"]) > 2.5
    assert relative["lora"] < 0.9 * relative["finetune"], "frozen kernels need no gradients"


def test_a_batch_that_is_filled_up_or_cut_into_parts_gives_the_same_step():
    """Weighted and smoothed, seven images and one that fills up; in a part of its own there is only that one."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        features, labels = rng.normal(size=(7, 5)), np.array([0, 1, 2, 1, 0, 2, 2], np.int32)
        head = nnx.State(
            {"head": {"kernel": nnx.Param(jnp.asarray(rng.normal(size=(5, 3)))), "bias": nnx.Param(jnp.zeros(3))}}
        )
        optimizer = constant("linear", 0.1)
        options = {"class_weights": np.array([0.5, 1.0, 3.0]), "label_smoothing": 0.2}

        def after(features, labels, parts):
            step = make_finetune_step(head_logits, optimizer, accumulation_steps=parts, **options)
            return step(init_finetune_state(head, optimizer), nnx.State({}), features, labels)

        expected = after(features, labels, 1)
        filled = np.concatenate([features, rng.normal(size=(1, 5))]), np.append(labels, np.int32(-1))
        for parts in (1, 2, 8):
            found = after(*filled, parts)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, expected)
        with pytest.raises(ValueError, match="accumulation_steps=3 does not divide the batch of 8"):
            after(*filled, 3)
