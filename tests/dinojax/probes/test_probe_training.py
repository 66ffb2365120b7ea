"""Linear probe, MLP and the sweep against PyTorch in float64: the same start, the same minibatches, every step."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dinojax import UserError
from dinojax import probes as probe
from dinojax.probes import linear as linear_probe
from dinojax.probes import sweep as linear_sweep

IMAGES, DIM, CLASSES, BATCH, STEPS = 330, 12, 5, 16, 20
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def clusters():
    """Features of five overlapping clusters, and labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, IMAGES)
    features = 0.5 * rng.standard_normal((CLASSES, DIM))[labels] + rng.standard_normal((IMAGES, DIM))
    return features * np.logspace(-1, 1, DIM) + 2, labels


def torch_steps(model, optimizer, features, labels, batches, rates=None):
    """Trains `model`; yields its parameters after every step."""
    features, labels = torch.from_numpy(np.array(features)), torch.from_numpy(np.array(labels))
    for number, batch in enumerate(np.array(batches)):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[number]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(features[batch]), labels[batch]).backward()
        optimizer.step()
        yield [parameter.detach().numpy().copy() for parameter in model.parameters()]


def torch_linear(kernel, bias):
    layer = torch.nn.Linear(*kernel.shape, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.array(kernel).T))
        layer.bias.copy_(torch.from_numpy(np.array(bias)))
    return layer


def torch_mlp(head):
    layers = torch_linear(head.hidden_kernel, head.hidden_bias), torch_linear(head.kernel, head.bias)
    return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])


