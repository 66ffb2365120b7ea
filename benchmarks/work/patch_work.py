"""The tasks on patches that `benchmarks.patches` times: a straightforward PyTorch version of each, and ours.

Both take the same random features, whose similarities are spread like those of real ones (clusters and noise).
"""

from typing import Any

import numpy as np

from benchmarks.work.paired import Prepared, warmed_up
from benchmarks.work.torch_cpu import use_all_cores

DIM = 384
GRID = (30, 54)  # patches of 16 px in a frame of DAVIS at 480p
SQUARE = (37, 37)  # patches of 14 px at 518 px
CONTEXT, LABELS, RADIUS, TOP_K, TEMPERATURE = 8, 3, 12, 5, 0.1
BANK, CORESET, QUERIES = 20_000, 500, 37 * 37
TAU, EDGE, EXPANSION = 0.2, 1e-5, 100


def features(*shape: int, seed: int) -> np.ndarray:
    """Random features "… dim": one of 32 clusters, and noise."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((32, DIM))
    found = centres[rng.integers(0, 32, shape)] + 1.2 * rng.standard_normal((*shape, DIM))
    return found.astype(np.float32)


def inputs(row: str) -> tuple[np.ndarray, ...]:
    """The arrays of a task."""
    if row == "match":
        return features(QUERIES, seed=1), features(QUERIES, seed=2)
    if row == "propagate":
        labels = np.eye(LABELS, dtype=np.float32)[np.random.default_rng(3).integers(0, LABELS, (CONTEXT, *GRID))]
        return features(*GRID, seed=1), features(CONTEXT, *GRID, seed=2), labels
    if row in ("lost", "token_cut"):
        return (features(*SQUARE, seed=1),)
    if row == "coreset":
        return (features(BANK, seed=1),)
    return features(*SQUARE, seed=1), features(BANK, seed=2)


def prepare_jax(row: str) -> Prepared:
    """Our side: the functions of `dinojax.patches` as a user calls them, on arrays of numpy."""
    from dinojax import patches

    arrays = inputs(row)
    calls = {
        "match": lambda: patches.mutual_matches(*arrays),
        "propagate": lambda: np.asarray(patches.propagate_labels(*arrays, radius=RADIUS, top_k=TOP_K)),
        "lost": lambda: patches.lost(*arrays, expansion=EXPANSION),
        "token_cut": lambda: patches.token_cut(*arrays, tau=TAU, edge=EDGE),
        "coreset": lambda: patches.coreset(*arrays, CORESET),
        "distances": lambda: patches.patch_distances(*arrays),
    }
    return _prepared(row, calls[row])


def prepare_torch(row: str) -> Prepared:
    """PyTorch's side, written as the papers' code does it: whole matrices of similarities."""
    import torch

    use_all_cores()
    tensors = [torch.from_numpy(array) for array in inputs(row)]
    call = torch.inference_mode()(_TORCH[row])
    return _prepared(row, lambda: call(*tensors))


def _prepared(row: str, call) -> Prepared:
    prepared = warmed_up(call)
    prepared.info["result"] = summary(row, call())
    return prepared


def summary(row: str, result: Any) -> Any:
    """The result of a task as JSON, to compare the two sides."""
    if row == "match":
        return sorted(zip(np.asarray(result[0]).tolist(), np.asarray(result[1]).tolist()))
    if row in ("lost", "token_cut"):
        return [np.asarray(result[0]).astype(int).ravel().tolist()]
    return np.asarray(result).ravel().tolist()


def _match(first, second):
    import torch

    similarity = torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(second, dim=1).T
    forward, backward = similarity.argmax(dim=1), similarity.argmax(dim=0)
    indices = torch.arange(len(first))
    mutual = backward[forward] == indices
    return indices[mutual], forward[mutual], similarity[indices[mutual], forward[mutual]]


def _propagate(target, context, labels):
    import torch

    rows, columns, dim = target.shape
    target = torch.nn.functional.normalize(target.reshape(-1, dim), dim=1)
    sources = torch.nn.functional.normalize(context.reshape(len(context), -1, dim), dim=2)
    affinity = torch.exp(sources @ target.T / TEMPERATURE)  # frames, sources, targets
    affinity = (affinity * _neighbourhood(rows, columns)[None]).reshape(-1, rows * columns)
    threshold = affinity.topk(TOP_K, dim=0).values.min(dim=0).values
    affinity[affinity < threshold] = 0
    affinity = affinity / affinity.sum(dim=0, keepdim=True)
    return (labels.reshape(-1, labels.shape[-1]).T @ affinity).T.reshape(rows, columns, -1)


_masks: dict[tuple[int, int], Any] = {}


def _neighbourhood(rows: int, columns: int):
    """As upstream, computed for the first frame and kept."""
    import torch

    if (rows, columns) not in _masks:
        row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
        near = [(place[:, None] - place[None]).abs() <= RADIUS for place in (row, column)]
        _masks[rows, columns] = (near[0] & near[1]).float()
    return _masks[rows, columns]


def _lost(features):
    import scipy.ndimage
    import torch

    rows, columns, dim = features.shape
    flat = features.reshape(-1, dim)
    products = flat @ flat.T
    others = products.clone()
    others.fill_diagonal_(0)
    order = torch.argsort((others > 0).sum(dim=1), stable=True)
    candidates = order[:EXPANSION]
    like = candidates[products[order[0], candidates] > 0]
    score = products[like].sum(dim=0).reshape(rows, columns).numpy()
    parts = scipy.ndimage.label(score > 0)[0]
    return (parts == parts[np.unravel_index(int(order[0]), parts.shape)],)


def _token_cut(features):
    import scipy.ndimage
    import torch

    rows, columns, dim = features.shape
    flat = torch.nn.functional.normalize(features.reshape(-1, dim), dim=1)
    weights = torch.where(flat @ flat.T > TAU, 1.0, EDGE).double()
    root = weights.sum(dim=1).sqrt()
    laplacian = torch.eye(len(weights), dtype=torch.float64) - weights / root[:, None] / root[None]
    vector = (torch.linalg.eigh(laplacian).eigenvectors[:, 1] / root).numpy()
    seed = int(np.argmax(np.abs(vector) > (1 - 1e-6) * np.abs(vector).max()))
    inside = vector > vector.mean()
    parts = scipy.ndimage.label((inside == inside[seed]).reshape(rows, columns))[0]
    return (parts == parts[np.unravel_index(seed, parts.shape)],)


def _coreset(features):
    import torch

    features = torch.nn.functional.normalize(features, dim=1)
    chosen = torch.zeros(CORESET, dtype=torch.long)
    distance = 1 - features @ features[0]
    for number in range(1, CORESET):
        chosen[number] = index = distance.argmax()
        distance = torch.minimum(distance, 1 - features @ features[index])
    return chosen


def _distances(features, bank):
    import torch

    queries = torch.nn.functional.normalize(features.reshape(-1, features.shape[-1]), dim=1)
    similarity = queries @ torch.nn.functional.normalize(bank, dim=1).T
    return (1 - similarity.max(dim=1).values).reshape(features.shape[:2])


_TORCH = {
    "match": _match,
    "propagate": _propagate,
    "lost": _lost,
    "token_cut": _token_cut,
    "coreset": _coreset,
    "distances": _distances,
}
