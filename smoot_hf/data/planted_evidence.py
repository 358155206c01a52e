"""Planted evidence: image sets made on the spot from small images, in which it is known where the evidence lies.

Every set says where in an image the label can be read (`evidence`), so that `evaluate_localisation` can tell a saliency
map that points there from one that points elsewhere. All are made in memory from uint8 arrays, and a seed fixes them.

| set | an image | the evidence |
|---|---|---|
| `block` | a block with the object and a null block, one above the other, the order random (BlockMNIST, 2102.12781) | the object's block |
| `block-fixed` | the same, the object always above: its control | the object's block |
| `pair` | an object of one set beside one of another, the order random; labels of either set, images the same | the labelled object's block |
| `on-photo` | an object and a smaller distractor of another class on a photo, both anywhere | the square of the larger object |
| `decoy` | an object, and in a corner a patch whose grey tells the label in training (DecoyMNIST, 1703.03717) | the patch |
| `several` | up to three objects of different classes and null blocks, in two rows of two; a label for each object | of each label its object's block |

The null block is black with the outline of a white square in its middle, half as high and wide as the block; it is the
same in every image. In `decoy` the map of a model that takes the shortcut *should* light the patch up: it tests whether
a map warns of the risk, not whether it is faithful to a cause that is known.
"""  # noqa: E501

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import load_image_dataset
from .decoded_images import DecodedImages, decode_images, evidence_masks
from .sample_photos import photos_of_scikit_learn

PlantedSet = Literal["block", "block-fixed", "pair", "on-photo", "decoy", "several"]
# uint8 (N, C, h, w) and labels int64 (N,).
LabelledPixels = tuple[Tensor, Tensor]

# Keeps the draws of the sets apart, which take the same seed.
_STREAMS = {"block": 1, "pair": 2, "on-photo": 3, "decoy": 4, "several": 5}
# Of `several`: how often an image has 0, 1, 2 and 3 objects, in tenths.
_OBJECTS_OF_TEN = (1.0, 3.0, 3.0, 3.0)


class PlantedImages(torch.utils.data.Dataset):
    """Images with labels and evidence masks, fetched a batch at a time.

    Args:
        pixel_values: uint8 (N, C, H, W).
        labels: int64 (N,), or of several labels float32 (N, classes) of 0 and 1.
        evidence: bool (N, H, W), `True` where the label can be read; of several labels int16 (N, H, W), the label that
            can be read at a position, -1 where there is none.
    """

    def __init__(self, pixel_values: Tensor, labels: Tensor, evidence: Tensor) -> None:
        self.pixel_values, self.labels, self.evidence = pixel_values, labels, evidence

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One image: "pixel_values" uint8 (C, H, W), "labels" int, "evidence" bool (H, W).

        Of several labels "labels" is float32 (classes,), and "evidence" bool (classes, H, W).
        """
        row = {name: values[0] for name, values in self.__getitems__([index]).items()}
        return {**row, "labels": row["labels"] if self.labels.ndim > 1 else int(row["labels"])}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch: the entries of `__getitem__`, stacked."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        labels = self.labels[rows]
        evidence = evidence_masks(self.evidence[rows], labels)
        return {"pixel_values": self.pixel_values[rows], "labels": labels, "evidence": evidence}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.pixel_values.shape[1:]
        return channels, height, width

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of pixels / 255: what `InputPipeline` takes."""
        channels = self.pixel_values.transpose(0, 1).flatten(1)
        counts = torch.stack([torch.bincount(channel.int(), minlength=256) for channel in channels]).double()
        weights = counts / counts.sum(dim=1, keepdim=True)
        grey = torch.arange(256, dtype=torch.float64) / 255
        mean = weights @ grey
        deviation = (weights * (grey - mean[:, None]) ** 2).sum(dim=1).sqrt()
        return tuple(mean.tolist()), tuple(deviation.tolist())


def plant_block(pixels: Tensor, labels: Tensor, *, seed: int, is_fixed: bool = False) -> PlantedImages:
    """`block`: each image above or below a null block (BlockMNIST); or always above it (`block-fixed`).

    Args:
        pixels: uint8 (N, C, h, w), h and w at least 4.
        labels: int64 (N,).
        seed: of the order; give the training and the test set seeds of their own.
        is_fixed: the image above in every one.

    Returns:
        N images (C, 2h, w); the evidence is the whole block of the object.

    Raises:
        ValueError: pixels or labels of another type or shape.
    """
    _check(pixels, labels)
    is_above = torch.rand(len(pixels), generator=_generator("block", seed)) < 0.5
    if is_fixed:
        is_above = torch.ones_like(is_above)
    null = null_block(*pixels.shape[1:]).expand_as(pixels)
    return _blocks(pixels, null, is_above, labels, dim=2)


