"""Measurements that outlive the process: each in a file of its own, found again by what it was measured of and how."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from checkpoints import Checkpoint

from smoot_hf import Convention, Faithfulness
from smoot_hf.data import DecodedImages
from smoot_hf.evaluation import Curve
from smoot_hf.image_classes import ImageClasses
from smoot_hf.sanity_check import WeightRandomization

# What a file may hold beside tensors and plain values; anything else in it is refused, and none of its code runs.
_CLASSES = [Convention, Curve, Faithfulness, ImageClasses, WeightRandomization]

Measured = TypeVar("Measured")


class SavedMeasurements:
    """The measurements of one checkpoint on one data set.

    A file is named after a digest of everything that its numbers depend on: a measurement of another checkpoint, of
    other images, by another convention or by another version of the software is never taken for this one.

    Args:
        folder: where the files are; is made.
        identity: what holds for all of the measurements, as JSON values.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = dict(identity)
        folder.mkdir(parents=True, exist_ok=True)

    def path_of(self, kind: str, settings: Mapping[str, Any]) -> Path:
        """The file of a measurement, whether it is there or not."""
        return self.folder / f"{kind}-{_digest(self._whole_identity(kind, settings))[:16]}.pt"

    def get(
        self, kind: str, settings: Mapping[str, Any], measure: Callable[[], Measured], expected: type[Measured]
    ) -> Measured:
        """A measurement that was saved before, or one that is made and saved now.

        Args:
            kind: what is measured, a part of the file's name.
            settings: what tells it from the others of its kind, as JSON values.
            measure: makes it.
            expected: its class.

        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        path, identity = self.path_of(kind, settings), self._whole_identity(kind, settings)
        if path.is_file():
            return _read(path, identity, expected)
        measured = measure()
        # Under its own name only once it is whole: whoever is killed here leaves no part of a measurement.
        unfinished = path.with_suffix(".tmp")
        torch.save({"identity": identity, "measured": measured}, unfinished)
        os.replace(unfinished, path)
        return measured

    def _whole_identity(self, kind: str, settings: Mapping[str, Any]) -> str:
        return json.dumps({**self.identity, "kind": kind, "settings": dict(settings)}, sort_keys=True)


def identify(checkpoint: Checkpoint, images: DecodedImages) -> dict[str, Any]:
    """What tells a checkpoint and its evaluation images from any other, wherever they lie."""
    return {
        "model": model_digest(checkpoint.model),
        "pipeline": repr(checkpoint.pipeline),
        "images": [len(images), images.fingerprint, hashlib.sha256(images.labels.tobytes()).hexdigest()],
    }


def model_digest(model: torch.nn.Module) -> str:
    """Of a model's class, configuration and every weight and buffer, 64 hexadecimal digits."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    digest = hashlib.sha256(f"{type(model).__qualname__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, identity: str, expected: type[Measured]) -> Measured:
    try:
        with torch.serialization.safe_globals(_CLASSES):
            content = torch.load(path, weights_only=True)
        if content["identity"] == identity and isinstance(content["measured"], expected):
            return content["measured"]
    except Exception as error:  # of a damaged file torch raises whatever its reader meets
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}): remove it, to measure that once more") from error
    raise ValueError(f"{path} holds another measurement than its name says: remove it, to measure that once more")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
