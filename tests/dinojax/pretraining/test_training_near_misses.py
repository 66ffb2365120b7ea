"""The mistakes that DINO trainers made, planted one at a time: the official trajectories expose each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dinojax.models import head, layers
from dinojax.pretraining import losses, optim, step
from tests.support.reference_files import BUNDLED, read
from tests.support.training_parity import CLIPPING, PLAIN, differences, ill_conditioned, too_large, train

pytestmark = pytest.mark.near_miss


def global_norm_clipping(patch):
    patch.setattr(optim, "clip_by_tensor_norm", optax.clip_by_global_norm)


def no_clipping(patch):
    patch.setattr(optim, "clip_by_tensor_norm", lambda max_norm: optax.identity())


def freeze_by_zero_gradient(patch):
    """Decay, moments and step count still run."""

    def zero_gradients(inner, should_transform):
        def init(params):
            return jnp.zeros([], jnp.int32), inner.init(params)

        def update(updates, state, params=None):
            step, inner_state = state
            updates = jax.tree.map(lambda x: jnp.where(should_transform(step), x, 0), updates)
            updates, inner_state = inner.update(updates, inner_state, params)
            return updates, (step + 1, inner_state)

        return optax.GradientTransformation(init, update)

    patch.setattr(optax, "conditionally_mask", zero_gradients)


def shared_step_count(patch):
    """The last layer's bias correction starts with the training instead of with its thaw."""
    scale_by_adam = optax.scale_by_adam

    def counting(**kwargs):
        adam = scale_by_adam(**kwargs)

        def init(params):
            return adam.init(params)._replace(count=jnp.asarray(delays.pop(0), jnp.int32))

        return optax.GradientTransformation(init, adam.update)

    delays = [0, 3]
    patch.setattr(optax, "scale_by_adam", counting)


def no_freeze(patch):
    patch.setattr(optax, "conditionally_mask", lambda inner, should_transform: inner)


def decay_on_everything(patch):
    patch.setattr(optim, "is_decayed", lambda params: jax.tree.map(lambda _: True, params))


def embeddings_exempt_from_decay(patch):
    original = optim.is_decayed

    def exempt(params):
        exempt_names = {"pos_embed", "cls_token"}
        return jax.tree_util.tree_map_with_path(
            lambda path, decayed: decayed and not exempt_names & set(optim.names_of(path)),
            original(params),
        )

    patch.setattr(optim, "is_decayed", exempt)


def center_before_use(patch):
    original = step.teacher_probs

    def eager(logits, center, temperature):
        return original(logits, losses.updated_center(center, logits), temperature)

    patch.setattr(step, "teacher_probs", eager)


def momentum_one_step_late(patch):
    original = step.make_train_step

    def late(*args, teacher_momentum, **kwargs):
        return original(*args, teacher_momentum=lambda step: teacher_momentum(jnp.maximum(step - 1, 0)), **kwargs)

    patch.setattr("tests.support.training_parity.make_train_step", late)


def tanh_gelu(patch):
    for module in (layers, head):
        patch.setattr(module, "gelu", lambda x: jax.nn.gelu(x, approximate=True))


# slow: compiles a step for each mistake; those without the mark show that every kind of number is compared
SLOW = [
    global_norm_clipping,
    no_clipping,
    shared_step_count,
    no_freeze,
    decay_on_everything,
    embeddings_exempt_from_decay,
    momentum_one_step_late,
]
MISTAKES = [
    freeze_by_zero_gradient,
    center_before_use,
    tanh_gelu,
    *(pytest.param(mistake, marks=pytest.mark.slow) for mistake in SLOW),
]


# slow: compiles every mistake again for a second run; the run with clipping alone shows each of them
@pytest.mark.parametrize("name", [pytest.param(PLAIN, marks=pytest.mark.slow), CLIPPING])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_mistake_shows(monkeypatch, mistake, name):
    reference = read(name, BUNDLED)
    left_out = ill_conditioned(name)  # of the code without the mistake
    mistake(monkeypatch)
    assert too_large(differences(reference, train(reference, np.float32), left_out))