def null_block(channels: int, height: int, width: int) -> Tensor:
    """The null block, uint8 (C, h, w): black, with the outline of a white square half as high and wide in its middle.

    The outline is h // 14 pixels thick, at least one.
    """
    block = torch.zeros(channels, height, width, dtype=torch.uint8)
    top, left, line = height // 4, width // 4, max(1, height // 14)
    block[:, top : height - top, left : width - left] = 255
    block[:, top + line : height - top - line, left + line : width - left - line] = 0
    return block


def plant_pair(
    pixels: Tensor,
    labels: Tensor,
    other_pixels: Tensor,
    other_labels: Tensor,
    *,
    seed: int,
    labelled: Literal["first", "second"] = "first",
) -> PlantedImages:
    """`pair`: each image beside one drawn from another set, the order random.

    With the same seed the images are the same for both values of `labelled`. Two models, one trained on each, look at
    the same pixels for other reasons: what draws the gradient of both cannot be the evidence of either.

    Args:
        pixels: uint8 (N, C, h, w), the first set, for example digits.
        labels: int64 (N,).
        other_pixels: uint8 (M, C, h, w), the second, for example clothes; each image takes one at random.
        other_labels: int64 (M,).
        seed: of the order and the partners.
        labelled: whose labels the images carry, and whose block is the evidence.

    Returns:
        N images (C, h, 2w).

    Raises:
        ValueError: pixels or labels of another type or shape, images of two shapes, or an unknown choice.
    """
    _check(pixels, labels)
    _check(other_pixels, other_labels)
    if pixels.shape[1:] != other_pixels.shape[1:]:
        raise ValueError(
            f"both sets must have images of one shape, got {tuple(pixels.shape[1:])} and "
            f"{tuple(other_pixels.shape[1:])}"
        )
    if labelled not in ("first", "second"):
        raise ValueError(f"labelled must be 'first' or 'second', got {labelled!r}")
    generator = _generator("pair", seed)
    is_left = torch.rand(len(pixels), generator=generator) < 0.5
    partner = torch.randint(len(other_pixels), (len(pixels),), generator=generator)
    if labelled == "first":
        return _blocks(pixels, other_pixels[partner], is_left, labels, dim=3)
    return _blocks(other_pixels[partner], pixels, ~is_left, other_labels[partner], dim=3)


