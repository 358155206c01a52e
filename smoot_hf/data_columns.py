"""The columns of an image classification data set: which holds the images, which the labels."""

from datasets import ClassLabel, DatasetDict, Features, Image

IMAGE, PIXELS, LABELS = "image", "pixel_values", "labels"


def find_column(features: Features, feature_type: type, given: str | None, argument: str) -> str:
    """The one column of a feature type, or the given one.

    Raises:
        ValueError: none, several, or one of another type; the message lists the candidates.
    """
    if given is not None:
        if given not in features:
            raise ValueError(f"{argument}={given!r} is not a column of the data set, only {list(features)}")
        # Labels may be plain numbers or text, images not.
        if feature_type is Image and not isinstance(features[given], Image):
            raise ValueError(f"{argument}={given!r} must hold images, but is of type {features[given]}")
        return given
    candidates = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    if len(candidates) == 1:
        return candidates[0]
    found = f"several columns could be meant, {candidates}" if candidates else f"no column of {dict(features)} fits"
    hint = ". An imagefolder has a folder for each class, two or more" if feature_type is ClassLabel else ""
    raise ValueError(f"{argument} must be set: {found} (type {feature_type.__name__}){hint}")


def as_class_labels(splits: DatasetDict) -> DatasetDict:
    """Number the labels of a plain column of integers or strings, in the same way in every split.

    Raises:
        ValueError: a sample without a label, or labels that are neither integers nor strings.
    """
    if isinstance(splits["train"].features[LABELS], ClassLabel):
        return splits
    present = {value for split in splits.values() for value in split.unique(LABELS)}
    if None in present:
        raise ValueError("label_column has samples without a label (null): leave them out")
    values = sorted(present)
    if not all(isinstance(value, int | str) for value in values):
        raise ValueError(f"label_column must hold class labels, integers or strings, got {values[:5]}")
    number = {value: index for index, value in enumerate(values)}
    class_label = ClassLabel(names=[str(value) for value in values])
    for name, split in splits.items():
        numbers = [number[value] for value in split[LABELS]]
        splits[name] = split.remove_columns(LABELS).add_column(LABELS, numbers, feature=class_label)
    return splits