def cosine(rate, steps):
    return [rate * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


def test_mlp_steps_equal_pytorch(clusters):
    features, labels = clusters
    head = probe.initial_mlp(jax.random.key(0), DIM, 7, CLASSES)
    optimizer = linear_probe.make_optimizer(1e-3)
    state = optimizer.init(head)
    model = torch_mlp(head)
    batches = linear_probe.minibatches(jax.random.key(1), IMAGES, BATCH, STEPS)
    reference = torch_steps(model, torch.optim.Adam(model.parameters(), lr=1e-3), features, labels, batches)
    step = jax.jit(lambda *args: linear_probe.train_steps(*args, optimizer))
    for batch, expected in zip(batches, reference, strict=True):
        head, state = step(head, state, jnp.asarray(features), jnp.asarray(labels), batch[None])
        for ours, theirs in zip((head.hidden_kernel.T, head.hidden_bias, head.kernel.T, head.bias), expected):
            np.testing.assert_allclose(ours, theirs, **EXACT)


@pytest.mark.parametrize("shuffle", [False, True])
def test_fit_mlp_is_those_steps_and_restores_the_best_epoch(clusters, shuffle):
    features, labels = clusters
    train, heldout = (features[:250], labels[:250]), (features[250:], labels[250:])
    initial = probe.initial_mlp(jax.random.key(3), DIM, 7, CLASSES)
    epochs, per_epoch = 6, 250 // BATCH
    options = {"num_classes": CLASSES, "key": jax.random.key(5), "epochs": epochs, "batch_size": BATCH}
    # A rate far too high makes the epochs differ, so that the last one is not the best.
    head, metrics, best = probe.fit_mlp(
        *train, *heldout, **options, learning_rate=0.3, shuffle=shuffle, initial=initial
    )
    if shuffle:
        order_key = jax.random.split(jax.random.key(5))[1]
        batches = linear_probe.minibatches(order_key, 250, BATCH, epochs * per_epoch)
        first = np.asarray(batches[:per_epoch]).ravel()
        assert len(set(first.tolist())) == len(first) and (np.diff(first) < 0).any()
    else:
        batches = np.tile(np.arange(per_epoch * BATCH), epochs).reshape(-1, BATCH)
    model = torch_mlp(initial)
    kept, accuracies, losses = [], [], []
    steps = torch_steps(model, torch.optim.Adam(model.parameters(), lr=0.3), *train, batches)
    for number, _ in enumerate(steps):
        if (number + 1) % per_epoch == 0:
            kept.append(copy.deepcopy(model))
            with torch.no_grad():
                logits, target = model(torch.from_numpy(heldout[0])), torch.from_numpy(heldout[1])
            accuracies.append((logits.argmax(1) == target).double().mean().item())
            losses.append(torch.nn.functional.cross_entropy(logits, target).item())
    np.testing.assert_allclose(metrics.heldout_accuracy, accuracies, atol=1e-6)  # a mean of booleans is float32
    np.testing.assert_allclose(metrics.heldout_loss, losses, rtol=1e-9)
    assert best == min(range(epochs), key=lambda epoch: (-accuracies[epoch], losses[epoch])) != epochs - 1
    with torch.no_grad():
        expected = kept[best](torch.from_numpy(heldout[0]))
    np.testing.assert_allclose(probe.mlp_logits(head, heldout[0]), expected, rtol=1e-8, atol=1e-8)


def test_mlp_starts_like_pytorchs_layers():
    head = probe.initial_mlp(jax.random.key(0), 400, 300, 200)
    for array, inputs in zip(head, (400, 400, 300, 300)):
        bound = 1 / np.sqrt(inputs)
        assert np.abs(array).max() <= bound
        assert np.abs(array).max() > 0.95 * bound
        assert abs(np.mean(array)) < 4 * bound / np.sqrt(3 * array.size)


def test_fit_linear_equals_pytorch_on_standardised_features(clusters):
    features, labels = clusters
    train, heldout = (features[:IMAGES], labels[:IMAGES]), (features[:40], labels[:40])
    key = jax.random.key(2)
    options = {"num_classes": CLASSES, "key": key, "epochs": 1, "batch_size": BATCH, "learning_rate": 0.05}
    head, metrics, _ = probe.fit_linear(*train, *heldout, **options)
    batches = linear_probe.minibatches(key, IMAGES, BATCH, STEPS)  # 330 images are 20 minibatches of 16
    standardised = (features - features.mean(axis=0)) / features.std(axis=0)
    model = torch_linear(np.zeros((DIM, CLASSES)), np.zeros(CLASSES))
    optimizer = torch.optim.Adam(model.parameters())
    list(torch_steps(model, optimizer, standardised, labels, batches, cosine(0.05, STEPS)))
    with torch.no_grad():
        expected = model(torch.from_numpy(standardised))
    np.testing.assert_allclose(probe.linear_logits(head, features), expected, **EXACT)
    loss = torch.nn.functional.cross_entropy(expected, torch.from_numpy(labels)).item()
    np.testing.assert_allclose(metrics.train_loss[0], loss, **EXACT)


def test_sgd_linear_equals_pytorch(clusters):
    features, labels = clusters
    key = jax.random.key(7)
    options = {"num_classes": CLASSES, "key": key, "learning_rate": 0.4, "batch_size": BATCH}
    head = probe.fit_sgd_linear(features, labels, steps=3 * STEPS, **options)
    init_key, order_key = jax.random.split(key)
    kernel = 0.01 * jax.random.normal(init_key, (DIM, CLASSES))
    model, rate = torch_linear(kernel, np.zeros(CLASSES)), 0.4 * BATCH / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    batches = linear_probe.minibatches(order_key, IMAGES, BATCH, 3 * STEPS)
    list(torch_steps(model, optimizer, features, labels, batches, cosine(rate, 3 * STEPS)))
    np.testing.assert_allclose(head.kernel.T, model.weight.detach(), **EXACT)
    np.testing.assert_allclose(head.bias, model.bias.detach(), **EXACT)


def test_52_heads_trained_together_are_those_trained_apart(clusters):
    labels = clusters[1]
    rng = np.random.default_rng(4)
    tokens = 0.4 * rng.standard_normal((CLASSES, 5, 6))[labels] + rng.standard_normal((IMAGES, 5, 6))
    train, heldout = (tokens[:250], labels[:250]), (tokens[250:], labels[250:])
    options = {"num_classes": CLASSES, "key": jax.random.key(1), "steps": 40, "batch_size": 32}
    found = probe.fit_linear_sweep(*train, *heldout, **options)
    assert len(set(found.settings)) == 52
    losses, accuracies, heads = [], [], []
    for settings in found.settings:
        first = 4 - settings.blocks  # CLS tokens stand in places 0 to 3, the mean patch in place 4
        inputs = tokens[:, first : 5 if settings.mean_patch else 4].reshape(IMAGES, -1)
        np.testing.assert_array_equal(probe.sweep_inputs(tokens, settings), inputs)
        head = probe.fit_sgd_linear(inputs[:250], train[1], learning_rate=settings.learning_rate, **options)
        logits = torch.from_numpy(inputs[250:] @ np.array(head.kernel) + np.array(head.bias))
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(heldout[1])).item())
        accuracies.append(np.mean(logits.argmax(1).numpy() == heldout[1]))
        heads.append(head)
    np.testing.assert_allclose(found.heldout_loss, losses, **EXACT)
    np.testing.assert_allclose(found.heldout_accuracy, accuracies, atol=1e-6)  # a mean of booleans is float32
    assert found.best == min(range(52), key=lambda head: (-accuracies[head], losses[head]))
    np.testing.assert_allclose(found.head.kernel, heads[found.best].kernel, **EXACT)
    np.testing.assert_allclose(found.head.bias, heads[found.best].bias, **EXACT)


