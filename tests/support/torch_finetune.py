"""Fine-tuning in PyTorch: a tiny DINOv2 of `transformers` with a linear head, and LoRA as a path of its own."""

import re

import numpy as np
import torch
import transformers

from converters import from_torch
from dinojax import ViTConfig
from dinojax.models.files import named_parameters

DIM, DEPTH, CLASSES, RANK, ALPHA = 32, 2, 5, 3, 8.0
CONFIG = ViTConfig(
    img_size=16, patch_size=4, embed_dim=DIM, depth=DEPTH, num_heads=2, init_values=1.0, interpolate_offset=0.0
)


class TorchClassifier(torch.nn.Module):
    """Class token after the final norm, then a linear layer; float64, no parameter at its first value."""

    def __init__(self, depth: int = DEPTH, registers: int = 0):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": DIM, "num_hidden_layers": depth, "num_attention_heads": 2}
        sizes |= {"image_size": 16, "patch_size": 4, "attn_implementation": "eager"}
        if registers:
            config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
            self.backbone = transformers.Dinov2WithRegistersModel(config)
        else:
            self.backbone = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
        self.head = torch.nn.Linear(DIM, CLASSES)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.1 * torch.randn_like(parameter)

    def forward(self, images: np.ndarray) -> torch.Tensor:
        hidden = self.backbone(torch.from_numpy(images.transpose(0, 3, 1, 2))).last_hidden_state
        return self.head(hidden[:, 0])


def our_parameters(model: TorchClassifier) -> dict[str, np.ndarray]:
    """The parameters under our names and in our layout."""
    backbone = named_parameters(from_torch(model.backbone.state_dict(), num_heads=2))
    head = {"kernel": model.head.weight.detach().numpy().T, "bias": model.head.bias.detach().numpy()}
    named = {f"backbone.{name}": np.array(array) for name, array in backbone.items()}
    return named | {f"head.{name}": array.copy() for name, array in head.items()}


class LowRank(torch.nn.Module):
    """A layer that is frozen, and beside it x @ A @ B[:, columns] · alpha / rank."""

    def __init__(self, layer: torch.nn.Linear, a: torch.nn.Parameter, b: torch.nn.Parameter, columns: slice):
        super().__init__()
        self.layer, self.columns = layer, columns
        self.factors = (a, b)  # in a tuple: query, key and value share them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.factors
        return self.layer(x) + (x @ a) @ b[:, self.columns] * (ALPHA / RANK)


def add_lora(model: TorchClassifier, factors: dict[str, np.ndarray]) -> dict[str, torch.nn.Parameter]:
    """Freezes the backbone and puts the factors beside it; returns what trains, under our names."""
    model.backbone.requires_grad_(False)
    trained = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in factors.items()}
    for index, block in enumerate(model.backbone.encoder.layer):
        prefix = f"backbone.blocks.{index}.attn"
        places = [(name, "qkv", i) for i, name in enumerate(("q_proj", "k_proj", "v_proj"))] + [("o_proj", "proj", 0)]
        for name, ours, i in places:
            pair = (trained[f"{prefix}.{ours}.a"], trained[f"{prefix}.{ours}.b"])
            low_rank = LowRank(getattr(block.attention, name), *pair, slice(i * DIM, (i + 1) * DIM))
            setattr(block.attention, name, low_rank)
    return trained


def layer_wise_groups(model: TorchClassifier, rate: float, decay: float, layer_decay: float) -> list[dict]:
    """One group a parameter, by its name in `transformers`: a rate for its depth, and weight decay or none."""
    groups = []
    for name, parameter in model.named_parameters():
        power = 0  # final norm and head
        if name.startswith("backbone.embeddings."):
            power = DEPTH + 1
        elif found := re.search(r"encoder\.layer\.(\d+)\.", name):
            power = DEPTH - int(found[1])
        spared = re.search(r"bias$|norm|lambda1|cls_token|mask_token|register_tokens|position_embeddings", name)
        groups.append(
            {"params": [parameter], "lr": rate * layer_decay**power, "weight_decay": 0.0 if spared else decay}
        )
    return groups
