"""The logits of a classifier: one forward pass, and reading the logits from whatever the model returns."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional import class_score, multi_label_score


def run_classifier(
    model: nn.Module,
    images: Tensor,
    other_inputs: Mapping[str, Any] | None = None,
    *,
    by_name: bool = True,
    num_labels: int | None = None,
) -> tuple[Any, Tensor]:
    """One forward pass; training and evaluation both run and read a model by this function.

    Args:
        model: returns a `ModelOutput` or a dict with `logits`, or the logits alone.
        images: (B, C, H, W).
        other_inputs: further keyword arguments of the model.
        by_name: pass the images as `pixel_values=`, or (`False`) as the first argument; see `takes_pixel_values`.
        num_labels: number of the model's classes; `None` if it is not known.

    Returns:
        The model's own output, and its logits (B, classes).

    Raises:
        ValueError: the output has no logits, or they are not floating point (B, classes).
    """
    others = other_inputs or {}
    outputs = model(pixel_values=images, **others) if by_name else model(images, **others)
    return outputs, logits_of(outputs, len(images), num_labels)


def logits_of(outputs: Any, batch_size: int, num_labels: int | None = None) -> Tensor:
    """The logits in a model's output: its entry or attribute `logits`, or the output itself if it is a tensor.

    A tuple is refused, because nothing says which of its entries holds the logits.

    Args:
        outputs: what the model returned.
        batch_size: B, the number of images that it was given.
        num_labels: number of its classes; `None` if it is not known.

    Raises:
        ValueError: it has none, or they are not floating point (B, classes).
    """
    if isinstance(outputs, Tensor):
        logits = outputs
    else:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(no_logits(outputs))
    classes = logits.shape[1] if logits.ndim == 2 else None
    if (
        classes is None
        or len(logits) != batch_size
        or num_labels not in (None, classes)
        or not torch.is_floating_point(logits)
    ):
        expected = f"({batch_size}, {'classes' if num_labels is None else num_labels})"
        raise ValueError(
            f"the model's logits must be floating point (B, classes), here {expected}, got {logits.dtype} "
            f"{tuple(logits.shape)}: return one row per image, with config.num_labels columns"
        )
    return logits


def no_logits(outputs: Any) -> str:
    """The message of the error about an output that has no logits."""
    return (
        f"the model's output ({type(outputs).__name__}) has no 'logits': return a ModelOutput or a dict with "
        "logits of shape (B, classes)"
    )


def takes_pixel_values(model: nn.Module) -> bool:
    """Whether a model is given its images by the name `pixel_values`; else they are its first argument.

    A forward that names `pixel_values`, at whatever position, gets them by name, as the Trainer passes them. One that
    takes anything (`*args, **kwargs`: PEFT, DDP, a compiled model) is judged by the module that it wraps, its first
    child.
    """
    forward = model.forward
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        # A scripted model keeps its signature in a schema of its own.
        arguments = getattr(getattr(forward, "schema", None), "arguments", ())
        return any(argument.name == "pixel_values" for argument in arguments)
    if any(parameter.name == "pixel_values" for parameter in parameters):
        return True
    kinds = {parameter.kind for parameter in parameters}
    must_be_given = any(
        parameter.default is parameter.empty
        for parameter in parameters
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )
    if inspect.Parameter.VAR_KEYWORD not in kinds or must_be_given:
        return False
    wrapped = next(model.children(), None)
    if inspect.Parameter.VAR_POSITIONAL in kinds and wrapped is not None:
        return takes_pixel_values(wrapped)
    return True


AttributionScore = Literal["logit", "log_prob"]


MULTI_LABEL = "multi_label_classification"


def config_value(model: nn.Module, name: str) -> Any:
    """A value of the model's configuration, also where DDP or torch.compile wraps it; `None` without it."""
    while not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return getattr(getattr(model, "config", None), name, None)


def is_multi_label(model: nn.Module) -> bool:
    """Whether an image may have several labels or none: where the model's configuration says so by `problem_type`.

    Each output then has a sigmoid of its own. Models of all other kinds have exclusive classes and one softmax.
    """
    return config_value(model, "problem_type") == MULTI_LABEL


def refuse_multi_label(model: nn.Module, what: str) -> None:
    """Refuse a multi-label model where one class of each image is meant.

    Args:
        model: any.
        what: the begin of the sentence that goes on with "the one class of an image".

    Raises:
        ValueError: it is one.
    """
    if is_multi_label(model):
        raise ValueError(
            f"{what} the one class of an image: a multi-label model is refused "
            "(config.problem_type='multi_label_classification')"
        )


class LogitsModel(nn.Module):
    """A classifier as a function from images of native resolution to a plain tensor (B, classes).

    Evaluation and captum both use it: captum fails on the `ModelOutput` of `transformers` and timm wrappers.

    Args:
        model: returns a `ModelOutput` or a dict with `logits` (B, classes), or the logits alone. It gets the images as
            `pixel_values=` where its forward knows that name, else as its first argument.
        resize: maps (B, C, H, W) to what the model takes; `None` where the images already come that way.

    Raises:
        ValueError: from `forward`, where the model's output has no logits, or they are not (B, classes) with at least
            2 classes.
    """

    def __init__(self, model: nn.Module, resize: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.model = model
        self.resize = resize
        self.by_name = takes_pixel_values(model)
        self.is_multi_label = is_multi_label(model)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images: (B, C, H, W) -> (B, classes)."""
        if self.resize is not None:
            images = self.resize(images)
        _, logits = run_classifier(self.model, images, by_name=self.by_name)
        if logits.shape[1] < 2:
            raise ValueError(
                f"model must give (B, classes) logits of at least 2 classes, got shape {tuple(logits.shape)}"
            )
        return logits


def target_score(logits: Tensor, target: Tensor, score: AttributionScore) -> Tensor:
    """The scalar whose gradient explains a target: (B,).

    Args:
        logits: (B, classes).
        target: int64 (B,), the class of each image; or of a multi-label model (B, classes), weights of its labels.
        score: `"logit"`, or `"log_prob"` for the logarithm of the softmax, or sigmoid, output.
    """
    return class_score(logits, target, score) if target.ndim == 1 else multi_label_score(logits, target, score)


class ScoreModel(nn.Module):
    """The scalar whose gradient is taken, of each image."""

    def __init__(self, logits_model: LogitsModel, score: AttributionScore):
        super().__init__()
        self.logits_model = logits_model
        self.score = score

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """(B, C, H, W) and the target of `target_score` -> (B,)."""
        return target_score(self.logits_model(images), target, self.score)
