"""What torchvision makes of a Pillow image, called step by step: the reference of the augmentation tests."""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images

BICUBIC = Image.Resampling.BICUBIC


def photo_like(height: int, width: int) -> np.ndarray:
    """uint8[8, height, width, 3]: cut-outs of two photographs, colour fields with and without noise, and extremes."""
    photos = load_sample_images().images
    cuts = [photo[top : top + height, left : left + width] for photo in photos for top, left in ((40, 60), (260, 330))]
    rng = np.random.default_rng(0)
    colors = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    smooth = np.asarray(colors.resize((width, height), BICUBIC))
    noisy = (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
    noise = rng.integers(0, 256, smooth.shape, np.uint8)
    checks = np.where((np.add.outer(np.arange(height) // 3, np.arange(width) // 2) % 2)[..., None], 255, 0)
    return np.stack([*cuts, smooth, noisy, noise, np.broadcast_to(checks, smooth.shape)]).astype(np.uint8)


def adjust_hue(image: Image.Image, factor: float) -> Image.Image:
    """torchvision's `_functional_pil.adjust_hue`: the shift truncates towards zero and wraps in 8 bits."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue).astype(np.int64) + int(factor * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), saturation, value)).convert("RGB")


def jitter(image: Image.Image, factors: np.ndarray, order: np.ndarray) -> Image.Image:
    """torchvision's `ColorJitter.forward` with its random numbers given."""
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in order:
        factor = float(factors[which])
        image = adjust_hue(image, factor) if which == 3 else enhance[which](image).enhance(factor)
    return image


def kernel_blur(image: Image.Image, sigma: float) -> Image.Image:
    """torchvision's `gaussian_blur` with a 9-pixel kernel: one convolution of the mirrored image, rounded."""
    import torch

    x = torch.linspace(-4, 4, 9)
    density = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = torch.outer(density, density) / density.sum() ** 2
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4), mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, kernel.expand(3, 1, 9, 9), groups=3).round()
    return Image.fromarray(blurred[0].permute(1, 2, 0).numpy().astype(np.uint8))


def crop_resize(image: Image.Image, box: np.ndarray, size: int) -> Image.Image:
    """torchvision's `resized_crop`: the crop comes first, so that nothing around it shines through."""
    top, left, height, width = (int(x) for x in box)
    return image.crop((left, top, left + width, top + height)).resize((size, size), BICUBIC)


def view(pixels: np.ndarray, draws: dict[str, np.ndarray], size: int, *, v2: bool = False) -> np.ndarray:
    """One DINO view with its random numbers given, before normalisation: uint8[size, size, 3]."""
    image = crop_resize(Image.fromarray(pixels), draws["box"], size)
    if draws["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draws["jitter"]:
        image = jitter(image, draws["factors"], draws["order"])
    if draws["grayscale"]:
        image = image.convert("L").convert("RGB")
    if draws["blur"]:
        radius = float(draws["radius"])
        image = kernel_blur(image, radius) if v2 else image.filter(ImageFilter.GaussianBlur(radius))
    if draws["solarize"]:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image)
