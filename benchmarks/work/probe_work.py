"""What `benchmarks.probes` compares: each job in dinojax, and the strongest PyTorch and scikit-learn we could write."""

from pathlib import Path
from typing import Any

from benchmarks.work.paired import Prepared, warmed_up
from benchmarks.work.torch_cpu import use_all_cores

TRAIN, TEST, DIM, TOKENS, CLASSES = 50_000, 10_000, 384, 5, 10
HELDOUT, BATCH, SWEEP_STEPS = 5_000, 128, 390  # steps: one epoch
K, KNN_TEST, TORCH_ROWS = 200, 1_000, 256


def _features(tokens: int = 1) -> tuple[Any, Any, Any]:
    """Training features [n, tokens, dim], test features, training labels: clusters that overlap."""
    import numpy as np

    rng = np.random.default_rng(0)
    centres = 0.1 * rng.standard_normal((CLASSES, tokens, DIM), np.float32)
    labels = rng.integers(0, CLASSES, TRAIN + TEST)
    features = centres[labels] + rng.standard_normal((TRAIN + TEST, tokens, DIM), np.float32)
    return features[:TRAIN], features[TRAIN:], labels[:TRAIN]


def _sweep_columns() -> tuple[tuple[int, int], ...]:
    """Where the four inputs of the sweep stand in a row of five tokens: last CLS, with mean patch, all CLS, all."""
    return (3 * DIM, 4 * DIM), (3 * DIM, 5 * DIM), (0, 4 * DIM), (0, 5 * DIM)


def prepare_jax(row: str, start: str) -> Prepared:
    """Our side; what the others need to begin from the same point goes to the file `start`."""

    return {"knn": _jax_knn, "mlp": _jax_mlp, "sweep": _jax_sweep}[row](Path(start))


def _jax_knn(start: Path) -> Prepared:
    from dinojax.probes.neighbours import nearest_neighbours

    train, test, _ = _features()
    train, test = train[:, 0], test[:KNN_TEST, 0]
    return _prepared(lambda: nearest_neighbours(train, test, K), lambda found: found[1])


def _jax_mlp(start: Path) -> Prepared:
    import jax
    import numpy as np

    from dinojax.probes.linear import fit_mlp, initial_mlp

    train, _, labels = _features()
    train, labels = jax.device_put(train[:, 0]), jax.device_put(labels)
    initial = initial_mlp(jax.random.key(0), DIM, 256, CLASSES)
    np.savez(start, **initial._asdict())
    options = {"num_classes": CLASSES, "key": jax.random.key(0), "epochs": 1, "initial": initial}
    heldout = train[:HELDOUT], labels[:HELDOUT]
    return _prepared(
        lambda: jax.block_until_ready(fit_mlp(train, labels, *heldout, **options)), lambda found: found[1].train_loss
    )


def _jax_sweep(start: Path) -> Prepared:
    import jax
    import numpy as np

    from dinojax.probes.linear import minibatches
    from dinojax.probes.sweep import SWEEP_LEARNING_RATES, evaluate_heads, train_heads

    train, _, labels = _features(TOKENS)
    train, labels = jax.device_put(train.reshape(TRAIN, -1)), jax.device_put(labels)
    rates, columns = jax.device_put(np.float32(SWEEP_LEARNING_RATES)), _sweep_columns()
    options = {"columns": columns, "num_classes": CLASSES}
    init_key, order_key = jax.random.split(jax.random.key(0))
    batches = minibatches(order_key, TRAIN, BATCH, SWEEP_STEPS)
    kernels = [0.01 * jax.random.normal(init_key, (stop - first, CLASSES)) for first, stop in columns]
    np.savez(start, batches=batches, **{f"kernel{i}": kernel for i, kernel in enumerate(kernels)})

    def run():
        heads = train_heads(train, labels, jax.random.key(0), rates, steps=SWEEP_STEPS, batch_size=BATCH, **options)
        return jax.block_until_ready(heads)

    return _prepared(run, lambda heads: evaluate_heads(heads, train[:HELDOUT], labels[:HELDOUT], **options)[0])


def prepare_torch(row: str, start: str) -> Prepared:
    """PyTorch's side."""
    import torch

    use_all_cores()
    device, begin = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Path(start)
    return {"knn": _torch_knn, "mlp": _torch_mlp, "sweep": _torch_sweep}[row](device, begin)


