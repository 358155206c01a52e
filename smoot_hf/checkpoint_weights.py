"""Weights of a checkpoint whose names are not the model's own.

`save_pretrained` writes many architectures (ViT, DeiT, ...) under the names of their Hub checkpoints, which
`from_pretrained` translates. The Trainer of transformers 5.17 to 5.24 does not: it loads what matches and warns of the
rest, so that a resumed training, or the best model at the end, keeps most of the weights it happened to have
(huggingface/transformers issue 43701).
"""

import json
import os

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def has_other_names(model: nn.Module, folder: str) -> bool:
    """Whether the weights in `folder` are not name by name those of `model`: `from_pretrained` can tell why."""
    if not isinstance(model, PreTrainedModel):
        return False
    index, single = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME), os.path.join(folder, SAFE_WEIGHTS_NAME)
    if os.path.isfile(single):
        with safe_open(single, framework="pt") as file:
            names = set(file.keys())
    elif os.path.isfile(index):
        with open(index) as file:
            names = set(json.load(file)["weight_map"])
    else:
        return False
    return names != set(model.state_dict())


def load_translated(model: PreTrainedModel, folder: str) -> None:
    """Give `model` the weights of the checkpoint in `folder`, all of them.

    Raises:
        ValueError: the checkpoint lacks weights of the model, or has others: it is another architecture's.
    """
    # Sizes that differ are in the report as well, instead of in an error that does not name them.
    restored, report = type(model).from_pretrained(
        folder, config=model.config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(
                f"the weights in {folder} are not this model's: {kind} {sorted(map(str, report[kind]))[:5]}. "
                "Build the architecture that was saved, or do not resume from this checkpoint"
            )
    model.load_state_dict(restored.state_dict())
