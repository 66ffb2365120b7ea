"""What identifies a model: a hash of its configuration and parameters."""

import hashlib
import json

import numpy as np

from dinojax.models.files import named_parameters
from dinojax.models.vit import VisionTransformer


def fingerprint(model: VisionTransformer) -> str:
    """SHA-256 over the configuration and every parameter."""
    sha256 = hashlib.sha256(json.dumps(model.config.settings(), sort_keys=True).encode())
    for name, array in sorted(named_parameters(model).items()):
        sha256.update(f"{name} {array.dtype} {array.shape}".encode())
        sha256.update(np.asarray(array).tobytes())
    return sha256.hexdigest()
