"""What `benchmarks.dense` compares: a training step and whole masks, in dinojax and in straightforward PyTorch."""

from typing import Any

from benchmarks.work.paired import Prepared, warmed_up
from benchmarks.work.torch_cpu import use_all_cores

WINDOWS, PATCHES, WIDTH, CLASSES, PIXELS, BINS = 16, 32, 384, 21, 448, 64
PHOTO = (3000, 4000)  # px
_RATE, _STEPS = 1e-3, 3


def _inputs(row: str) -> tuple[Any, Any]:
    """Patches of 16 windows of ViT-S/14 at 448 px in half precision, and targets; or the scores of a photo."""
    import numpy as np

    rng = np.random.default_rng(0)
    if row == "photo":
        return rng.standard_normal((214, 286, CLASSES), dtype=np.float32), None
    patches = rng.standard_normal((WINDOWS, PATCHES, PATCHES, WIDTH), dtype=np.float32).astype(np.float16)
    if row == "depth":
        return patches, rng.uniform(0.5, 9, (WINDOWS, PIXELS, PIXELS)).astype(np.float32)
    masks = rng.integers(0, CLASSES, (WINDOWS, PIXELS, PIXELS)).astype(np.uint8)
    masks[rng.random(masks.shape) < 0.05] = 255
    return patches, masks


def _kernel(row: str) -> Any:
    """The initial kernel of both sides."""
    import numpy as np

    return 0.01 * np.random.default_rng(1).standard_normal((WIDTH, BINS if row == "depth" else CLASSES), np.float32)


def prepare_jax(row: str) -> Prepared:
    """A step, or the mask of a photo of 12 megapixels."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from dinojax.dense import bin_depth, class_map, depth_loss, init_head_state, make_head_step, segmentation_loss

    patches, targets = _inputs(row)
    if row == "photo":
        return warmed_up(lambda: class_map([patches], *PHOTO), result=_sample(class_map([patches], *PHOTO)))
    loss = segmentation_loss if row == "masks" else lambda x, y: depth_loss(bin_depth(x, 0.1, 10.0), y)
    optimizer = optax.adamw(_RATE)
    step = make_head_step(loss, optimizer)

    def begin():
        kernel = _kernel(row)
        state = init_head_state(jax.random.key(0), *kernel.shape, optimizer)
        return state._replace(parameters=state.parameters._replace(kernel=jnp.asarray(kernel)))

    state, losses = begin(), []
    for _ in range(_STEPS):
        state, value = step(state, jnp.asarray(patches), jnp.asarray(targets))
        losses.append(float(value))
    kept = [begin()]

    def run():
        kept[0], value = step(kept[0], jnp.asarray(patches), jnp.asarray(targets))
        return np.asarray(value)

    return warmed_up(run, result=losses)


def prepare_torch(row: str) -> Prepared:
    """The same as it is usually written."""

    import torch
    from torch.nn.functional import cross_entropy, interpolate

    use_all_cores()
    patches, targets = _inputs(row)
    if row == "photo":
        scores = torch.from_numpy(patches).permute(2, 0, 1)[None].contiguous()

        def whole():
            with torch.inference_mode():
                return interpolate(scores, size=PHOTO, mode="bilinear", align_corners=False)[0].argmax(0).byte().numpy()

        return warmed_up(whole, result=_sample(whole()))
    patches, targets = torch.from_numpy(patches), torch.from_numpy(targets)
    centres = torch.linspace(0.1, 10, BINS)

    def begin():
        kernel = torch.from_numpy(_kernel(row))
        norm, linear = torch.nn.BatchNorm2d(WIDTH), torch.nn.Conv2d(WIDTH, kernel.shape[1], 1)
        with torch.no_grad():
            linear.weight.copy_(kernel.T[:, :, None, None])
            linear.bias.zero_()
        head = torch.nn.Sequential(norm, linear)
        return head, torch.optim.AdamW(head.parameters(), lr=_RATE, weight_decay=1e-4, fused=True)

    def step(head, optimizer):
        optimizer.zero_grad()
        scores = head(patches.permute(0, 3, 1, 2).float())
        if row == "depth":
            weights = torch.relu(scores) + 0.1
            depth = torch.einsum("bkrc,k->brc", weights / weights.sum(1, keepdim=True), centres)
            depth = interpolate(depth[:, None], size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)[:, 0]
            valid = targets > 0
            gap = torch.log(depth[valid] + 1e-3) - torch.log(targets[valid] + 1e-3)
            loss = torch.sqrt(gap.var() + 0.15 * gap.mean() ** 2)
        else:
            pixels = interpolate(scores, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)
            loss = cross_entropy(pixels, targets.long(), ignore_index=255)
        loss.backward()
        optimizer.step()
        return loss.item()

    first, kept = begin(), begin()
    losses = [step(*first) for _ in range(_STEPS)]
    return warmed_up(lambda: step(*kept), result=losses)


def _sample(mask: Any) -> list[int]:
    """Classes of every 97th pixel of every 89th row."""
    return mask[::89, ::97].ravel().tolist()
