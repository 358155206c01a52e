"""An image classifier and its image processor: loaded from a checkpoint, or made with random weights."""

from typing import Any

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessor,
)

from ..errors import first_line
from .class_names import adopt_numbering, class_names
from .grey_image_processor import GreyImageProcessor
from .modeling_smoot_cnn import PaperCnnConfig, PaperCnnForImageClassification

# Its checkpoint is a ViTForImageClassification: DeiT without the distillation token.
DEIT_TINY = "facebook/deit-tiny-patch16-224"

AutoConfig.register(PaperCnnConfig.model_type, PaperCnnConfig)
AutoModelForImageClassification.register(PaperCnnConfig, PaperCnnForImageClassification)
# Found by its name, whatever the architecture beside it.
AutoImageProcessor.register(PaperCnnConfig, image_processor_classes={"torchvision": GreyImageProcessor})
# What is saved brings its code along, for machines without this package.
PaperCnnConfig.register_for_auto_class()
PaperCnnForImageClassification.register_for_auto_class("AutoModelForImageClassification")
GreyImageProcessor.register_for_auto_class()


def load_model(
    name: str,
    *,
    labels: list[str],
    image_size: tuple[int, int],
    num_channels: int,
    from_scratch: bool = False,
    patch_size: int | None = None,
) -> PreTrainedModel:
    """Build a classifier of `labels` for images of one size, from a checkpoint or with random weights.

    A checkpoint keeps its own input size: the `InputPipeline` resizes after the mask. Where it has classified the same
    classes in another order, the rows of its head are permuted to the order of `labels`. A model from scratch takes the
    images as they are, except for timm's, which keep the size of their configuration.

    Args:
        name: "cnn" (the paper's network, always from scratch), "deit-tiny", or a Hub id or local directory of
            transformers or timm.
        labels: name of every class, in the order of the label indices.
        image_size: native (height, width) of the images in pixels.
        num_channels: channels of the images.
        from_scratch: take the architecture alone, not the weights.
        patch_size: side of a patch in pixels, for patch-based models from scratch. Default: what the configuration
            says; for "deit-tiny" 16 for images of at least 64 pixels, else 4.

    Returns:
        The model, in training mode where it is new and in evaluation mode where it was loaded, as transformers does.

    Raises:
        ValueError: no image classifier, the images do not fit the model, or `patch_size` does not fit it.
        OSError: the checkpoint is neither a local directory nor to be had from the Hub, or its weights are torn.
        ImportError: the architecture needs a package that is not installed.
    """
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if patch_size is not None and patch_size < 1:
        raise ValueError(f"patch_size must be at least 1 pixel, got {patch_size}")
    if patch_size is not None and (name == "cnn" or not from_scratch):
        raise ValueError(f"patch_size={patch_size} needs a patch-based model from scratch (from_scratch=True)")
    if name == "cnn":
        return PaperCnnForImageClassification(
            PaperCnnConfig(image_size=_config_size(image_size), num_channels=num_channels, **names)
        )
    if name == "deit-tiny" and from_scratch:
        return AutoModelForImageClassification.from_config(
            _deit_tiny_config(image_size, num_channels, patch_size, names)
        )
    config = _load_config(_checkpoint(name))
    trained_for = class_names(config)
    # Set afterwards: `from_pretrained` complains where the number of classes changes.
    config.id2label, config.label2id = names["id2label"], names["label2id"]
    if hasattr(config, "label_names"):
        # A saved model of timm names its classes here as well, and this is what it saves.
        config.label_names = labels
    _check_is_classifier(name, config)
    if from_scratch:
        _fit_config(config, image_size, num_channels, patch_size)
    _check_channels(name, config, num_channels)
    try:
        if from_scratch:
            return AutoModelForImageClassification.from_config(config)
        model = AutoModelForImageClassification.from_pretrained(
            _checkpoint(name), config=config, ignore_mismatched_sizes=True
        )
    except ImportError as error:
        reason = first_line(error).partition(". ")[0]
        raise ImportError(f"cannot build {name!r}, a {config.model_type!r}: {reason}. Install it first") from error
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot load the weights of {name!r} ({first_line(error)}): fetch or save them again, or train "
            "--from_scratch"
        ) from error
    if len(trained_for) == len(labels):
        adopt_numbering(model, trained_for, labels, name)
    return model


