"""Class names: files, splits and models that number the same classes differently are matched by the names."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)


def numbers_by_name(names: Sequence[str], numbered: Sequence[str]) -> list[int]:
    """The number of each of `names` in `numbered`.

    Raises:
        ValueError: a name is not in `numbered`, or occurs twice in one of the two lists; the message has both.
    """
    number = {name: index for index, name in enumerate(numbered)}
    if not number.keys() >= set(names) or len(number) < len(numbered) or len(set(names)) < len(names):
        raise ValueError(f"classes {_shown(names)} cannot be told by name among {_shown(numbered)}")
    return [number[name] for name in names]


def class_names(config: Any) -> list[str]:
    """Names of the classes in a model's configuration, in the order of its logits."""
    names = config.id2label or {}
    return [str(names.get(index, f"LABEL_{index}")) for index in range(config.num_labels)]


def adopt_numbering(model: PreTrainedModel, theirs: Sequence[str], labels: Sequence[str], name: str) -> None:
    """Before training: give each of `labels` the weights that a loaded head has for the class of that name.

    The rows of the head are permuted if both have the same names in different orders. If the names differ, the rows are
    kept as initial weights, with a warning.

    Args:
        model: of as many classes as there are `labels`.
        theirs: names of the classes that its weights were trained for, in their order.
        labels: names of the classes of the data, in the order of the label indices.
        name: of the model, for the warning.
    """
    if _same_names(theirs, labels):
        _permute_classes(model, numbers_by_name(labels, theirs))
    elif _are_names(theirs) and list(theirs) != list(labels):
        logger.warning(
            f"the head of {name!r} was trained for other classes, {_shown(theirs)}, than those of the data, "
            f"{_shown(labels)}: its weights are taken as initial weights, by number"
        )


def match_numbering(model: PreTrainedModel, labels: Sequence[str], name: str) -> None:
    """Before evaluation: let a trained model number its classes as the data do.

    The rows of its head are permuted, and its configuration is renamed, if both have the same names in different
    orders. If the model has no class names, or none of those of the data, classes are matched by number; in the second
    case with a warning.

    Args:
        model: a trained classifier.
        labels: names of the classes of the data, in the order of the label indices.
        name: of the model, for messages.

    Raises:
        ValueError: another number of classes; or names in common that stand at other numbers beside names that are
            not in common.
    """
    theirs = class_names(model.config)
    if len(theirs) != len(labels):
        raise ValueError(f"{name} was trained on another data set: {len(theirs)} classes, not {len(labels)}")
    if theirs == list(labels):
        return
    if _same_names(theirs, labels):
        _permute_classes(model, numbers_by_name(labels, theirs))
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: index for index, label in enumerate(labels)}
        return
    if any(one != other and one in labels for one, other in zip(theirs, labels, strict=True)):
        raise ValueError(
            f"{name} numbers the classes in another order than the data set, and the names are not all the same: "
            f"{_shown(theirs)} there, {_shown(labels)} in the data; rename the classes of one of them"
        )
    if _are_names(theirs):
        logger.warning(
            f"{name} names its classes {_shown(theirs)}, the data set {_shown(labels)}: classes are taken by number"
        )


def _same_names(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether both hold the same names, each once."""
    return len(one) == len(other) == len(set(one)) and set(one) == set(other)


def _are_names(names: Sequence[str]) -> bool:
    """Not what transformers calls the classes of a model that was never given names."""
    return any(name != f"LABEL_{index}" for index, name in enumerate(names))


@torch.no_grad()
def _permute_classes(model: PreTrainedModel, rows: Sequence[int]) -> None:
    """Let class i have the weights of class `rows[i]`, in place.

    What of a model belongs to a class differs from head to head (two heads, a norm behind them): it is whatever has
    another shape in the same architecture with one class more.
    """
    if list(rows) == list(range(len(rows))):
        return
    config = copy.deepcopy(model.config)
    config.num_labels = len(rows) + 1
    with torch.device("meta"):
        wider = type(model)(config)
    shapes = {name: tensor.shape for name, tensor in [*wider.named_parameters(), *wider.named_buffers()]}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for side, length in enumerate(tensor.shape):
            if shapes[name][side] != length:
                tensor.copy_(tensor.index_select(side, torch.tensor(rows, device=tensor.device)))


def _shown(names: Sequence[str]) -> str:
    """The first names of a list, for a message of one line."""
    return f"{list(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
