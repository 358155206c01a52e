"""The referee matrix: the maps of every model, judged by every model.

Deletion asks a model about its own maps, so that a low area may come from a good map or from a model that bears the
removal of any pixels badly. Here the positions are ranked by one model and removed from the input of another. Down a
column the referee is the same: what differs are the maps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .convention import Convention
from .faithfulness import Faithfulness, evaluate_faithfulness


@dataclass(frozen=True, eq=False)
class RefereeMatrix:
    """What `referee_matrix` found; rows: whose map ranks the positions, columns: who is asked; in percent.

    Attributes:
        names: of the models, in the order of rows and columns.
        measured: whose map -> who is asked -> the curves of deletion and of least salient first.
    """

    names: tuple[str, ...]
    measured: Mapping[str, Mapping[str, Faithfulness]]

    @property
    def gap(self) -> Tensor:
        """Float64 (M, M), area of least salient first minus that of most salient first; higher is better."""
        return self._matrix("gap")

    @property
    def deletion_auc(self) -> Tensor:
        """Float64 (M, M), area of most salient first; lower is better."""
        return self._matrix("deletion_auc")

    def _matrix(self, quantity: str) -> Tensor:
        values = [[getattr(self.measured[of][asked], quantity) for asked in self.names] for of in self.names]
        return torch.tensor(values, dtype=torch.float64)


def referee_matrix(
    models: Mapping[str, nn.Module],
    dataset: Any,
    *,
    convention: Convention | Literal["default", "paper"] = "default",
    input_pipeline: Any = None,
    batch_size: int = 256,
    seed: int = 0,
) -> RefereeMatrix:
    """Rank the positions by each model, remove them, and ask every model.

    The diagonal is what `evaluate_faithfulness` measures of each model. M models cost M * M such evaluations.

    Args:
        models: by name; all take the same images and number the classes in the same way.
        dataset: as in `evaluate_faithfulness`, like every argument that follows.
        convention: its target is the class that the one who is asked follows.
        input_pipeline: of all models.
        batch_size: images per forward pass.
        seed: of all randomness.

    Returns:
        Gap and deletion area of every map by every model.

    Raises:
        ValueError: no models; else as `evaluate_faithfulness`.
    """
    if not models:
        raise ValueError("models must hold at least one model by its name, got none")

    def measure(of: nn.Module | None, asked: nn.Module) -> Faithfulness:
        return evaluate_faithfulness(
            asked,
            dataset,
            convention=convention,
            curves=("least_salient_first",),
            ranked_by=of,
            input_pipeline=input_pipeline,
            batch_size=batch_size,
            seed=seed,
        )

    # The diagonal first: what is wrong with a model is said of that model.
    measured = {name: {name: measure(None, model)} for name, model in models.items()}
    for of, asked in permutations(models, 2):
        measured[of][asked] = measure(models[of], models[asked])
    return RefereeMatrix(tuple(models), measured)
