"""The DINO head equals the official one: logits and gradients, frozen and trained prototype lengths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from converters import head_from_torch
from dinojax import DINOHead, UserError
from dinojax.models import head
from dinojax.models.files import named_parameters
from tests.support.reference_files import BUNDLED, names, read

CASES = [(name, case) for name in names("dino_v1_head*") for case in read(name).config["heads"]]


def settings(reference, case) -> dict:
    known = ("in_dim", "out_dim", "hidden_dim", "bottleneck_dim", "nlayers", "norm_last_layer")
    config = reference.config["heads"][case]
    assert not config["use_bn"]
    return {key: config[key] for key in known if key in config}


def logits_and_gradients(head, features, cotangent):
    def total(head, features):
        logits = head(features)
        return jnp.sum(logits * cotangent), logits

    (_, logits), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(head, features)
    return logits, gradients


def official_gradients(gradients) -> dict[str, np.ndarray]:
    """Under official names and in torch's layout."""
    named = {path.replace("kernel", "weight"): np.asarray(array) for path, array in named_parameters(gradients).items()}
    return {name: array.T if name.startswith("mlp") else array for name, array in named.items()}


def check(reference, case, dtype):
    state = {name: array.astype(dtype) for name, array in reference.group(f"state/{case}").items()}
    expected_head = nnx.eval_shape(lambda: DINOHead(**settings(reference, case), rngs=nnx.Rngs(0)))
    head = head_from_torch(state, norm_last_layer=settings(reference, case)["norm_last_layer"])
    assert jax.tree.map(jnp.shape, nnx.state(head)) == jax.tree.map(jnp.shape, nnx.state(expected_head))
    inputs = {name: jnp.asarray(array, dtype) for name, array in reference.group(f"in/{case}").items()}
    logits, (head_gradients, feature_gradients) = logits_and_gradients(head, **inputs)
    expected = reference.group(f"out/{case}")
    tight = dtype == np.float64
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-6 if tight else 3e-5)
    found = {f"grad/{name}": array for name, array in official_gradients(head_gradients).items()}
    found["grad_features"] = np.asarray(feature_gradients)
    gradients = {name: array for name, array in expected.items() if name.startswith("grad")}
    for name, array in gradients.items():
        scale = np.abs(array).max()
        # What storing the reference in float32 leaves; in float32 its README's bound.
        atol = 1e-7 * scale + 1e-12 if tight else 1e-5 * scale + 1e-6
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol, err_msg=name)
    for name in set(found) - set(gradients):  # upstream has no gradient where the lengths are frozen
        assert not found[name].any(), name


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_and_gradients_equal_the_official_ones(name, case, dtype):
    with jax.enable_x64(dtype == np.float64):
        check(read(name), case, dtype)


@pytest.mark.reference
@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("prefix", ["", "head.", "teacher.head.", "dino_head.", "teacher.dino_head."])
def test_the_converter_infers_the_architecture_under_every_prefix(name, case, prefix):
    reference = read(name)
    state = {f"{prefix}{key}": array for key, array in reference.group(f"state/{case}").items()}
    if prefix.endswith("head."):
        state["teacher.backbone.norm.bias" if prefix.startswith("teacher") else "backbone.norm.bias"] = np.zeros(3)
    logits = head_from_torch(state)(reference.arrays[f"in/{case}/features"])
    np.testing.assert_allclose(logits, reference.arrays[f"out/{case}/logits"], rtol=0, atol=3e-5)


@pytest.mark.parametrize("nlayers", [1, 2, 3, 4])
def test_heads_of_one_to_four_layers_carry_torch_names(nlayers):
    torch = pytest.importorskip("torch")
    widths = [12] + [10] * (nlayers - 1) + [6]
    layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    mlp = torch.nn.Sequential(*[module for layer in layers for module in (layer, torch.nn.GELU())][:-1])
    state = {f"mlp.{name}": value for name, value in mlp.state_dict().items()}
    if nlayers == 1:
        state = {f"mlp.{name}": value for name, value in layers[0].state_dict().items()}
    directions = torch.nn.functional.normalize(torch.randn(20, 6), dim=-1)
    state |= {"last_layer.weight_v": 3 * directions, "last_layer.weight_g": torch.ones(20, 1)}
    features = torch.randn(5, 12)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(mlp(features), dim=-1) @ directions.T
    np.testing.assert_allclose(head_from_torch(state)(features.numpy()), expected, rtol=0, atol=1e-6)


def test_a_zero_bottleneck_has_finite_gradients():
    gradient = jax.grad(lambda x: head._unit_length(x).sum())(jnp.zeros((2, 4)))
    assert np.isfinite(gradient).all()


def test_every_misfit_of_a_head_is_named():
    state = read("dino_v1_head", BUNDLED).group("state/norm_last_layer_true")
    state["mlp.2.bias"] = state["mlp.2.bias"][:-1]
    state["mlp.9.bias"] = state.pop("mlp.4.bias")
    with pytest.raises(UserError, match=r"missing mlp\.4\.bias .*extra mlp\.9\.bias .*misshapen mlp\.2\.bias"):
        head_from_torch(state)


@pytest.mark.near_miss
@pytest.mark.parametrize("case", ["norm_last_layer_true", "norm_last_layer_false"])
def test_a_tanh_gelu_shows(monkeypatch, case):
    monkeypatch.setattr(head, "gelu", lambda x: jax.nn.gelu(x, approximate=True))
    with pytest.raises(AssertionError):
        check(read("dino_v1_head", BUNDLED), case, np.float32)
