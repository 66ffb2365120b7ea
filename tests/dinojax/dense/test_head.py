"""A step of the dense head against PyTorch: batch normalisation, 1×1 convolution, interpolation, both losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from dinojax.dense import (
    VOID,
    DenseHead,
    HeadParameters,
    Statistics,
    bin_depth,
    dense_scores,
    depth_loss,
    fold,
    head_optimizer,
    init_head_state,
    make_head_step,
    resize_bilinear,
    segmentation_loss,
    train_scores,
)

WIDTH, CLASSES = 6, 4


class TorchHead(torch.nn.Module):
    def __init__(self, parameters):
        super().__init__()
        outputs = parameters.kernel.shape[1]
        self.norm, self.linear = torch.nn.BatchNorm2d(WIDTH), torch.nn.Conv2d(WIDTH, outputs, 1)
        self.double()
        with torch.no_grad():
            self.norm.weight[:], self.norm.bias[:] = tensors(parameters.scale, parameters.shift)
            self.linear.weight[:, :, 0, 0], self.linear.bias[:] = tensors(parameters.kernel.T, parameters.bias)

    def forward(self, patches):
        return self.linear(self.norm(patches.permute(0, 3, 1, 2)))


def tensors(*arrays):
    return [torch.from_numpy(np.array(array)) for array in arrays]


def head(rng, outputs=CLASSES):
    shapes = ((WIDTH,), (WIDTH,), (WIDTH, outputs), (outputs,))
    return HeadParameters(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes))


@pytest.mark.parametrize("size", [(13, 9), (40, 7), (3, 4)])
def test_resizing_is_that_of_pytorch(size):
    """Also where it makes maps smaller."""
    with jax.enable_x64(True):
        maps = np.random.default_rng(0).normal(size=(2, 5, 4, 3))
        truth = interpolate(tensors(maps)[0].permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(
            resize_bilinear(jnp.asarray(maps), *size), truth.permute(0, 2, 3, 1), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("size", [(21, 10), (64, 48), (8, 8)])
@pytest.mark.parametrize("strip", [2**17, 100])
def test_cross_entropy_and_its_gradient_are_those_of_pytorch(monkeypatch, size, strip):
    """Whatever the number of strips; one image has no label at all, and void pixels count nowhere."""
    monkeypatch.setattr("dinojax.dense.losses._STRIP", strip)
    rng = np.random.default_rng(0)
    masks = rng.integers(0, CLASSES, (3, *size)).astype(np.uint8)
    masks[rng.random(masks.shape) < 0.3] = VOID
    masks[1] = VOID
    with jax.enable_x64(True):
        scores = 3 * rng.normal(size=(3, 5, 4, CLASSES))
        ours, gradient = jax.value_and_grad(lambda x: 2 * segmentation_loss(x, jnp.asarray(masks)))(jnp.asarray(scores))
        theirs = tensors(scores)[0].requires_grad_()
        pixels = interpolate(theirs.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
        loss = 2 * cross_entropy(pixels, torch.from_numpy(masks).long(), ignore_index=VOID)
        loss.backward()
        np.testing.assert_allclose(ours, loss.item(), rtol=1e-13)
        np.testing.assert_allclose(gradient, theirs.grad, rtol=0, atol=1e-14)


def test_masks_that_are_void_altogether_give_neither_loss_nor_gradient():
    masks = jnp.full((1, 8, 8), VOID, jnp.uint8)
    loss, gradient = jax.value_and_grad(segmentation_loss)(jnp.ones((1, 2, 2, 3)), masks)
    assert loss == 0 and not gradient.any()


def test_depth_and_its_loss_are_those_of_the_formulas_in_pytorch():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.5, 9, (2, 12, 10))
    truth[rng.random(truth.shape) < 0.3] = 0
    with jax.enable_x64(True):
        scores = rng.normal(size=(2, 4, 5, 7))
        ours, gradient = jax.value_and_grad(lambda x: depth_loss(bin_depth(x, 0.1, 10.0), jnp.asarray(truth)))(
            jnp.asarray(scores)
        )
        theirs, target = tensors(scores, truth)
        theirs.requires_grad_()
        weights = torch.relu(theirs) + 0.1
        depth = (weights / weights.sum(-1, keepdim=True)) @ torch.linspace(0.1, 10, 7, dtype=torch.float64)
        depth = interpolate(depth[:, None], size=(12, 10), mode="bilinear", align_corners=False)[:, 0]
        gap = torch.log(depth[target > 0] + 1e-3) - torch.log(target[target > 0] + 1e-3)
        loss = torch.sqrt(gap.var() + 0.15 * gap.mean() ** 2)
        loss.backward()
        np.testing.assert_allclose(ours, loss.item(), rtol=1e-12)
        np.testing.assert_allclose(gradient, theirs.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("measured", [0, 1])
def test_depth_that_was_hardly_measured_gives_a_finite_gradient(measured):
    truth = jnp.zeros((1, 4, 4)).at[0, 0, :measured].set(2.0)
    loss, gradient = jax.value_and_grad(depth_loss)(jnp.full((1, 2, 2), 1.5), truth)
    assert loss == 0 and not gradient.any()


def test_training_steps_are_those_of_pytorch():
    """Three steps of AdamW, with the running statistics; then the folded head on new patches."""
    rng = np.random.default_rng(0)
    patches, masks = rng.normal(2, 3, (3, 4, 5, 4, WIDTH)), rng.integers(0, CLASSES, (3, 4, 10, 8)).astype(np.uint8)
    with jax.enable_x64(True):
        parameters = head(rng)
        theirs = TorchHead(parameters)
        torch_optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=1e-4)
        optimizer = optax.adamw(0.01, weight_decay=1e-4)
        state = init_head_state(jax.random.key(0), WIDTH, CLASSES, optimizer)
        state = state._replace(parameters=parameters)
        step = make_head_step(segmentation_loss, optimizer)
        for x, y in zip(patches, masks):
            state, loss = step(state, jnp.asarray(x), jnp.asarray(y))
            torch_optimizer.zero_grad()
            pixels = interpolate(theirs(tensors(x)[0]), size=(10, 8), mode="bilinear", align_corners=False)
            truth = cross_entropy(pixels, torch.from_numpy(y).long())
            truth.backward()
            torch_optimizer.step()
            np.testing.assert_allclose(loss, truth.item(), rtol=1e-12)
        np.testing.assert_allclose(state.statistics.mean, theirs.norm.running_mean, rtol=1e-12)
        np.testing.assert_allclose(state.statistics.variance, theirs.norm.running_var, rtol=1e-12)
        theirs.eval()
        new = rng.normal(2, 3, (1, 3, 3, WIDTH))
        truth = theirs(tensors(new)[0]).permute(0, 2, 3, 1).detach()
        found = dense_scores(fold(state.parameters, state.statistics), new)
        np.testing.assert_allclose(found, truth, rtol=0, atol=1e-10)


def test_a_batch_of_one_patch_leaves_the_running_statistics():
    rng = np.random.default_rng(0)
    before = Statistics(jnp.zeros(WIDTH), jnp.ones(WIDTH))
    parameters = HeadParameters(*(jnp.asarray(array, jnp.float32) for array in head(rng)))
    scores, after = train_scores(parameters, before, jnp.ones((1, 1, 1, WIDTH)))
    assert after is before and np.isfinite(scores).all()


def test_half_precision_patches_are_multiplied_in_float32():
    patches = np.float16(np.random.default_rng(0).normal(size=(2, 3, WIDTH)))
    kernel, bias = np.random.default_rng(1).normal(size=(WIDTH, 2)).astype(np.float32), np.ones(2, np.float32)
    scores = dense_scores(DenseHead(kernel, bias), patches)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, patches.astype(np.float64) @ kernel + 1, rtol=0, atol=1e-5)


def test_the_learning_rate_rises_and_falls_to_zero():
    """AdamW moves a parameter by the learning rate in its first steps, while the gradient stays the same."""
    with jax.enable_x64(True):
        optimizer = head_optimizer(1.0, 8, warmup_steps=2, weight_decay=0.0)
        value, moved = jnp.zeros(()), []
        state = optimizer.init(value)
        for _ in range(9):
            update, state = optimizer.update(jnp.ones(()), state, value)
            moved.append(-float(update))
    np.testing.assert_allclose(moved, [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], rtol=0, atol=1e-7)
