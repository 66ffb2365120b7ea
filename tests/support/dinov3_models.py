"""Small DINOv3 models of `transformers` in which no tensor has the value it starts with."""

from typing import Any

import numpy as np
import pytest

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}


def random_dinov3(spread: float = 0.1, **settings: Any) -> Any:
    """A torch module `DINOv3ViTModel`, with four registers unless told otherwise."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    words = SIZES | {"num_register_tokens": 4, "image_size": 64, "attn_implementation": "eager"} | settings
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**words))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model.eval()


def in_double(model: Any, patch: pytest.MonkeyPatch) -> Any:
    """The module in float64 throughout: `transformers` computes coordinates and periods in float32 on its own."""
    import torch
    from transformers.models.dinov3_vit import modeling_dinov3_vit as theirs

    original = theirs.get_patches_center_coordinates
    patch.setattr(
        theirs,
        "get_patches_center_coordinates",
        lambda rows, columns, dtype, device: original(rows, columns, dtype=torch.float64, device=device),
    )
    model = model.double()
    head_dim, base = model.rope_embeddings.head_dim, model.rope_embeddings.base
    model.rope_embeddings.inv_freq = 1 / base ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float64)
    return model


def run(model: Any, images: np.ndarray, masks: np.ndarray | None = None) -> dict[str, Any]:
    """Outputs for images "batch height width channels": tokens, what each block gives, the attention of each block."""
    import torch

    covered = {} if masks is None else {"bool_masked_pos": torch.from_numpy(masks)}
    with torch.no_grad():
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        found = model(pixels, output_hidden_states=True, output_attentions=True, **covered)
    return {
        "tokens": found.last_hidden_state.numpy(),
        "blocks": [hidden.numpy() for hidden in found.hidden_states],  # the first is the embedding
        "attention": [probabilities.numpy() for probabilities in found.attentions],
    }
