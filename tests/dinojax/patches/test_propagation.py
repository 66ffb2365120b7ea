"""Label propagation against plain loops in float64, and its maps of pixels against PyTorch."""

import jax
import numpy as np
import pytest
import torch

from dinojax import UserError, patches
from dinojax.patches import propagation


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def propagated(features, context, labels, radius, top_k, temperature=0.1):
    """Upstream's rule, patch by patch."""
    rows, columns, _ = features.shape
    found = np.zeros((rows, columns, labels.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            weights, sources = [], []
            for frame, known in zip(context, labels):
                for p in range(rows):
                    for q in range(columns):
                        if not radius or max(abs(i - p), abs(j - q)) <= radius:
                            weights.append(np.exp(unit(features[i, j]) @ unit(frame[p, q]) / temperature))
                            sources.append(known[p, q])
            threshold = sorted(weights)[-top_k]
            kept = [(weight, source) for weight, source in zip(weights, sources) if weight >= threshold]
            found[i, j] = sum(weight * source for weight, source in kept) / sum(weight for weight, _ in kept)
    return found


@pytest.mark.parametrize(("rows", "columns", "radius", "top_k"), [(5, 6, 2, 5), (19, 18, 3, 4), (4, 7, 0, 3)])
def test_labels_of_a_frame_are_those_of_loops(rows, columns, radius, top_k, monkeypatch):
    """Also where a frame is cut into blocks, and where groups stand for their values."""
    monkeypatch.setattr(propagation, "_SIDE", 8)
    monkeypatch.setattr(propagation, "_GROUP", 8)
    features, context = random(rows, columns, 5), random(3, rows, columns, 5, seed=1)
    labels = np.random.default_rng(2).random((3, rows, columns, 2))
    with jax.enable_x64(True):
        propagation._propagate.clear_cache()
        found = patches.propagate_labels(features, context, labels, radius=radius, top_k=top_k)
    expected = propagated(features, context, labels, radius, top_k)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    propagation._propagate.clear_cache()


@pytest.mark.parametrize("group", [2, 64])
def test_ties_with_the_last_of_the_top_k_count(group, monkeypatch):
    """Two frames are equal, so that each weight occurs twice and the third largest ties with the fourth."""
    monkeypatch.setattr(propagation, "_GROUP", group)
    features, frame = random(4, 5, 6), random(1, 4, 5, 6, seed=1)
    labels = np.random.default_rng(2).random((2, 4, 5, 3))
    context = np.concatenate([frame, frame])
    with jax.enable_x64(True):
        propagation._propagate.clear_cache()
        odd, even = (patches.propagate_labels(features, context, labels, radius=9, top_k=k) for k in (3, 4))
    np.testing.assert_allclose(odd, even, rtol=0, atol=1e-14)
    np.testing.assert_allclose(odd, propagated(features, context, labels, 9, 3), rtol=0, atol=1e-13)
    propagation._propagate.clear_cache()


@pytest.mark.parametrize("last_frames", [0, 2])
def test_a_video_keeps_its_first_frame_and_the_last_ones(last_frames):
    frames, first = random(6, 4, 5, 6), np.eye(3)[np.random.default_rng(1).integers(0, 3, (4, 5))]
    settings = {"radius": 2, "top_k": 3}
    with jax.enable_x64(True):
        found = [
            np.asarray(x) for x in patches.propagate_video(iter(frames), first, last_frames=last_frames, **settings)
        ]
    known = [first]
    for number in range(1, 6):
        before = [0, *range(max(1, number - last_frames), number)]
        labels = propagated(frames[number], frames[before], np.stack([known[b] for b in before]), **settings)
        known.append(labels)
        np.testing.assert_allclose(found[number - 1], labels, rtol=0, atol=1e-12)
    assert len(found) == 5


def test_float32_is_close_to_float64():
    features, context = random(9, 9, 16), random(2, 9, 9, 16, seed=1)
    labels = np.random.default_rng(2).random((2, 9, 9, 2))
    found = patches.propagate_labels(*(x.astype(np.float32) for x in (features, context, labels)), radius=3)
    np.testing.assert_allclose(found, propagated(features, context, labels, 3, 5), atol=3e-6)


def test_maps_of_pixels_are_those_of_pytorch():
    """Bilinear, each label scaled to 0–1, the largest taken; a label that is nowhere stays 0."""
    labels = np.random.default_rng(0).random((5, 7, 4)).astype(np.float32)
    labels[..., 3] = 0
    large = torch.nn.functional.interpolate(
        torch.from_numpy(labels.transpose(2, 0, 1).copy())[None], scale_factor=6, mode="bilinear", align_corners=False
    )[0]
    least, most = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    scaled = torch.where(most > 0, (large - least) / (most - least), 0)
    best = scaled.sort(dim=0).values
    clear = (best[-1] - best[-2] > 1e-5).numpy()
    found = patches.index_map(labels, 30, 42)
    assert clear.mean() > 0.99 and set(np.unique(found)) == {0, 1, 2}
    np.testing.assert_array_equal(found[clear], scaled.argmax(0).numpy()[clear])


def test_a_mask_becomes_one_hot_labels():
    mask = np.repeat(np.repeat(np.array([[0, 2], [1, 0], [0, 0]], np.uint8), 4, 0), 4, 1)
    labels = patches.one_hot_labels(mask, 3, 2)
    np.testing.assert_array_equal(labels.argmax(-1), [[0, 2], [1, 0], [0, 0]])
    assert labels.shape == (3, 2, 3) and (labels.sum(-1) == 1).all()
    assert patches.one_hot_labels(mask, 3, 2, 5).shape == (3, 2, 5)


def test_settings_that_no_propagation_has_are_refused():
    arrays = random(3, 3, 4), random(1, 3, 3, 4), random(1, 3, 3, 2)
    with pytest.raises(UserError, match=r"top_k=10 is not between 1 and the 9 patches of a frame"):
        patches.propagate_labels(*arrays, top_k=10)
    with pytest.raises(UserError, match=r"radius=-1 is not 0 or more"):
        patches.propagate_labels(*arrays, radius=-1)
    with pytest.raises(UserError, match=r"temperature=0 is not a positive number"):
        patches.propagate_labels(*arrays, temperature=0)