def load_image_processor(
    name: str,
    model: PreTrainedModel,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    from_scratch: bool = False,
    center_crop: bool = False,
) -> Any:
    """The image processor that belongs beside a model, so that inference sees the pixels that training saw.

    Args:
        name: as in `load_model`.
        model: what `load_model` gave.
        image_size: native (height, width) of the images in pixels.
        mean: of each channel of the training set, of pixels / 255.
        std: the same, the standard deviation.
        from_scratch: as in `load_model`.
        center_crop: the native size is a square that images were resized and cropped to (`image_size` of
            `decode_images`): for a model from scratch, let the processor do so as well.

    Returns:
        The checkpoint's own processor; for a model from scratch a `ViTImageProcessor` of the native size that
        normalises with `mean` and `std`, and for images of one channel the `GreyImageProcessor`, which makes grey of
        colours. A timm model keeps its own in either case: its configuration holds it.

    Raises:
        OSError: the checkpoint has no image processor, or cannot be reached.
    """
    if name == "cnn" or (from_scratch and model.config.model_type != "timm_wrapper"):
        height, width = image_size
        is_grey = len(mean) == 1
        sides = {"height": height, "width": width}
        resizing = {"size": {"shortest_edge": height}, "do_center_crop": True, "crop_size": sides}
        return (GreyImageProcessor if is_grey else ViTImageProcessor)(
            **(resizing if center_crop else {"size": sides}),
            image_mean=list(mean),
            image_std=list(std),
            do_convert_rgb=not is_grey,
        )
    return load_pretrained_processor(name)


def load_pretrained_processor(name: str) -> Any:
    """The image processor of a checkpoint.

    Raises:
        ValueError: the checkpoint is no image classifier.
        OSError: it has no image processor, or cannot be reached.
    """
    _check_is_classifier(name, _load_config(_checkpoint(name)))
    try:
        return AutoImageProcessor.from_pretrained(_checkpoint(name))
    except OSError as error:
        raise OSError(
            f"model {name!r} comes without an image processor ({first_line(error)}): save one beside it"
        ) from error


def _checkpoint(name: str) -> str:
    return DEIT_TINY if name == "deit-tiny" else name


def _config_size(image_size: tuple[int, int]) -> int | list[int]:
    """One number for a square, which every configuration takes; a list survives JSON, a tuple would not."""
    height, width = image_size
    return height if height == width else [height, width]


def _load_config(checkpoint: str) -> Any:
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise OSError(
            f"cannot load the model {checkpoint!r} ({first_line(error)}): --model takes a local directory as well"
        ) from error


def _check_is_classifier(name: str, config: Any) -> None:
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and type(config) is not PaperCnnConfig:
        raise ValueError(f"model {name!r} is a {config.model_type!r}, of which transformers has no image classifier")


def _deit_tiny_config(
    image_size: tuple[int, int], num_channels: int, patch_size: int | None, names: dict[str, Any]
) -> ViTConfig:
    config = ViTConfig(
        num_hidden_layers=12,
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=768,
        patch_size=16 if min(image_size) >= 64 else 4,
        **names,
    )
    _fit_config(config, image_size, num_channels, patch_size)
    return config


def _fit_config(config: Any, image_size: tuple[int, int], num_channels: int, patch_size: int | None) -> None:
    """Set what the images decide, where the architecture has it."""
    # `from_config` iterates over this; without it deit, levit and perceiver (two classes each) fail.
    config.architectures = config.architectures or []
    config = vision_config(config)
    if hasattr(config, "image_size"):
        # Some configurations (hiera, textnet) must have both sides.
        is_pair = isinstance(config.image_size, list | tuple)
        config.image_size = list(image_size) if is_pair else _config_size(image_size)
    if hasattr(config, "num_channels"):
        config.num_channels = num_channels
    if patch_size is not None and not hasattr(config, "patch_size"):
        raise ValueError(f"patch_size={patch_size}: a model of type {config.model_type!r} has no patches")
    if patch_size is not None:
        config.patch_size = patch_size
    if isinstance(getattr(config, "patch_size", None), int) and any(side % config.patch_size for side in image_size):
        raise ValueError(f"patch_size={config.patch_size} must divide the image size {image_size}: set patch_size")


def vision_config(config: Any) -> Any:
    """Where a configuration says what images it takes: the part of the vision tower, if it has one."""
    return getattr(config, "vision_config", None) or config


def _check_channels(name: str, config: Any, num_channels: int) -> None:
    expected = getattr(vision_config(config), "num_channels", 3)
    if expected != num_channels:
        raise ValueError(
            f"model {name!r} takes images of {expected} channels, the data have {num_channels}: "
            "decode them as RGB (--convert_rgb), or train from scratch (--from_scratch)"
        )