def _torch_knn(device: Any, start: Path) -> Prepared:
    import torch

    train, test, _ = (torch.from_numpy(array).to(device) for array in _features())

    @torch.inference_mode()
    def run():
        keys = torch.nn.functional.normalize(train[:, 0], dim=1)
        queries = torch.nn.functional.normalize(test[:KNN_TEST, 0], dim=1)
        found = [(rows @ keys.T).topk(K, dim=1) for rows in queries.split(TORCH_ROWS)]
        return torch.cat([one.values for one in found]).cpu(), torch.cat([one.indices for one in found]).cpu()

    return _prepared(run, lambda found: found[1])


def _torch_mlp(device: Any, start: Path) -> Prepared:
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    train, _, labels = (torch.from_numpy(array).to(device) for array in _features())
    train = train[:, 0].contiguous()
    arrays = {name: torch.from_numpy(array) for name, array in np.load(start).items()}
    model = torch.nn.Sequential(torch.nn.Linear(DIM, 256), torch.nn.ReLU(), torch.nn.Linear(256, CLASSES)).to(device)
    weights = [arrays["hidden_kernel"].T, arrays["hidden_bias"], arrays["kernel"].T, arrays["bias"]]

    def run():
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights):
                parameter.copy_(value)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        for first in range(0, TRAIN - 63, 64):
            optimizer.zero_grad()
            cross_entropy(model(train[first : first + 64]), labels[first : first + 64]).backward()
            optimizer.step()
        with torch.inference_mode():
            scores = [(model(train[:n]), labels[:n]) for n in (TRAIN, HELDOUT)]
            return [
                (cross_entropy(*pair).item(), (pair[0].argmax(1) == pair[1]).float().mean().item()) for pair in scores
            ]

    return _prepared(run, lambda found: found[0][:1])


def _torch_sweep(device: Any, start: Path) -> Prepared:
    """One product for each input over all its heads, gradients by hand, `_foreach` updates of all heads at once."""
    import math

    import numpy as np
    import torch

    train, _, labels = (torch.from_numpy(array).to(device) for array in _features(TOKENS))
    train, columns, arrays = train.reshape(TRAIN, -1), _sweep_columns(), np.load(start)
    batches = torch.from_numpy(arrays["batches"]).to(device, torch.int64)
    one_hot = torch.eye(CLASSES, device=device)[labels][:, None]
    base = torch.tensor([1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1], device=device)
    rates = (base * BATCH / 256).repeat_interleave(CLASSES)
    initial = [torch.from_numpy(arrays[f"kernel{i}"]).to(device).repeat(1, len(base)) for i in range(len(columns))]

    @torch.inference_mode()
    def run():
        # The bias is the last row of the kernel, so that one update serves both.
        weights = [torch.cat([kernel, torch.zeros_like(kernel[:1])]) for kernel in initial]
        velocity = [torch.zeros_like(weight) for weight in weights]
        gradients = [torch.empty_like(weight) for weight in weights]
        for step, batch in enumerate(batches):
            rows, targets = train[batch], one_hot[batch]
            for weight, gradient, place in zip(weights, gradients, columns):
                inputs = rows[:, slice(*place)]
                logits = torch.addmm(weight[-1], inputs, weight[:-1]).view(BATCH, -1, CLASSES)
                slope = logits.softmax(-1).sub_(targets).div_(BATCH).view(BATCH, -1)
                torch.mm(inputs.T, slope, out=gradient[:-1])
                torch.sum(slope, dim=0, out=gradient[-1])
            torch._foreach_mul_(velocity, 0.9)
            torch._foreach_add_(velocity, gradients)
            cosine = 0.5 * (1 + math.cos(math.pi * step / SWEEP_STEPS))
            torch._foreach_addcmul_(weights, velocity, [rates.expand_as(w) for w in weights], value=-cosine)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return weights

    def losses(weights):
        logits = [
            torch.addmm(weight[-1], train[:HELDOUT, slice(*place)], weight[:-1]).view(HELDOUT, -1, CLASSES)
            for weight, place in zip(weights, columns)
        ]
        picked = one_hot[:HELDOUT]
        return torch.cat([(one.logsumexp(-1) - (one * picked).sum(-1)).mean(0) for one in logits]).cpu()

    return _prepared(run, losses)


def prepare_sklearn(row: str, start: str) -> Prepared:
    """Scikit-learn's brute force; on unit vectors, where Euclidean order is cosine order and its code is fastest."""
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    train, test, _ = _features()
    train, test = train[:, 0], test[:KNN_TEST, 0]

    def run():
        search = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(normalize(train))
        return search.kneighbors(normalize(test))

    return _prepared(run, lambda found: found[1])


def _prepared(run: Any, result: Any) -> Prepared:
    import numpy as np

    prepared = warmed_up(run)
    prepared.info["result"] = np.asarray(result(run())).tolist()
    return prepared
