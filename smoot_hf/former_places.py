"""Modules by the names that they had in version 0.1.0, for pickles (`training_args.bin`) and scripts that name them."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Former name -> the module that holds its contents now.
FORMER_PLACES = {
    "smoot_hf.attributions": "smoot_hf.evaluation.attributions",
    "smoot_hf.budget_file": "smoot_hf.training.mask_budget",
    "smoot_hf.comparison": "smoot_hf.evaluation.comparison",
    "smoot_hf.convention": "smoot_hf.evaluation.convention",
    "smoot_hf.image_classes": "smoot_hf.evaluation.image_classes",
    "smoot_hf.input_pipeline": "smoot_hf.data.input_pipeline",
    "smoot_hf.mask_budget": "smoot_hf.training.mask_budget",
    "smoot_hf.mixin": "smoot_hf.training.trainer",
    "smoot_hf.modeling_smoot_cnn": "smoot_hf.models.modeling_smoot_cnn",
    "smoot_hf.results": "smoot_hf.evaluation.results",
    "smoot_hf.sanity_check": "smoot_hf.evaluation.sanity_check",
    "smoot_hf.trainer": "smoot_hf.training.trainer",
    "smoot_hf.training_args": "smoot_hf.training.arguments",
}


class _FormerPlaces(MetaPathFinder, Loader):
    """Imports the module that a former name stands for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in FORMER_PLACES else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in the place of the empty one that the import system made."""
        sys.modules[module.__name__] = importlib.import_module(FORMER_PLACES[module.__name__])


def serve_former_places() -> None:
    """Make the former names importable; a second call changes nothing."""
    if not any(isinstance(finder, _FormerPlaces) for finder in sys.meta_path):
        sys.meta_path.append(_FormerPlaces())