def test_a_model_of_one_block_has_each_input_once():
    rng = np.random.default_rng(0)
    tokens, labels = rng.standard_normal((40, 2, 3)), np.arange(40) % 2
    options = {"num_classes": 2, "key": jax.random.key(0), "learning_rates": (0.1, 0.2), "steps": 3}
    found = probe.fit_linear_sweep(tokens, labels, tokens, labels, **options)
    inputs = [(1, False), (1, False), (1, True), (1, True)]
    assert [(settings.blocks, settings.mean_patch) for settings in found.settings] == inputs


@pytest.mark.parametrize("fit", [probe.fit_linear, probe.fit_mlp, probe.fit_linear_sweep])
def test_what_nothing_can_be_learned_from_is_refused(clusters, fit):
    features, labels = clusters
    features = features.reshape(IMAGES, 3, 4) if fit is probe.fit_linear_sweep else features
    heldout = features[:30], labels[:30]
    options = {"num_classes": CLASSES, "key": jax.random.key(0)}
    with pytest.raises(UserError, match="all 330 training images are of class 1"):
        fit(features, np.ones_like(labels), *heldout, **options)
    with pytest.raises(UserError, match="label -1 of image 0 is not between 0 and 4"):
        fit(features, labels, heldout[0], np.full(30, -1), **options)
    with pytest.raises(UserError, match="there are 0 images"):
        fit(features, labels, features[:0], labels[:0], **options)
    broken = features.copy()
    broken[8] = np.inf
    with pytest.raises(UserError, match=r"image 8 are not finite \(inf\)"):
        fit(features, labels, broken[:30], labels[:30], **options)
    with pytest.raises(UserError, match=r"image 8 are not finite \(inf\)"):
        fit(broken, labels, *heldout, **options)
    name = "steps" if fit is probe.fit_linear_sweep else "epochs"
    with pytest.raises(UserError, match=f"{name}=0 is not a positive number"):
        fit(features, labels, *heldout, **options, **{name: 0})


def test_inputs_that_the_features_do_not_hold_are_refused():
    settings = linear_sweep.SweepSettings(0.1, blocks=5, mean_patch=False)
    with pytest.raises(UserError, match="blocks=5 is not between 1 and the 4 blocks"):
        probe.sweep_inputs(np.zeros((2, 5, 3)), settings)
