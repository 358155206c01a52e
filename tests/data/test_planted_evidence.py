"""Planted sets: what they hold is where they say, nothing of the label is elsewhere, and a seed fixes them."""

import pickle

import datasets
import pytest
import torch
from conftest import tiny_cnn

from smoot_hf.data import (
    DecodedImages,
    InputPipeline,
    decode_images,
    load_image_dataset,
    plant_images,
    plant_splits,
    planted_digits,
)
from smoot_hf.data.planted_evidence import (
    null_block,
    plant_block,
    plant_decoy,
    plant_on_photo,
    plant_pair,
    plant_several,
)
from smoot_hf.evaluation import evaluate_localisation

# Of one label for each image.
SETS = ["block", "block-fixed", "pair", "on-photo", "decoy"]


def objects(count=40, channels=1, size=14, classes=5, seed=0):
    """Noise images without black, so that a block shows where it is, and labels in no order."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 256, (count, channels, size, size), generator=generator).to(torch.uint8)
    return pixels, torch.randint(classes, (count,), generator=generator)


def photos(count=9, size=32):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(7)).to(torch.uint8)


def make(name, seed=0, labelled="first"):
    kinds = {"train": objects(), "test": objects(seed=1)}
    others = {"train": objects(30, seed=2), "test": objects(30, seed=3)}
    backgrounds = {"train": photos(), "test": photos()}
    return plant_splits(name, kinds, seed=seed, others=others, photos=backgrounds, labelled=labelled)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_block_holds_the_object_and_the_null_block_nothing(channels):
    """Catches evidence that marks the null block, a null block that differs between images, and a label that moved."""
    pixels, labels = objects(channels=channels)
    found = plant_block(pixels, labels, seed=3)
    assert found.image_shape == (channels, 28, 14)
    assert torch.equal(found.labels, labels)
    null = null_block(channels, 14, 14)
    tops = []
    for row in range(len(pixels)):
        image, evidence = found.pixel_values[row], found.evidence[row]
        assert torch.equal(image[:, evidence].reshape(pixels[row].shape), pixels[row])
        assert torch.equal(image[:, ~evidence].reshape(null.shape), null)
        tops.append(bool(evidence[:14].all()))
        assert evidence[14:].any() != tops[-1]
    assert 8 < sum(tops) < 32


def test_the_null_pattern_is_what_the_module_says():
    """Catches a pattern that reaches the edge, or that is not the one stated."""
    block = null_block(1, 28, 28)[0]
    assert block[7:21, 7:21].bool().sum() == 14 * 14 - 10 * 10
    assert block.bool().sum() == 14 * 14 - 10 * 10
    assert set(block.unique().tolist()) == {0, 255}


def test_the_fixed_control_is_always_above():
    """Catches a control that is the set itself."""
    pixels, labels = objects()
    found = plant_block(pixels, labels, seed=3, is_fixed=True)
    assert found.evidence[:, :14].all()
    assert not found.evidence[:, 14:].any()
    assert torch.equal(found.pixel_values[:, :, :14], pixels)


def test_a_pair_is_the_same_image_under_either_label():
    """Catches two label sets on two sets of images: the contrast of the models would be one of the images."""
    first, second = (
        plant_pair(*objects(), *objects(30, seed=2), seed=4, labelled=which) for which in ("first", "second")
    )
    assert torch.equal(first.pixel_values, second.pixel_values)
    assert torch.equal(first.evidence, ~second.evidence)
    assert not torch.equal(first.labels, second.labels)
    for found, (pixels, labels) in ((first, objects()), (second, objects(30, seed=2))):
        for row in range(len(found)):
            shown = found.pixel_values[row][:, found.evidence[row]].reshape(1, 14, 14)
            same = (pixels == shown).flatten(1).all(dim=1)
            assert labels[same].tolist() == [found.labels[row].item()]
    on_left = first.evidence[:, 0, 0]
    assert 8 < on_left.sum() < 32


def test_on_a_photo_object_and_distractor_stand_apart():
    """Catches a distractor over the object, one of its own class, and ink outside the square that is marked."""
    pixels, labels = objects(200)
    pixels[:] = 255
    ground = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    found = plant_on_photo(pixels, labels, ground, seed=5)
    for row in range(len(found)):
        image, evidence = found.pixel_values[row], found.evidence[row]
        assert evidence.sum() == 16 * 16
        assert (image[:, evidence] == 255).all()
        outside = (image == 255).all(dim=0) & ~evidence
        assert outside.sum() == 10 * 10
        top, left = (int(outside.any(dim=dim).nonzero()[0]) for dim in (1, 0))
        assert outside[top : top + 10, left : left + 10].all()
    # Every place is taken now and then: with 200 draws none of the quarters stays empty.
    centre = found.evidence.flatten(1).float().argmax(1)
    assert {(int(c) // 32 >= 8, int(c) % 32 >= 8) for c in centre} == {
        (a, b) for a in (False, True) for b in (False, True)
    }


def test_the_distractor_is_of_another_class():
    """Catches a distractor that is evidence too. The grey of an object tells its class here."""
    labels = torch.arange(60) % 3
    pixels = (85 * (labels + 1)).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    ground = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    found = plant_on_photo(pixels, labels, ground, seed=5)
    of_distractor = []
    for row in range(60):
        grey = found.pixel_values[row, 0][~found.evidence[row]].max().item()
        of_distractor.append(grey // 85 - 1)
        assert found.pixel_values[row, 0][found.evidence[row]].unique().tolist() == [85 * (labels[row] + 1)]
    shown = torch.tensor(of_distractor)
    assert (shown != labels).all()
    assert all(((labels == one) & (shown == other)).any() for one in range(3) for other in range(3) if one != other)


@pytest.mark.parametrize("leaks", [True, False])
def test_a_decoy_tells_the_label_in_training_alone(leaks):
    """Catches a leak that goes on in the test set: its accuracy would say nothing of the shortcut."""
    pixels, labels = objects(400)
    found = plant_decoy(pixels, labels, seed=6, leaks=leaks)
    assert (found.evidence.sum(dim=(1, 2)) == 4).all()
    assert torch.equal(found.pixel_values[:, 0][~found.evidence], pixels[:, 0][~found.evidence])
    grey = found.pixel_values[:, 0][found.evidence].reshape(400, 4)
    assert (grey == grey[:, :1]).all()
    told = (5 - grey[:, 0].double() * 5 / 255).round().long()
    assert bool((told == labels).all()) == leaks
    assert set(told.tolist()) == set(range(5))
    corners = {tuple(mask.nonzero()[0].tolist()) for mask in found.evidence}
    assert corners == {(0, 0), (0, 12), (12, 0), (12, 12)}


@pytest.mark.parametrize("channels", [1, 3])
def test_several_labels_are_those_of_the_objects_shown(channels):
    """Catches a label without its object, an object without its label, evidence on another block, a class twice."""
    pixels, labels = objects(300, channels, size=6)
    labels[labels == 1] = 6
    data = plant_several(pixels, labels, classes=8, seed=2)
    assert data.image_shape == (channels, 12, 12)
    assert (data.labels.shape, data.labels.dtype) == ((300, 8), torch.float32)
    null, blocks_of = null_block(channels, 6, 6), {}
    for row, sample in enumerate(data):
        found = []
        for top, left in ((0, 0), (0, 6), (6, 0), (6, 6)):
            here = slice(top, top + 6), slice(left, left + 6)
            block = sample["pixel_values"][:, *here]
            (source,) = (pixels == block).flatten(1).all(dim=1).nonzero()[:, 0].tolist() or [None]
            marked = sample["evidence"][:, *here].flatten(1)
            assert torch.equal(marked.all(dim=1), marked.any(dim=1))
            if source is None:
                assert torch.equal(block, null)
                assert not marked.any()
            else:
                label = int(labels[source])
                assert marked.any(dim=1).nonzero()[:, 0].tolist() == [label]
                found.append(label)
                blocks_of.setdefault(len(found), set()).add((top, left))
        assert sorted(found) == sample["labels"].nonzero()[:, 0].tolist(), row
    # Of 300 images 30 have no object, and 90 each one, two and three: within four standard deviations.
    counts = torch.bincount(data.labels.sum(dim=1).long())
    assert (counts - torch.tensor([30, 90, 90, 90])).abs().le(32).all()
    assert data.labels.sum(dim=0).gt(0).tolist() == [True, False, True, True, True, False, True, False]
    assert blocks_of[1] == {(0, 0), (0, 6), (6, 0), (6, 6)}


def test_of_few_classes_there_are_fewer_objects():
    """Catches a class twice in one image, and a split of one image, which is what some commands load of training."""
    pixels, labels = objects(200, size=6)
    data = plant_several(pixels, labels % 2, classes=5, seed=2)
    assert data.labels.sum(dim=1).unique().tolist() == [0, 1, 2]
    assert len(plant_several(pixels[:1], labels[:1], classes=5, seed=2)) == 1


def test_several_objects_of_both_splits_are_labelled_alike():
    """Catches a test set with fewer labels than the training set has, and images of one split shown in the other."""
    (pixels, labels), (test_pixels, _) = objects(60, size=6, classes=5), objects(60, size=6, seed=1)
    found = plant_splits("several", {"train": (pixels, labels), "test": (test_pixels, labels % 3)})
    assert {split: data.labels.shape for split, data in found.items()} == {"train": (60, 5), "test": (60, 5)}
    assert not found["test"].labels[:, 3:].any()
    for split, own in (("train", pixels), ("test", test_pixels)):
        shown = found[split].__getitems__(range(60))
        first = shown["pixel_values"][shown["evidence"].any(dim=1)[:, None]].reshape(-1, 6)
        assert torch.isin(first, own).all()


@pytest.mark.parametrize("name", [*SETS, "several"])
def test_a_seed_fixes_a_set(name):
    """Catches draws from the global generator, and splits or seeds that share their draws."""
    torch.manual_seed(1)
    one, state = make(name), torch.get_rng_state()
    torch.manual_seed(2)
    again, other = make(name), make(name, seed=1)
    torch.manual_seed(1)
    make(name)
    assert torch.equal(torch.get_rng_state(), state)
    for split in ("train", "test"):
        assert torch.equal(one[split].pixel_values, again[split].pixel_values)
        assert torch.equal(one[split].evidence, again[split].evidence)
        assert torch.equal(one[split].pixel_values, other[split].pixel_values) == (name == "block-fixed")
    if name != "block-fixed":
        assert not torch.equal(one["train"].evidence, one["test"].evidence)


@pytest.mark.parametrize("name", ["on-photo", "several"])
def test_rows_and_batches_are_the_same(name):
    """Catches a batch whose masks belong to other images; statistics are those of all pixels."""
    data = make(name)["train"]
    batch = data.__getitems__([5, 0, 5])
    for place, row in enumerate([5, 0, 5]):
        for key in ("pixel_values", "evidence", "labels"):
            assert torch.equal(batch[key][place], torch.as_tensor(data[row][key]))
    mean, std = data.channel_statistics()
    pixels = data.pixel_values.double() / 255
    assert mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_digits_are_planted_and_judged_without_files(name):
    """Catches a set that the measurement cannot read."""
    splits = planted_digits(name)
    assert [len(splits[split]) for split in ("train", "test")] == [1437, 360]
    channels, height, width = splits["test"].image_shape
    model = tiny_cnn(image_size=[height, width], num_channels=channels, num_labels=10)
    pipeline = InputPipeline(*splits["train"].channel_statistics())
    found = evaluate_localisation(model, splits["test"], only_correct=False, input_pipeline=pipeline)
    assert found.n == 360
    assert found.outside[0.1].chance == pytest.approx({"on-photo": 75, "decoy": 100 * 63 / 64}.get(name, 50))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, y: plant_block(p.float(), y, seed=0), "pixels must be uint8"),
        (lambda p, y: plant_block(p[:, 0], y, seed=0), "pixels must be uint8"),
        (lambda p, y: plant_block(p, y[:3], seed=0), r"labels must be int64 \(40,\)"),
        (lambda p, y: plant_pair(p, y, p[..., :8], y, seed=0), "images of one shape"),
        (lambda p, y: plant_pair(p, y, p, y, seed=0, labelled="both"), "labelled must be"),
        (lambda p, y: plant_on_photo(p, y, photos(size=8), seed=0), "photos must be"),
        (lambda p, y: plant_on_photo(p, 0 * y, photos(), seed=0), "another class"),
        (lambda p, y: plant_several(p, y, classes=4, seed=0), r"labels must lie in \[0, 3\], got \[0, 1, 2, 3, 4\]"),
        (lambda p, y: plant_several(p, y - 1, classes=4, seed=0), r"labels must lie in \[0, 3\], got \[-1, 0"),
        (lambda p, y: plant_splits("blocks", {}), "name must be one of 'block'"),
        (lambda p, y: plant_splits("block", {"train": (p, y)}), "splits must hold 'train' and 'test'"),
        (lambda p, y: plant_splits("pair", {"train": (p, y), "test": (p, y)}), "others must hold"),
        (lambda p, y: plant_splits("on-photo", {"train": (p, y), "test": (p, y)}), "photos must hold"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    """Catches a set of garbage, or an error from deep inside torch."""
    with pytest.raises(ValueError, match=message):
        call(*objects())


# --- decoded images that carry their evidence ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoded_digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        decoded = decode_images(load_image_dataset("digits"))
        return {split: DecodedImages(rows) for split, rows in decoded.items()}


@pytest.mark.parametrize("name", ["block", "block-fixed", "decoy", "several"])
def test_decoded_images_are_planted_as_the_tensors_are(name, decoded_digits):
    """Catches rows out of order on the way into Arrow, another seed for the masks than for the pixels, lost classes."""
    expected = planted_digits(name, seed=3)
    for split, images in plant_images(name, decoded_digits, seed=3).items():
        batch = images.__getitems__([5, 0, -1])
        for key, values in expected[split].__getitems__([5, 0, len(images) - 1]).items():
            assert torch.equal(batch[key], values)
            assert batch[key].dtype == values.dtype
        assert images.label_names == [str(digit) for digit in range(10)]
        for ours, theirs in zip(images.channel_statistics(), expected[split].channel_statistics(), strict=True):
            assert ours == pytest.approx(theirs)
        assert torch.equal(pickle.loads(pickle.dumps(images))[7]["evidence"], expected[split][7]["evidence"])


@pytest.mark.parametrize("name", ["block", "several"])
def test_no_mask_reaches_a_model(name, decoded_digits):
    """Catches a batch with an entry that no model's forward takes, and rows collated otherwise than fetched."""
    images = plant_images(name, decoded_digits)["test"]
    fetched, collated = (
        DecodedImages.collate(batch) for batch in (images.__getitems__([0, 1]), [images[0], images[1]])
    )
    assert set(fetched) == set(collated) == {"pixel_values", "labels"}
    assert torch.equal(fetched["labels"], collated["labels"])
    assert fetched["labels"].dtype == collated["labels"].dtype
    assert "evidence" not in decoded_digits["test"][0]