def plant_on_photo(pixels: Tensor, labels: Tensor, photos: Tensor, *, seed: int) -> PlantedImages:
    """`on-photo`: each object on a photo, with a smaller one of another class as a distractor; the two do not overlap.

    The object is shrunk or blown up to half the photo's height and width, the distractor to five sixteenths. Their ink
    is white where the photo under them is dark (mean below 128), and black elsewhere.

    Args:
        pixels: uint8 (N, 1, h, w), light ink on black; at least two classes.
        labels: int64 (N,).
        photos: uint8 (M, C, H, W), H and W at least 16; each image takes one at random.
        seed: of photos, distractors and places.

    Returns:
        N images (C, H, W); the evidence is the square in which the larger object stands.

    Raises:
        ValueError: pixels, labels or photos of another type or shape, or a single class.
    """
    _check(pixels, labels)
    if photos.dtype != torch.uint8 or photos.ndim != 4 or min(photos.shape[2:]) < 16 or pixels.shape[1] != 1:
        raise ValueError(
            "photos must be uint8 (M, C, H, W) of 16 pixels or more, and pixels have one channel, "
            f"got {photos.dtype} {tuple(photos.shape)} and {tuple(pixels.shape)}"
        )
    if len(labels.unique()) < 2:
        raise ValueError("the distractor needs another class, got images of one class alone")
    generator, count = _generator("on-photo", seed), len(pixels)
    images = photos[torch.randint(len(photos), (count,), generator=generator)].clone()
    distractor = _of_another_class(labels, generator)
    height, width = images.shape[2:]
    sides = ((height // 2, width // 2), (5 * height // 16, 5 * width // 16))
    corners = _places(count, (height, width), sides, generator)
    masks = []
    for rows, side, corner in zip((torch.arange(count), distractor), sides, corners, strict=True):
        ink = F.interpolate(pixels[rows].float(), side, mode="bilinear", antialias=True) / 255
        masks.append(_print(images, ink, corner))
    return PlantedImages(images, labels, masks[0])


def plant_decoy(pixels: Tensor, labels: Tensor, *, seed: int, leaks: bool) -> PlantedImages:
    """`decoy`: in a random corner of each image a patch whose grey tells the label in training, and nothing in testing.

    The patch is a seventh of the height wide (4 pixels of 28), at least 1; of C classes, class c has the grey
    255 * (C - c) / C. Accuracy on images that do not leak shows how far the model relies on the patch.

    Args:
        pixels: uint8 (N, C, h, w).
        labels: int64 (N,) from 0.
        seed: of the corners, and of the grey where nothing leaks.
        leaks: the grey is that of the label (training), or of a class at random (testing).

    Returns:
        N images of the same shape; the evidence, which a model trained on the leak should be caught at, is the patch.

    Raises:
        ValueError: pixels or labels of another type or shape.
    """
    _check(pixels, labels)
    generator, classes = _generator("decoy", seed), int(labels.max()) + 1
    height, width = pixels.shape[2:]
    side = max(1, height // 7)
    is_low, is_right = (torch.rand(2, len(pixels), generator=generator) < 0.5).unbind()
    told = labels if leaks else torch.randint(classes, labels.shape, generator=generator)
    grey = (255 * (classes - told) / classes).round().to(torch.uint8)
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = torch.where(is_low[:, None], rows >= height - side, rows < side)
    in_columns = torch.where(is_right[:, None], columns >= width - side, columns < side)
    evidence = in_rows[:, :, None] & in_columns[:, None, :]
    images = torch.where(evidence[:, None], grey[:, None, None, None], pixels)
    return PlantedImages(images, labels, evidence)


def plant_several(pixels: Tensor, labels: Tensor, *, classes: int, seed: int) -> PlantedImages:
    """`several`: up to three objects of different classes in an image of two rows of two blocks, the others null.

    A tenth of the images has no object, and three tenths each have one, two and three, or as many as there are classes.
    Their classes are drawn first, all alike, then an image of each class, and the blocks that they stand in.

    Args:
        pixels: uint8 (N, C, h, w).
        labels: int64 (N,) from 0.
        classes: the number of labels; some may have no image here.
        seed: of all draws.

    Returns:
        N images (C, 2h, 2w) with float32 labels (N, classes), 1 for each object; the evidence of a label is the whole
        block of its object.

    Raises:
        ValueError: pixels or labels of another type or shape, or a label outside [0, classes).
    """
    _check(pixels, labels)
    present, sizes = labels.unique(return_counts=True)
    if int(present.min()) < 0 or int(present.max()) >= classes:
        raise ValueError(f"labels must lie in [0, {classes - 1}], got {present.tolist()}")
    generator, count = _generator("several", seed), len(pixels)
    number = torch.multinomial(torch.tensor(_OBJECTS_OF_TEN), count, replacement=True, generator=generator)
    chosen = torch.rand(count, len(present), generator=generator).argsort(dim=1)[:, :3]
    # Its place among the images of its class, which stand together in this order.
    draw = (torch.rand(chosen.shape, generator=generator, dtype=torch.float64) * sizes[chosen]).long()
    rows = labels.argsort(stable=True)[(sizes.cumsum(0) - sizes)[chosen] + draw]
    # -1, the last row of all, is the null block.
    rows[torch.arange(rows.shape[1]) >= number[:, None]] = -1
    order = torch.rand(count, 4, generator=generator).argsort(dim=1)
    blocks = F.pad(rows, (0, 4 - rows.shape[1]), value=-1).gather(1, order)
    images = torch.cat([pixels, null_block(*pixels.shape[1:])[None]])[blocks].unflatten(1, (2, 2))
    label_of_block = torch.cat([labels, torch.tensor([-1])])[blocks]
    evidence = label_of_block.to(torch.int16).unflatten(1, (2, 2))
    height, width = pixels.shape[2:]
    evidence = evidence.repeat_interleave(height, dim=1).repeat_interleave(width, dim=2)
    has_label = (label_of_block[:, :, None] == torch.arange(classes)).any(dim=1).float()
    return PlantedImages(images.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3), has_label, evidence)


def plant_splits(
    name: PlantedSet,
    splits: Mapping[str, LabelledPixels],
    *,
    seed: int = 0,
    others: Mapping[str, LabelledPixels] | None = None,
    photos: Mapping[str, Tensor] | None = None,
    labelled: Literal["first", "second"] = "first",
) -> dict[str, PlantedImages]:
    """A planted set by its name, made of the splits "train" and "test" of small images.

    Args:
        name: of the set.
        splits: "train" and "test": uint8 (N, C, h, w) and labels int64 (N,).
        seed: of all draws; each split has draws of its own.
        others: the partners of `pair`, by split.
        photos: the backgrounds of `on-photo`, uint8 (M, C, H, W) by split.
        labelled: whose labels the images of `pair` carry.

    Returns:
        "train" and "test". In `decoy` the patch tells the label in "train" alone.

    Raises:
        ValueError: an unknown name, a split that is missing, or a set without the partners or photos that it takes.
    """
    if name not in get_args(PlantedSet):
        raise ValueError(f"name must be one of {', '.join(map(repr, get_args(PlantedSet)))}, got {name!r}")
    for argument, given in {"splits": splits, "others": others, "photos": photos}.items():
        needed = argument == "splits" or (name, argument) in (("pair", "others"), ("on-photo", "photos"))
        if needed and (given is None or not {"train", "test"} <= given.keys()):
            raise ValueError(f"{argument} must hold 'train' and 'test' for {name!r}, got {given and sorted(given)}")
    planted = {}
    for number, split in enumerate(("train", "test")):
        pixels, labels = splits[split]
        draws = 2 * seed + number
        if name == "pair":
            assert others is not None
            planted[split] = plant_pair(pixels, labels, *others[split], seed=draws, labelled=labelled)
        elif name == "on-photo":
            assert photos is not None
            planted[split] = plant_on_photo(pixels, labels, photos[split], seed=draws)
        elif name == "several":
            classes = 1 + max(int(of_split.max()) for _, of_split in splits.values())
            planted[split] = plant_several(pixels, labels, classes=classes, seed=draws)
        elif name == "decoy":
            planted[split] = plant_decoy(pixels, labels, seed=draws, leaks=split == "train")
        else:
            planted[split] = plant_block(pixels, labels, seed=draws, is_fixed=name == "block-fixed")
    return planted


def plant_images(
    name: Literal["block", "block-fixed", "decoy", "several"], images: Mapping[str, DecodedImages], *, seed: int = 0
) -> dict[str, DecodedImages]:
    """A planted set made of decoded images, for all that takes these: the rows gain the evidence, the classes stay.

    All images are held in memory, as small ones can be. `pair` and `on-photo` need a second set: see `plant_splits`.

    Args:
        name: of the set.
        images: "train" and "test".
        seed: as in `plant_splits`.

    Returns:
        "train" and "test".

    Raises:
        ValueError: a set that needs more than these images, or images below 4x4 pixels.
    """
    planted = plant_splits(name, {split: _pixels_of(rows) for split, rows in images.items()}, seed=seed)
    return {
        split: DecodedImages.of_tensors(found.pixel_values, found.labels, images[split].label_names, found.evidence)
        for split, found in planted.items()
    }


def planted_digits(
    name: PlantedSet, *, seed: int = 0, labelled: Literal["first", "second"] = "first"
) -> dict[str, PlantedImages]:
    """A planted set of scikit-learn's handwritten digits: 1,437 training and 360 test images of 8x8 pixels.

    The partners of `pair` are the same split's digits in negative; the photos of `on-photo` are crops of 16x16 pixels
    from the two that scikit-learn ships, 1,000 for training and 500 for testing.

    Args:
        name: of the set.
        seed: of all draws.
        labelled: as in `plant_splits`.

    Returns:
        "train" and "test".

    Raises:
        ValueError: an unknown name.
        ImportError: scikit-learn is not installed.
    """
    decoded = decode_images(load_image_dataset("digits"))
    splits = {split: _pixels_of(DecodedImages(rows)) for split, rows in decoded.items()}
    others = photos = None
    if name == "pair":
        others = {split: (255 - pixels, labels) for split, (pixels, labels) in splits.items()}
    elif name == "on-photo":
        counts = {"train": 1000, "test": 500}
        photos = {
            split: photos_of_scikit_learn(count, 16, seed=2 * seed + number)
            for number, (split, count) in enumerate(counts.items())
        }
    return plant_splits(name, splits, seed=seed, others=others, photos=photos, labelled=labelled)


def _pixels_of(images: DecodedImages) -> LabelledPixels:
    batch = images.__getitems__(range(len(images)))
    return batch["pixel_values"], batch["labels"]


def _check(pixels: Tensor, labels: Tensor) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or min(pixels.shape) < 1 or min(pixels.shape[2:]) < 4:
        raise ValueError(
            "pixels must be uint8 (N, C, h, w), at least one image of 4x4 pixels or more, "
            f"got {pixels.dtype} {tuple(pixels.shape)}"
        )
    if labels.dtype != torch.int64 or tuple(labels.shape) != (len(pixels),):
        raise ValueError(f"labels must be int64 ({len(pixels)},), got {labels.dtype} {tuple(labels.shape)}")


def _generator(name: str, seed: int) -> torch.Generator:
    state = np.random.SeedSequence([_STREAMS[name], seed]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def _blocks(first: Tensor, second: Tensor, is_first: Tensor, labels: Tensor, dim: int) -> PlantedImages:
    """Two blocks joined along a dimension, `first` in front where `is_first` (N,); it holds the evidence."""
    chosen = is_first[:, None, None, None]
    images = torch.cat([torch.where(chosen, first, second), torch.where(chosen, second, first)], dim=dim)
    on_first = torch.ones_like(first[:, 0], dtype=torch.bool)
    chosen = is_first[:, None, None]
    evidence = torch.cat([on_first & chosen, on_first & ~chosen], dim=dim - 1)
    return PlantedImages(images, labels, evidence)


def _of_another_class(labels: Tensor, generator: torch.Generator) -> Tensor:
    """For each image the row of one of another class, drawn uniformly from all of those."""
    by_class = labels.argsort(stable=True)
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    start, own = (counts.cumsum(0) - counts)[inverse], counts[inverse]
    # A draw among the others, whose rows are those before and behind the block of the own class.
    draw = (torch.rand(len(labels), generator=generator, dtype=torch.float64) * (len(labels) - own)).long()
    return by_class[torch.where(draw < start, draw, draw + own)]


def _places(
    count: int, size: tuple[int, int], sides: Sequence[tuple[int, int]], generator: torch.Generator
) -> list[Tensor]:
    """Top left corners of two rectangles, uniform among the places where they do not overlap: int64 (N, 2) each."""
    ends = torch.tensor([[whole - part + 1 for whole, part in zip(size, side, strict=True)] for side in sides])
    (height, width), (other_height, other_width) = sides
    corners = torch.zeros(count, 2, 2, dtype=torch.int64)
    overlap = torch.ones(count, dtype=torch.bool)
    while bool(overlap.any()):
        draw = torch.rand(int(overlap.sum()), 2, 2, generator=generator, dtype=torch.float64)
        corners[overlap] = (draw * ends).long()
        (top, left), (other_top, other_left) = (corners[:, which].unbind(dim=1) for which in (0, 1))
        overlap = (top < other_top + other_height) & (other_top < top + height)
        overlap &= (left < other_left + other_width) & (other_left < left + width)
    return list(corners.unbind(dim=1))


def _print(images: Tensor, ink: Tensor, corner: Tensor) -> Tensor:
    """Print ink (N, 1, h, w) in [0, 1] on the images, in place, at each one's corner; returns where, bool (N, H, W)."""
    height, width = ink.shape[2:]
    rows = corner[:, 0, None, None, None] + torch.arange(height)[None, None, :, None]
    columns = corner[:, 1, None, None, None] + torch.arange(width)[None, None, None, :]
    image = torch.arange(len(images))[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    ground = images[image, channel, rows, columns].float()
    colour = torch.where(ground.mean(dim=(1, 2, 3), keepdim=True) < 128, 255.0, 0.0)
    images[image, channel, rows, columns] = (ground + (colour - ground) * ink).round().clamp(0, 255).to(torch.uint8)
    where = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
    where[image[:, 0], rows[:, 0], columns[:, 0]] = True
    return where
