"""Which training a checkpoint is of: an id of its own, and what tells its model, data, method and seed."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from .fingerprint import fingerprints_differ

RUN_IDENTITY_NAME = "run_identity.json"


class DamagedIdentityError(ValueError):
    """The file that names a run cannot be read, or does not name one."""


@dataclass(frozen=True)
class RunIdentity:
    """Stands in every checkpoint, and in the output folder for the run that the folder belongs to now.

    Attributes:
        run_id: made at random when a training begins afresh, kept when it is resumed; `None` where any run is meant.
        method: "standard", "sgt" or "smoot"; `None`, here and below: unknown.
        seed: `args.seed`.
        model: its class, and a hash of the names and shapes of its parameters (`describe_model`).
        dataset_fingerprint: of the training set (`smoot_hf.fingerprint`).
    """

    run_id: str | None = None
    method: str | None = None
    seed: int | None = None
    model: str | None = None
    dataset_fingerprint: str | None = None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `run_identity.json` into a folder that exists; the file appears whole or not at all."""
        path = os.path.join(folder, RUN_IDENTITY_NAME)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=2)
        os.replace(f"{path}.tmp", path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self | None:
        """Read `run_identity.json`; `None` where the folder has none, as those of a plain `Trainer` have.

        Raises:
            DamagedIdentityError: the file is torn, or was altered.
        """
        path = os.path.join(folder, RUN_IDENTITY_NAME)
        if not os.path.isfile(path):
            return None
        try:
            with open(path, encoding="utf-8") as file:
                identity = cls(**json.load(file))
            wrong = next((f.name for f in dataclasses.fields(cls) if not _is_well_formed(identity, f.name)), None)
            if wrong is not None:
                raise ValueError(f"{wrong} is {getattr(identity, wrong)!r}")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = str(error).splitlines()[0][:200]
            raise DamagedIdentityError(f"{path} is damaged: it does not name a run ({reason})") from error
        return identity

    def __str__(self) -> str:
        return f"run {str(self.run_id)[:8]} with method {self.method} and seed {self.seed}"

    def difference(self, asked: "RunIdentity") -> str | None:
        """The first thing in which this run is not `asked`, in words; `None` where it is, as far as both are known."""
        for field in dataclasses.fields(self):
            own, other = getattr(self, field.name), getattr(asked, field.name)
            differs = fingerprints_differ if field.name == "dataset_fingerprint" else _differ
            if differs(own, other):
                return f"its {field.name} is {own}, not {other}"
        return None


def describe_model(model: nn.Module) -> str:
    """The class of a model and a hash of the names and shapes of its parameters: two of one size are one model."""
    # A compiled model is the same model.
    original: Any = getattr(model, "_orig_mod", model)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in original.named_parameters()]
    return f"{type(original).__name__}-{hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]}"


def _differ(one: Any, other: Any) -> bool:
    return None not in (one, other) and one != other


def _is_well_formed(identity: RunIdentity, name: str) -> bool:
    value = getattr(identity, name)
    if name == "run_id":
        return isinstance(value, str) and value != ""
    return value is None or type(value) is (int if name == "seed" else str)