def test_evidence_of_another_shape_is_refused(decoded_digits):
    """Catches masks that belong to other images."""
    rows = decoded_digits["test"].dataset
    for evidence in (torch.ones(360, 8, 7, dtype=torch.bool), torch.ones(360, 8, 8)):
        with pytest.raises(ValueError, match=r"evidence must be bool \(360, 8, 8\), got torch"):
            DecodedImages(rows, evidence)
    several = plant_images("several", decoded_digits)["test"]
    with pytest.raises(ValueError, match=r"evidence must be int16 \(360, 16, 16\), got torch.bool"):
        DecodedImages(several.dataset, several.evidence >= 0)


def test_several_labels_are_kept_as_lists_of_classes(decoded_digits):
    """Catches labels in the rows of other images, where some have none; also of rows picked out of the set."""
    images = plant_images("several", decoded_digits)["train"]
    expected = planted_digits("several")["train"].labels.numpy()
    assert (images.labels == expected).all()
    assert images.is_multi_label
    rows = [int((expected.sum(axis=1) == count).argmax()) for count in (3, 0, 1)]
    assert (DecodedImages(images.dataset.select(rows)).labels == expected[rows]).all()
    other = DecodedImages.of_tensors(images.__getitems__([0])["pixel_values"], torch.tensor([[0, 1]]), ["a", "b"])
    assert other.fingerprint != images.fingerprint
