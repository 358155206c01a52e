"""A tiny model of every image classifier of transformers, from its configuration: random weights, no network.

Every configuration is shrunk by the same rules, by the names of its fields; what the rules cannot know stands in
`EXCEPTIONS`. An architecture that is new in transformers is shrunk by the rules alone: it is built, or its row fails.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

SIDE, CLASSES = 32, 4


class Case(NamedTuple):
    """A row of the sweep: `build()` gives a classifier of `CLASSES` classes for RGB images of `side` pixels squared."""

    name: str
    build: Callable[[], nn.Module]
    side: int = SIDE


# By the name of a field: its value, or, where it is a list, the value of each entry. The first that matches counts.
# Dropout everywhere, so that the two views must share it; initial weights and layer scales at which every layer shows.
RULES: list[tuple[str, Any]] = [
    (r"image_size", SIDE),
    (r"patch_size", lambda size: min(size, 8)),
    (r"depths?|num_hidden_layers|num_self_attends_per_block|n_attn_blocks", 1),
    (r"(neck_)?hidden_sizes|embedding_size|embed_dims?|stem_out_channels", 16),
    (r"hidden_size|d_model|d_latents|projection_dim|pooler_output_size|base_attn_unit_dims", 16),
    (r"intermediate_size|hidden_dim|class_expand", 32),
    (r"num_heads|num(_self|_cross)?_attention_heads", lambda heads: min(heads, 2)),
    (r"num_groups|window_size|num_register_tokens", 2),
    (r"num_latents", 4),
    (r"groups_width|key_dim", 8),
    (r"depth_multiplier|depth_coefficient|width_multiplier", 0.1),
    (r"expand_ratio", 2.0),
    (r"scale", 0.25),
    (r".*(dropout|dropout_prob|drop_path_rate|dropout_rate|drop_rate|drop_connect_rate|drop_mlp_rate)", 0.1),
    (r"initializer_range", 0.25),
    (r"(layer_scale|layerscale)(_init)?_value", 0.5),
]

# What the rules cannot know, by model type.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Two stages, the last of them wider than a window; one shifted window.
    **{
        name: {"depths": [2, 1], "num_heads": [2, 2], "embed_dim": 8, "window_size": 2}
        for name in ("swin", "swinv2", "donut-swin")
    },
    # Four convolutions of stride 2, whatever the patch_size says; a rate that is declared as a whole number.
    "levit": {"patch_size": 16, "drop_path_rate": 0},
    # The stage counts as a layer where the rate of its layers is looked up: it must have as many.
    "cvt": {"depth": [1, 2, 3]},
    # The last of the widths that the coefficient gives, in two places.
    "efficientnet": {"width_coefficient": 0.1, "hidden_dim": 128},
    # 261 channels of pixels and Fourier features are one head's; each pixel has hundreds, so there are few pixels.
    "perceiver": {"num_cross_attention_heads": 1, "image_size": 16},
    # Four pixels are left of 32 x 32, a patch; by a stride of 32, one.
    "mobilevitv2": {"output_stride": 16},
    "focalnet": {"embed_dim": 8},
    "hiera": {"embed_dim": 8},
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 16, 16],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "timm_wrapper": {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    },
    # Refused whatever its size, so the smallest that can be built.
    "imagegpt": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "shieldgemma2": {
        "text_config": {
            "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        },
    },
}  # fmt: skip


# Side of the images in pixels, where it is another.
SIDES = {"perceiver": 16}


def cases() -> Iterator[Case]:
    """One for every model class of every architecture in `MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING`."""
    for model_type, names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
        for name in (names,) if isinstance(names, str) else names:
            # deit, deit/WithTeacher
            kind = name.partition("ForImageClassification")[2]
            row = f"{model_type}/{kind}" if kind else model_type
            yield Case(row, partial(build, model_type, name), SIDES.get(model_type, SIDE))


def build(model_type: str, class_name: str) -> nn.Module:
    """A tiny model of one class."""
    return getattr(transformers, class_name)(tiny_config(model_type))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of one architecture, shrunk."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**shrunk(kind) | EXCEPTIONS.get(model_type, {}), num_labels=CLASSES)


def shrunk(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a configuration that decide its size, by the rules; those of its vision tower likewise."""
    changes: dict[str, Any] = {}
    defaults, fields = kind(), inspect.signature(kind).parameters
    for field in fields:
        default = getattr(defaults, field, None)
        if field == "vision_config" and isinstance(default, PreTrainedConfig):
            changes[field] = shrunk(type(default))
            continue
        rule = next((value for pattern, value in RULES if re.fullmatch(pattern, field)), None)
        if rule is not None and default is not None:
            changes[field] = _each(rule, default)
    return changes


def _each(rule: Any, default: Any) -> Any:
    if isinstance(default, list | tuple):
        return [_each(rule, entry) for entry in default]
    return rule(default) if callable(rule) else rule
