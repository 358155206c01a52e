"""Localisation over a data set: each image's scores are its own, and models are compared on the same images."""

import json
import math

import pytest
import reference
import torch
from conftest import TinyImages, build

from smoot_hf.evaluation import compare_localisation, evaluate_localisation, on_shared_images
from smoot_hf.evaluation.results import Results, describe_environment, left_out_notes, localisation_row, validate
from smoot_hf.functional import counter_uniform


def generator(seed):
    return torch.Generator().manual_seed(seed)


class MarkedImages(TinyImages):
    """Noise images with evidence in the left half; `spoilt` rows have none."""

    def __init__(self, length=24, spoilt=(), **options):
        super().__init__(length, **options)
        self.evidence = torch.zeros(length, *self.images.shape[2:], dtype=torch.bool)
        self.evidence[:, :, : self.images.shape[3] // 2] = True
        self.evidence[list(spoilt)] = False

    def __getitem__(self, i):
        return super().__getitem__(i) | {"evidence": self.evidence[i]}


class LeftHalf(torch.nn.Module):
    """Class 0 grows with the left columns of the first channel, the others are 0. Bias 1e4: it always wins."""

    def __init__(self, columns=4, bias=1e4):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.columns, self.bias = columns, bias

    def forward(self, images):
        score = self.bias + self.weight * images[:, 0, :, : self.columns].sum(dim=(1, 2))
        return torch.stack([score, *[torch.zeros_like(score)] * 3], dim=1)


def test_a_model_that_looks_at_the_evidence_alone_scores_perfectly():
    """Catches a mask that is turned, shifted to the next batch, or inverted."""
    found = evaluate_localisation(LeftHalf(), MarkedImages(), batch_size=5)
    assert found.n == 6
    assert found.incorrect == 18
    assert found.accuracy == 25.0
    for name, value in {"relevance_mass": 100, "rank_accuracy": 100, "pointing_game": 100, "roc_auc": 100}.items():
        assert found.scores[name].value == value, name
        assert found.scores[name].chance == 50
    assert [score.value for score in found.outside.values()] == [0, 0, 0]
    assert found.sample_idx.tolist() == [0, 4, 8, 12, 16, 20]


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_scores_are_those_of_each_image(batch_size):
    """Catches rows mixed up between the images, their masks and their maps; batches must not matter."""
    data, model = MarkedImages(), build("vit").eval()
    data.evidence = torch.rand(24, 8, 8, generator=generator(3)) < 0.4
    found = evaluate_localisation(model, data, only_correct=False, top=(0.1,), batch_size=batch_size)
    assert found.n == 24
    for row, label in enumerate(data.labels):
        image = data.images[row][None].requires_grad_()
        (gradient,) = torch.autograd.grad(model(pixel_values=image).logits[0, label], image)
        expected = reference.localisation_scores(gradient[0].abs().mean(0).tolist(), data.evidence[row].tolist(), 0.1)
        control = counter_uniform(0, 2, torch.tensor([row]), (8, 8))
        by_chance = reference.localisation_scores(control[0].tolist(), data.evidence[row].tolist(), 0.1)
        share = data.evidence[row].double().mean().item()
        for name, score in (
            ("relevance_mass", "relevance_mass"),
            ("roc_auc", "roc_auc"),
            ("outside_0.1", "top_outside"),
        ):
            # Another batch size rounds the gradient in another order.
            assert found.scores[name].sample_values[row] == pytest.approx(100 * expected[score], abs=0.01)
            assert found.scores[name].sample_control[row] == pytest.approx(100 * by_chance[score], abs=1e-5)
        assert found.rank_accuracy.sample_chance[row] == pytest.approx(100 * share)
        assert found.outside[0.1].sample_chance[row] == pytest.approx(100 * (1 - share))


def test_what_is_left_out_is_counted():
    """Catches empty evidence or NaN maps that go into a mean in silence, and flat maps that nobody hears of."""

    def attribution(model, images, target):
        maps = images[:, 0].clone()
        maps[target == 1, 0, 0] = math.nan
        maps[target == 2] = 1.0
        return maps

    found = evaluate_localisation(build("vit"), MarkedImages(spoilt=[0, 4]), attribution, only_correct=False)
    assert (found.n, found.nan_skipped, found.unmarked, found.flat) == (16, 6, 2, 6)
    assert found.incorrect == 0
    assert set(found.sample_idx.tolist()) == {row for row in range(24) if row % 4 != 1} - {0, 4}
    assert (found.roc_auc.sample_values[found.sample_idx % 4 == 2] == 50).all()


def test_a_random_map_scores_chance():
    """Catches chance levels that no map has; 600 images by 64 positions leave 3 standard errors below a point."""
    data = MarkedImages(600)
    data.evidence = torch.rand(600, 8, 8, generator=generator(3)) < torch.rand(600, 1, 1, generator=generator(4))
    data.evidence[:, 0, 0], data.evidence[:, 7, 7] = True, False
    found = evaluate_localisation(build("vit"), data, "random", only_correct=False)
    for name, score in found.scores.items():
        spread = 5 * float((score.sample_values - score.sample_chance).std()) / 600**0.5
        assert abs(score.value - score.chance) < spread, name
        assert abs(score.control - score.chance) < spread, name
        assert score.interval[0] < score.value < score.interval[1]
        assert not torch.equal(score.sample_values, score.sample_control)


def test_models_are_compared_on_what_both_get_right():
    """Catches a comparison over different images, and one whose sign is turned."""
    data = MarkedImages()
    right = evaluate_localisation(LeftHalf(), data)
    other = evaluate_localisation(LeftHalf(columns=6, bias=0), data)
    shared = sorted(set(right.sample_idx.tolist()) & set(other.sample_idx.tolist()))
    assert 0 < len(shared) < right.n
    paired = compare_localisation(right, other, "relevance_mass")
    ours, theirs = on_shared_images(right, other)
    assert paired.n == len(shared)
    assert ours.sample_idx.tolist() == theirs.sample_idx.tolist() == shared
    assert paired.difference == pytest.approx(ours.relevance_mass.value - theirs.relevance_mass.value)
    assert paired.difference > 0
    assert paired.higher == 100
    rows = torch.isin(other.sample_idx, torch.tensor(shared))
    assert torch.equal(theirs.relevance_mass.sample_values, other.relevance_mass.sample_values[rows])


def test_what_cannot_be_compared_is_refused():
    """Catches numbers of two attributions, or of other images in the same rows, set against each other."""
    data, model = MarkedImages(), LeftHalf()
    one, other = evaluate_localisation(model, data), evaluate_localisation(model, data, only_correct=False)
    with pytest.raises(ValueError, match="measured in the same way, got magnitude of gradient"):
        compare_localisation(one, other)
    others = evaluate_localisation(model, MarkedImages(25))
    with pytest.raises(ValueError, match="measured on the same data set"):
        compare_localisation(one, others)
    with pytest.raises(ValueError, match=r"score must be one of 'relevance_mass'.*got 'mass'"):
        compare_localisation(one, one, "mass")


def test_to_dict_is_plain_and_complete():
    """Catches tensors that json cannot write, and a score without its chance level."""
    found = json.loads(json.dumps(evaluate_localisation(LeftHalf(), MarkedImages()).to_dict()))
    assert found["scores"]["outside_0.1"]["chance"] == 50
    assert set(found["scores"]["roc_auc"]) == {"value", "interval", "chance", "control"}
    assert (
        found["description"]
        == "magnitude of gradient of the label's logit, correctly classified images, evidence in 'evidence'"
    )


class Rows(MarkedImages):
    """Rows in which one entry is replaced."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def __getitem__(self, i):
        return super().__getitem__(i) | self.change


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (TinyImages(), {}, "must be dicts that hold the evidence mask 'evidence', got"),
        (MarkedImages(), {"evidence": "mask"}, "must be dicts that hold the evidence mask 'mask'"),
        ([(torch.zeros(3, 8, 8), 0)], {}, "must be dicts that hold the evidence mask 'evidence', got a tuple"),
        (Rows({"evidence": None}), {}, r"must be bool tensors or arrays \(H, W\), got NoneType"),
        (Rows({"evidence": torch.zeros(8, 8)}), {}, r"must be a bool mask \(H, W\).*float32 \(8, 8\)"),
        (Rows({"evidence": torch.zeros(4, 4, dtype=torch.bool)}), {}, r"must be \(H, W\) = \(8, 8\)"),
        (MarkedImages(spoilt=range(24)), {}, "no image is left to measure of 24: .* unmarked"),
        (MarkedImages(), {"top": (0.1, 10)}, "top must hold fractions"),
        (MarkedImages(), {"attribution": lambda m, x, t: torch.ones_like(x[:, 0])}, "one value at all positions"),
        (iter(()), {}, "must have a length"),
    ],
)
def test_bad_data_are_one_clear_error(dataset, options, message):
    """Catches a mean over nothing, and errors from deep inside torch."""
    with pytest.raises(ValueError, match=message):
        evaluate_localisation(LeftHalf(), dataset, **options)


class NanOutputs(LeftHalf):
    """No prediction for images whose second channel begins with a positive value: output 0, their label's, is NaN."""

    def forward(self, images):
        outputs = super().forward(images)
        is_spoilt = (images[:, 1, 0, 0] > 0)[:, None] & (torch.arange(4) == 0)
        return outputs.masked_fill(is_spoilt, math.nan)


def test_outputs_with_a_nan_are_wrong():
    """Catches the argmax of NaN, which is right for the images of a class where the model predicts nothing."""
    data = MarkedImages()
    found = evaluate_localisation(NanOutputs(), data)
    kept = [row for row in range(0, 24, 4) if data.images[row, 1, 0, 0] <= 0]
    assert 0 < len(kept) < 6
    assert found.sample_idx.tolist() == kept
    assert (found.incorrect, found.nan_skipped) == (24 - len(kept), 0)
    assert found.accuracy == pytest.approx(100 * len(kept) / 24)


def test_images_of_two_sizes_are_not_compared():
    """Catches maps of other resolutions paired by their rows, where the data set itself is the same."""

    class Same(MarkedImages):
        fingerprint = "the same files, read at two sizes"

    one, other = (evaluate_localisation(LeftHalf(columns), Same(size=size)) for columns, size in ((4, 8), (8, 16)))
    assert one.dataset_fingerprint == other.dataset_fingerprint
    with pytest.raises(ValueError, match="images of one size"):
        on_shared_images(one, other)


def test_a_row_of_results_holds_every_seed():
    """Catches a seed averaged away, a note about images left out that nobody gets, and rows of two ways in one."""
    found = {seed: evaluate_localisation(LeftHalf(), MarkedImages(spoilt=[0] if seed else [])) for seed in range(2)}
    row = localisation_row("smoot", found)
    assert row.metrics.keys() == {"accuracy", *found[0].scores}
    assert row.metrics["outside_0.1"].values == {seed: one.outside[0.1].value for seed, one in found.items()}
    validate(Results("compare", {}, describe_environment(), [row]).to_dict())
    assert left_out_notes([row]) == [
        "smoot, seed 1: 1 images left out, whose evidence is nothing or the whole image; 5 measured."
    ]
    with pytest.raises(ValueError, match="measured in one way on one data set"):
        localisation_row("smoot", found | {2: evaluate_localisation(LeftHalf(), MarkedImages(25))})


def test_the_collators_batch_is_measured():
    """Catches an evaluation during training that measures other pixels than the trainer's evaluation sees."""

    def collate(samples):
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        return {"pixel_values": pixels.flip(3), "target": torch.tensor([sample["labels"] for sample in samples])}

    found = evaluate_localisation(build("vit"), MarkedImages(), only_correct=False)
    data = MarkedImages()
    data.images = data.images.flip(3)
    by_collator = evaluate_localisation(
        build("vit"), data, only_correct=False, data_collator=collate, label_name="target"
    )
    assert torch.equal(by_collator.roc_auc.sample_values, found.roc_auc.sample_values)
