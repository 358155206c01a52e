"""Faithfulness over a data set: by hand, against a slow loop, without a trace, one clear error for bad input."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from conftest import TinyImages, tiny_vit
from datasets import Dataset
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from smoot_hf import functional as SF
from smoot_hf.data.input_pipeline import InputPipeline
from smoot_hf.evaluation import ranked_batches as evaluation_data
from smoot_hf.evaluation.attributions import attribute
from smoot_hf.evaluation.comparison import compare_faithfulness
from smoot_hf.evaluation.convention import DEFAULT, PAPER, Convention, resolve_convention
from smoot_hf.evaluation.faithfulness import evaluate_faithfulness
from smoot_hf.evaluation.image_classes import find_image_classes
from smoot_hf.fingerprint import dataset_fingerprint
from smoot_hf.functional.removal import even_fractions, removal_fill

CLASSES = 4


class PixelSum(nn.Module):
    """Two classes: the sum of all pixels, and a constant."""

    def __init__(self, threshold=0.0):
        super().__init__()
        self.threshold = threshold

    def forward(self, images):
        total = images.sum(dim=(1, 2, 3))
        return torch.stack([total, torch.full_like(total, self.threshold)], dim=1)


def pixel_values(model, images, target):
    """An attribution that is the image itself."""
    return images.mean(dim=1)


def small_model(dropout=0.5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(96, CLASSES)
    )


def rows(n=10, channels=2, side=6, classes=CLASSES, seed=0):
    images = torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": images[i], "labels": i % classes} for i in range(n)]


class Batched:
    """A data set whose `__getitems__` gives one dict of tensors."""

    def __init__(self, pixel_values, labels):
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        return {"pixel_values": self.pixel_values[indices], "label": self.labels[indices]}


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_pixel_sum_by_hand():
    """Catches any error of order, end point, area, scale or mean: every number is worked out on paper.

    The first image holds 1, 2, 3, 4, the second 4, 3, 2, 1 in one position each; removed by zero, a sum of at least 5
    is class 0. Deletion leaves 10, 6, 3, 1, 0; insertion 0, 4, 7, 9, 10; least salient first 10, 9, 7, 4, 0. The first
    image is of class 0, the second of class 1.
    """
    images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[4.0, 3.0], [2.0, 1.0]]]])
    data = [{"pixel_values": images[0], "labels": 0}, {"pixel_values": images[1], "labels": 1}]
    found = evaluate_faithfulness(PixelSum(5.0), data, pixel_values, steps=4, fill="zero")
    assert found.accuracy == 50
    assert found.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    # Right: (1, 1, 0, 0, 0) for the first and (0, 0, 1, 1, 1) for the second.
    assert found.deletion_curve.tolist() == [50] * 5
    assert found.deletion.sample_auc.tolist() == [37.5, 62.5]
    assert found.insertion.sample_auc.tolist() == [62.5, 37.5]
    assert found.least_salient_first.sample_auc.tolist() == [62.5, 37.5]
    assert (found.deletion_auc, found.insertion_auc, found.gap) == (50, 50, 0)
    first = evaluate_faithfulness(PixelSum(5.0), data[:1], pixel_values, steps=4, fill="zero")
    assert first.deletion_curve.tolist() == [100, 100, 0, 0, 0]
    assert first.insertion_curve.tolist() == [0, 0, 100, 100, 100]
    assert (first.deletion_auc, first.insertion_auc, first.gap) == (37.5, 62.5, 25)
    assert first.deletion.interval is None


def test_pixel_sum_probability_and_normalisation_by_hand():
    """Catches a probability of another class, and an area that is divided (or not) by the span of its fractions."""
    data = [{"pixel_values": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), "labels": 0}]
    convention = Convention(measure="probability", fill="zero", fractions=(0.0, 0.25, 0.5))
    found = evaluate_faithfulness(PixelSum(), data, pixel_values, convention=convention)
    p = [100 / (1 + math.exp(-total)) for total in (10, 6, 3)]
    assert found.deletion_curve.tolist() == pytest.approx(p, abs=1e-5)
    area = 0.25 * (p[0] / 2 + p[1] + p[2] / 2)
    assert found.deletion_auc == pytest.approx(area, abs=1e-5)
    spanned = dataclasses.replace(convention, normalisation="span")
    assert evaluate_faithfulness(PixelSum(), data, pixel_values, convention=spanned).deletion_auc == pytest.approx(
        area / 0.5, abs=1e-5
    )


def test_predicted_target_follows_the_prediction():
    """Catches `target="predicted"` measured against the label: the unmasked images are then right by definition."""
    data = rows()
    model = small_model()
    by_label = evaluate_faithfulness(model, data, steps=3)
    by_prediction = evaluate_faithfulness(model, data, steps=3, convention=Convention(target="predicted"))
    assert by_prediction.deletion_curve[0] == 100
    assert by_prediction.accuracy == by_label.accuracy == by_label.deletion_curve[0]


# --- against a slow loop, over models, data sets, chunks -------------------------------------------------------------


@pytest.mark.parametrize("fill", ["corner", "mean", "zero", "uniform", "blur"])
def test_curves_equal_a_loop_over_samples_and_steps(fill):
    """Catches samples, targets, fills and attributions that go out of step between batches."""
    data, model = rows(7), small_model().eval()
    found = evaluate_faithfulness(
        model, data, steps=5, fill=fill, convention=Convention(measure="probability", score="log_prob"), batch_size=3
    )
    for b, row in enumerate(data):
        image, label = row["pixel_values"][None].clone().requires_grad_(True), row["labels"]
        (gradient,) = torch.autograd.grad(model(image).log_softmax(1)[0, label], image)
        order = gradient.abs().mean(1).flatten().argsort(descending=True, stable=True)
        noise = SF.counter_uniform(0, 1, torch.tensor([b]), (2, 6, 6))
        replaced = removal_fill(image.detach(), fill, noise).expand(1, 2, 6, 6).flatten(2)
        values = []
        for step in range(6):
            count = step * 36 // 5
            masked = image.detach().flatten(2).clone()
            masked[:, :, order[:count]] = replaced[:, :, order[:count]]
            with torch.no_grad():
                values.append(100 * float(model(masked.reshape(1, 2, 6, 6)).softmax(1)[0, label]))
        counts = [step * 36 // 5 / 36 for step in range(6)]
        area = sum((counts[i] - counts[i - 1]) * (values[i] + values[i - 1]) / 2 for i in range(1, 6))
        assert float(found.deletion.sample_auc[b]) == pytest.approx(area, abs=1e-3)


def test_chunked_equals_unchunked():
    """Catches a remainder that is dropped and noise that depends on the batch."""
    data, model = rows(11), small_model()
    whole = evaluate_faithfulness(model, data, fill="uniform", convention=Convention(measure="probability"))
    cut = evaluate_faithfulness(model, data, fill="uniform", convention=Convention(measure="probability"), batch_size=4)
    for name in ("deletion", "insertion", "least_salient_first", "random"):
        torch.testing.assert_close(getattr(cut, name).values, getattr(whole, name).values, rtol=1e-5, atol=1e-4)


def test_every_kind_of_data_set_gives_the_same():
    """Catches a data set that is read differently: list, batched tensors, an HF data set with a format."""
    data, model = rows(), small_model()
    images, labels = torch.stack([row["pixel_values"] for row in data]), torch.tensor([row["labels"] for row in data])
    hf = Dataset.from_dict({"pixel_values": images.tolist(), "labels": labels.tolist()}).with_format("numpy")
    expected = evaluate_faithfulness(model, data, steps=3)
    for other in (Batched(images, labels), hf, torch.utils.data.Subset(data, list(range(10)))):
        assert torch.equal(evaluate_faithfulness(model, other, steps=3).deletion_curve, expected.deletion_curve)


def test_vit_behind_an_input_pipeline_masks_native_pixels():
    """Catches a mask at the model's resolution: fractions are of the 36 native positions, not of the 64 resized."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )
    images = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pipeline = InputPipeline(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size=(8, 8))
    data = Batched(images, torch.arange(5) % CLASSES)
    found = evaluate_faithfulness(ViTForImageClassification(config), data, input_pipeline=pipeline)
    assert found.fractions.tolist() == [step * 36 // 10 / 36 for step in range(11)]
    with pytest.raises(ValueError, match=r"pixel_values are torch\.uint8"):
        evaluate_faithfulness(ViTForImageClassification(config), data)


def test_forward_passes_are_the_floor():
    """Catches work done twice: attribution, clean, fill, and the points in between, once each."""
    seen = []

    class Counting(PixelSum):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    data = [{"pixel_values": torch.randn(1, 4, 4), "labels": 0} for _ in range(6)]
    evaluate_faithfulness(Counting(), data, pixel_values, steps=4, curves=())
    assert sum(seen) == 6 * 5
    seen.clear()
    evaluate_faithfulness(Counting(), data, pixel_values, steps=4)
    assert sum(seen) == 6 * (2 + 4 * 3)


@pytest.mark.parametrize("target", ["label", "predicted"])
@pytest.mark.parametrize("score", ["logit", "log_prob"])
def test_the_gradient_comes_out_of_the_unmasked_pass(score, target):
    """Catches a second unmasked forward pass, and a gradient that is not the one that `attribute` gives."""
    seen = []

    class Counting(nn.Sequential):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    data, model = rows(6), Counting(*small_model())
    convention = Convention(measure="probability", score=score, target=target)

    def separately(model, images, target):
        return attribute(model, images, target, torch.arange(len(images)), score=score)

    shared = evaluate_faithfulness(model, data, steps=4, convention=convention, curves=())
    assert sum(seen) == 6 * 5
    apart = evaluate_faithfulness(model, data, separately, steps=4, convention=convention, curves=())
    assert torch.equal(shared.deletion.sample_auc, apart.deletion.sample_auc)
    assert shared.accuracy == apart.accuracy
    assert not shared.deletion_curve.requires_grad


# --- conventions -----------------------------------------------------------------------------------------------------


def test_paper_preset():
    """Catches a preset that drifts from the design: 0 to 90 % by 10, magnitude of the log-prob's gradient, corner."""
    assert Convention() == DEFAULT
    assert PAPER.fractions == pytest.approx([0.1 * i for i in range(10)])
    assert (PAPER.score, PAPER.signed, PAPER.fill, PAPER.target) == ("log_prob", False, "corner", "label")
    assert (PAPER.measure, PAPER.normalisation) == ("accuracy", "none")
    found = evaluate_faithfulness(small_model(), rows(), convention="paper", curves=())
    assert found.convention == PAPER
    assert len(found.deletion_curve) == 10
    assert found.insertion is None


def test_convention_says_what_was_measured():
    """Catches a number whose convention is not the one it was measured by."""
    found = evaluate_faithfulness(small_model(), rows(), "random", 5, "mean", convention="paper")
    assert found.convention.attribution == "random"
    assert found.convention.fill == "mean"
    assert found.convention.fractions == even_fractions(5, 0.9)
    stated = found.to_dict()["convention"]
    assert stated["order"] == "most_salient_first"
    assert stated["end_points"] == [0, 0.9]
    assert "mean fill, 0 to 90 % in 5 steps" in stated["description"]
    own = evaluate_faithfulness(small_model(), rows(), lambda model, images, target: images.mean(1), steps=2)
    assert (own.convention.score, own.convention.signed) == (None, None)


def test_attention_rollout_is_measured_without_score_and_sign():
    """Catches a convention that names a gradient nobody took, and a fused attention that is lost in the measurement."""
    data = TinyImages(length=6)
    model = tiny_vit().eval()
    found = evaluate_faithfulness(model, data, "attention_rollout", steps=2)
    assert (found.convention.score, found.convention.signed) == (None, None)
    assert "most salient first by attention_rollout, corner fill" in found.convention.describe()
    assert found.n == 6
    assert model.config._attn_implementation == "sdpa"


def test_random_control_equals_a_random_attribution():
    """Catches a control that is not a function of seed and sample, or shares nothing with the random attribution."""
    data, model = rows(), small_model()
    control = evaluate_faithfulness(model, data, seed=4).random
    ranked = evaluate_faithfulness(model, data, "random", seed=4).deletion
    assert torch.equal(control.values, ranked.values)
    assert torch.equal(control.sample_auc, ranked.sample_auc)


# --- no trace --------------------------------------------------------------------------------------------------------


class Failing(nn.Module):
    def forward(self, model, images, target):
        raise RuntimeError("broken attribution")


def backward_attribution(model, images, target):
    """As an attribution of a user's might: it draws noise and lets gradients pile up on the parameters."""
    leaf = (images + 1e-3 * torch.randn_like(images)).requires_grad_(True)
    with torch.enable_grad():
        model(leaf).gather(1, target[:, None]).sum().backward()
    random.random(), np.random.rand()  # noqa: NPY002
    return leaf.grad.abs().mean(1)


@pytest.mark.parametrize(
    "attribution", ["gradient", "smooth_grad", "gradient_shap", "grad_cam", backward_attribution, Failing()]
)
def test_nothing_is_left_behind(attribution):
    """Catches eval mode left on, a frozen BatchNorm set to train, lost or added gradients, moved random states."""
    model, data = small_model(), rows()
    model.train()
    model[1].eval()
    model(torch.randn(4, 2, 6, 6)).sum().backward()
    flags = [module.training for module in model.modules()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    buffers = {name: value.clone() for name, value in model.state_dict().items()}
    storage = [(parameter.data_ptr(), parameter.stride()) for parameter in model.parameters()]
    images = [row["pixel_values"].clone() for row in data]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    if isinstance(attribution, Failing):
        with pytest.raises(RuntimeError, match="broken attribution"):
            evaluate_faithfulness(model, data, attribution)
    else:
        evaluate_faithfulness(model, data, attribution, steps=2)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    assert [(parameter.data_ptr(), parameter.stride()) for parameter in model.parameters()] == storage
    assert all(torch.equal(row["pixel_values"], image) for row, image in zip(data, images, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attribution", ["gradient", "smooth_grad", backward_attribution])
def test_gradients_are_taken_where_the_caller_has_switched_them_off(mode, attribution):
    """Catches an evaluation that cannot be called within `torch.no_grad()`, where one writes evaluations."""
    model, data = small_model(), rows()
    expected = evaluate_faithfulness(model, data, attribution, steps=2)
    with mode():
        found = evaluate_faithfulness(model, data, attribution, steps=2)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert torch.equal(found.deletion.sample_auc, expected.deletion.sample_auc)


def test_dropout_is_off():
    """Catches a model judged in train mode: two runs would differ."""
    model, data = small_model(dropout=0.9).train(), rows()
    convention = Convention(measure="probability")
    runs = [evaluate_faithfulness(model, data, convention=convention).deletion_auc for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_the_models(dtype):
    """Catches float32 images in front of a model of another type, and values measured in half precision."""
    model = small_model().to(dtype)
    found = evaluate_faithfulness(model, rows(), convention=Convention(measure="probability"))
    assert found.deletion_curve.dtype == torch.float64
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_autocast_reaches_the_model():
    """Catches an `autocast_dtype` that is ignored."""
    seen = []

    class Watching(nn.Sequential):
        def forward(self, images):
            logits = super().forward(images)
            seen.append(logits.dtype)
            return logits

    model = Watching(*small_model())
    found = evaluate_faithfulness(model, rows(), autocast_dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert bool(found.deletion_curve.isfinite().all())


# --- NaN and bad input -----------------------------------------------------------------------------------------------


def nan_in(broken):
    def attribution(model, images, target):
        values = images.mean(1)
        values[[i for i in range(len(images)) if i in broken], 0, 0] = math.nan
        return values

    return attribution


def test_nan_attributions_are_counted_and_left_out(monkeypatch):
    """Catches a NaN map that is averaged in, or shifts the rows of the others, or is left out without a word."""
    data, model, said = rows(6), small_model(), []
    monkeypatch.setattr(evaluation_data.logger, "warning", said.append)
    found = evaluate_faithfulness(model, data, nan_in({1, 4}))
    assert said == ["attribution 'attribution' holds NaN in 2 of 6 images: left out"]
    assert (found.n, found.nan_skipped) == (4, 2)
    assert found.sample_idx.tolist() == [0, 2, 3, 5]
    without = evaluate_faithfulness(model, [data[i] for i in (0, 2, 3, 5)], nan_in(set()))
    assert torch.equal(found.deletion.sample_auc, without.deletion.sample_auc)
    with pytest.raises(ValueError, match="holds NaN in every one of the 6 images"):
        evaluate_faithfulness(model, data, nan_in(set(range(6))))


def flat_in(flat):
    def attribution(model, images, target):
        values = images.mean(1)
        values[[i for i in range(len(images)) if i in flat]] = 0.0
        return values

    return attribution


def test_flat_attributions_are_counted_and_left_out(monkeypatch):
    """Fault: a map that is zero everywhere is ranked row by row and averaged in, without a word."""
    data, model, said = rows(8), small_model(), []
    monkeypatch.setattr(evaluation_data.logger, "warning", said.append)
    found = evaluate_faithfulness(model, data, flat_in(set(range(7))))
    assert said == ["attribution 'attribution' has one value at all positions in 7 of 8 images: left out"]
    assert (found.n, found.nan_skipped, found.flat_skipped) == (1, 0, 7)
    assert found.to_dict()["flat_skipped"] == 7
    assert found.sample_idx.tolist() == [7]
    alone = evaluate_faithfulness(model, data[7:], flat_in(set()))
    assert torch.equal(found.deletion.sample_auc, alone.deletion.sample_auc)
    said.clear()

    def broken(model, images, target):
        return flat_in({0, 2, 3})(model, images, target) + nan_in({1, 2})(model, images, target).mul(0)

    both = evaluate_faithfulness(model, data, broken)
    assert (both.n, both.nan_skipped, both.flat_skipped) == (4, 2, 2)
    assert len(said) == 2
    classes = find_image_classes(model, data, broken)
    assert (len(classes.sample_idx), classes.nan_skipped, classes.flat_skipped) == (4, 2, 2)
    assert classes.to_dict()["flat_skipped"] == 2
    with pytest.raises(ValueError, match="has one value at all positions in every one"):
        evaluate_faithfulness(model, data, flat_in(set(range(8))))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.float16], ids=str
)
def test_attributions_of_every_real_dtype_measure_the_same(dtype):
    """Fault: a segmentation or a heat map as it is stored crashes the evaluation, or is ranked upside down."""

    def stored(dtype):
        return lambda model, images, target: (images.mean(1) > 0).to(dtype)

    expected = evaluate_faithfulness(small_model(), rows(), stored(torch.float32), steps=3)
    found = evaluate_faithfulness(small_model(), rows(), stored(dtype), steps=3)
    for name in ("deletion", "insertion", "least_salient_first"):
        assert torch.equal(getattr(found, name).sample_auc, getattr(expected, name).sample_auc)


class Standardising(nn.Module):
    """Divides each image by its own spread: its outputs are NaN once nothing but the fill is left."""

    def __init__(self, order=tuple(range(CLASSES))):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(72, CLASSES)
        with torch.no_grad():
            self.head.weight.copy_(self.head.weight[list(order)])
            self.head.bias.copy_(self.head.bias[list(order)])

    def forward(self, images):
        flat = images.flatten(1)
        return self.head((flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True))


def grey(n=10):
    """Both channels are one, so that the corner's fill leaves an image of one colour."""
    return [{**row, "pixel_values": row["pixel_values"][:1].expand(2, -1, -1)} for row in rows(n)]


@pytest.mark.parametrize("measure", ["accuracy", "probability"])
def test_nan_predictions_are_wrong_whatever_the_classes_are_called(measure):
    """Catches the argmax of NaN, 0, that is right for the images of class 0, and a NaN probability of the whole."""
    convention, found = Convention(measure=measure), []
    for shift in range(CLASSES):
        data = [{**row, "labels": (row["labels"] + shift) % CLASSES} for row in grey(40)]
        model = Standardising([(j - shift) % CLASSES for j in range(CLASSES)])
        found.append(evaluate_faithfulness(model, data, convention=convention))
    for name in ("deletion", "insertion", "least_salient_first", "random"):
        curves = [getattr(one, name).values for one in found]
        assert bool(curves[0].isfinite().all())
        for curve in curves[1:]:
            torch.testing.assert_close(curve, curves[0])
    assert found[0].deletion_curve[-1] == found[0].insertion_curve[0] == 0
    assert found[0].deletion_curve[0] > 0


def test_nan_predictions_are_counted_and_said(monkeypatch):
    """Catches predictions counted as wrong without a word: each of the four curves has one point without any pixel."""
    said = []
    monkeypatch.setattr(evaluation_data.logger, "warning", said.append)
    found = evaluate_faithfulness(Standardising(), grey())
    assert (found.nan_predictions, found.predictions) == (40, 440)
    assert found.deletion.nan_predictions == 10
    assert found.to_dict()["nan_predictions"] == 40
    assert found.to_dict()["deletion"]["nan_predictions"] == 10
    assert len(said) == 1
    assert said[0].startswith("40 of 440 predictions hold a NaN or an infinity: counted as wrong.")
    said.clear()
    assert evaluate_faithfulness(small_model(), grey()).nan_predictions == 0
    assert said == []


def test_a_nan_prediction_of_the_whole_image_is_wrong():
    """Catches an accuracy that takes NaN for class 0: the control ranks such an image, for which no gradient can."""
    data = [{"pixel_values": torch.zeros(2, 6, 6), "labels": 0}, *grey(3)]
    found = evaluate_faithfulness(Standardising(), data, "random", curves=())
    alone = evaluate_faithfulness(Standardising(), data[1:], "random", curves=())
    assert found.accuracy == pytest.approx(alone.accuracy * 3 / 4)
    assert found.deletion.sample_auc[0] == 0


def test_a_model_that_predicts_nothing_is_refused():
    """Catches an area of 0, the best there is, of a model whose outputs are NaN and whose gradient is not."""
    model = small_model()
    nn.init.constant_(model[5].bias, math.nan)
    with pytest.raises(ValueError, match="hold a NaN or an infinity for every one of the 10 unmasked images"):
        evaluate_faithfulness(model, rows())
    with pytest.raises(ValueError, match="hold a NaN or an infinity for every one of the 10 unmasked images"):
        find_image_classes(model, rows())


class Detached(nn.Module):
    """Its logits are cut off from everything."""

    def forward(self, images):
        return images.detach().flatten(1)[:, :CLASSES]


class Rounding(nn.Module):
    """Its gradient is zero everywhere."""

    def forward(self, images):
        return images.round().flatten(1)[:, :CLASSES]


class Blind(nn.Module):
    """Its logits have a gradient, but not with respect to the images."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, images):
        return self.bias.expand(len(images), CLASSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": []}, "dataset must hold at least one image"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"fill": "black"}, "fill must be one of"),
        ({"attribution": "saliency"}, "method must be one of"),
        ({"attribution": lambda m, i, t: i}, r"attribution must have shape \(10, 6, 6\)"),
        ({"attribution": lambda m, i, t: i.flatten(1).sum(1)}, r"attribution must have shape \(10, 6, 6\)"),
        ({"attribution": lambda m, i, t: i[:, 0].numpy()}, "attribution must return a tensor .* got a ndarray"),
        (
            {"attribution": lambda m, i, t: i[:, 0].to(torch.complex64)},
            "attribution must hold real numbers, got torch.com",
        ),
        ({"model": Detached()}, "gradient cannot explain Detached: its logits have no gradient"),
        ({"model": Detached(), "attribution": "smooth_grad"}, "smooth_grad cannot explain Detached"),
        ({"model": Blind()}, "gradient cannot explain Blind: its logits have no gradient"),
        ({"model": Rounding()}, "attribution 'gradient' has one value at all positions in every one of the images"),
        ({"convention": "RISE"}, "convention must be 'default', 'paper'"),
        ({"curves": ("deletion",)}, "curves must be among"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(72, 1))}, "at least 2 classes"),
        (
            {"dataset": [{"pixel_values": torch.zeros(2, 6, 6), "labels": 4}]},
            "labels must be classes of the model, 0 to 3",
        ),
        ({"dataset": [{"pixel_values": torch.zeros(2, 6, 6), "labels": -1}]}, "labels must be classes of the model"),
        ({"dataset": [{"pixel_values": torch.zeros(2, 6, 6)}]}, r"got \['pixel_values'\]"),
        ({"dataset": [{"image": 0, "label": 0}]}, "dataset rows must hold 'pixel_values'"),
        ({"dataset": [{"pixel_values": torch.zeros(6, 6), "labels": 0}]}, r"pixel_values \(C, H, W\)"),
        ({"dataset": rows(1) + rows(1, side=5)}, "pixel_values must have one shape"),
        ({"dataset": rows(1) + rows(1, side=5), "batch_size": 1}, "images must have one shape"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    """Catches a wrong number, or an error from deep inside, where an argument is at fault."""
    with pytest.raises(ValueError, match=message):
        evaluate_faithfulness(**{"model": small_model(), "dataset": rows(), **arguments})


@pytest.mark.parametrize(
    "field",
    [{"target": "true"}, {"measure": "output"}, {"normalisation": "yes"}, {"score": "p"}, {"fractions": (0.5, 0.1)}],
)
def test_bad_conventions(field):
    """Catches a convention that no measurement can follow."""
    with pytest.raises(ValueError, match=next(iter(field))):
        Convention(**field)


def test_convention_is_resolved_once():
    """Catches a shortcut that loses the rest of the convention it changes."""
    resolved = resolve_convention(PAPER, steps=3, fill="blur")
    assert resolved == dataclasses.replace(PAPER, fractions=even_fractions(3, 0.9), fill="blur")
    late = resolve_convention(Convention(fractions=(0.1, 0.5, 0.7)), steps=3)
    assert late.fractions == (0.1, 0.3, 0.5, 0.7)
    by_chance = resolve_convention("default", "random")
    assert (by_chance.score, by_chance.signed) == (None, None)
    assert "most salient first by random, corner fill" in by_chance.describe()


# --- intervals and comparison ----------------------------------------------------------------------------------------


def test_intervals_of_areas_know_what_is_possible():
    """Fault: an interval below 0 or above the largest area, one of no width where all images are right throughout,
    and the paper's 0 to 90 % taken for 0 to 100 %.
    """
    varied = rows(5, channels=1, side=4, classes=1)
    always = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(always[1].weight), nn.init.zeros_(always[1].bias)
    for normalisation, largest in (("none", 0.9375 * 100), ("span", 100)):
        convention = dataclasses.replace(PAPER, normalisation=normalisation, fractions=(0.0, 0.5, 0.9375))
        found = evaluate_faithfulness(always, varied, pixel_values, convention=convention)
        assert found.largest_auc == found.deletion_auc == largest
        # Clopper and Pearson for five of five.
        assert found.deletion.interval == pytest.approx((largest * 0.025**0.2, largest))
    model = small_model()
    found = evaluate_faithfulness(model, rows(3), convention=Convention(measure="probability"))
    for curve in (found.deletion, found.insertion, found.least_salient_first, found.random):
        low, high = curve.interval
        assert 0 <= low <= curve.auc <= high <= 100
    assert -100 <= found.gap_interval[0] <= found.gap <= found.gap_interval[1] <= 100


def test_comparison_is_paired_by_row():
    """Catches pairing by position where one of the two has skipped an image, and the sign turned round."""
    data, a, b = rows(8), small_model(), small_model()
    nn.init.normal_(b[5].weight, generator=torch.Generator().manual_seed(9))
    convention = Convention(measure="probability")
    first = evaluate_faithfulness(a, data, nan_in({0, 3}), convention=convention)
    second = evaluate_faithfulness(b, data, nan_in({5}), convention=convention)
    found = compare_faithfulness(first, second)
    areas = [dict(zip(m.sample_idx.tolist(), m.deletion.sample_auc.tolist(), strict=True)) for m in (first, second)]
    differences = [areas[0][row] - areas[1][row] for row in (1, 2, 4, 6, 7)]
    assert found.n == 5
    assert found.difference == pytest.approx(sum(differences) / 5)
    assert found.interval[0] <= found.difference <= found.interval[1]
    assert found.lower == pytest.approx(20 * sum(d < 0 for d in differences))
    assert found.higher == pytest.approx(20 * sum(d > 0 for d in differences))


def test_what_cannot_be_compared_is_refused():
    """Catches two conventions set side by side, a curve that was not measured, and different images."""
    data, model = rows(4), small_model()
    base = evaluate_faithfulness(model, data, steps=2, curves=())
    with pytest.raises(ValueError, match="one convention"):
        compare_faithfulness(base, evaluate_faithfulness(model, data, steps=2, fill="mean", curves=()))
    with pytest.raises(ValueError, match="a holds no curve 'insertion'"):
        compare_faithfulness(base, base, "insertion")
    with pytest.raises(ValueError, match="no image in common"):
        compare_faithfulness(base, dataclasses.replace(base, sample_idx=base.sample_idx + 100))
    with pytest.raises(ValueError, match="images of one size"):
        compare_faithfulness(base, dataclasses.replace(base, fractions=base.fractions * 0.99))
    # As of a version that did not keep it.
    with pytest.raises(ValueError, match=r"b does not say which data set it is of \(its dataset_fingerprint is None\)"):
        compare_faithfulness(base, dataclasses.replace(base, dataset_fingerprint=None))


class Named(list):
    """A data set that says what it is, whatever its transform makes of the pixels."""

    fingerprint = "the test set"


def hf_rows(seed):
    data = rows(12, seed=seed)
    pixels = np.stack([row["pixel_values"].numpy() for row in data])
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [row["labels"] for row in data]}).with_format(
        "numpy"
    )


LIST, HF = rows(12), hf_rows(0)
RELABELLED = [{**row, "labels": (row["labels"] + 1) % CLASSES} for row in LIST]
# Six images each: data sets of one length, whose rows 0 to 5 are other images, another order or other labels.
DATA_SETS = {
    "list": LIST[:6],
    "another list": LIST[6:],
    "another order": LIST[5::-1],
    "other labels": RELABELLED[:6],
    "Subset of a list": torch.utils.data.Subset(LIST, [0, 2, 4, 6, 8, 10]),
    "same Subset of another list": torch.utils.data.Subset(rows(12, seed=1), [0, 2, 4, 6, 8, 10]),
    "HF": HF.select(range(6, 12)),
    "another HF": hf_rows(1).select(range(6, 12)),
    "Subset of HF": torch.utils.data.Subset(HF, range(6)),
    "another Subset of HF": torch.utils.data.Subset(HF, range(1, 7)),
    "same Subset of another HF": torch.utils.data.Subset(hf_rows(1), range(6)),
    "Subset of a Subset": torch.utils.data.Subset(torch.utils.data.Subset(LIST, range(1, 12)), range(6)),
    "concatenated": torch.utils.data.ConcatDataset([LIST[:3], LIST[6:9]]),
    "concatenated, another order": torch.utils.data.ConcatDataset([LIST[6:9], LIST[:3]]),
    "named": Named(LIST[:6]),
}
CONVENTIONS = {
    "attribution": {"attribution": "input_x_gradient"},
    "score": {"score": "log_prob"},
    "signed": {"signed": True},
    "target": {"target": "predicted"},
    "measure": {"measure": "probability"},
    "fill": {"fill": "zero"},
    "fractions": {"fractions": (0.0, 0.5, 0.9)},
    "normalisation": {"normalisation": "span"},
}


def test_every_pair_of_incompatible_measurements_is_refused():
    """Fault: measurements of different images, paired by their position alone, or of different conventions."""
    model = small_model()
    base = Convention(fractions=(0.0, 0.5, 1.0))
    measured = {
        name: evaluate_faithfulness(model, data, convention=base, curves=()) for name, data in DATA_SETS.items()
    }
    for name, change in CONVENTIONS.items():
        convention = dataclasses.replace(base, **change)
        measured[name] = evaluate_faithfulness(model, DATA_SETS["list"], convention=convention, curves=())
    for (a_name, a), (b_name, b) in itertools.product(measured.items(), repeat=2):
        if a_name == b_name:
            assert compare_faithfulness(a, b).n == len(a.sample_idx)
            continue
        kind = "one convention" if {a_name, b_name} & CONVENTIONS.keys() else "measured on the same data set"
        with pytest.raises(ValueError, match=kind):
            compare_faithfulness(a, b)


def test_the_same_images_are_the_same_however_they_are_measured():
    """Fault: a refusal of what can be compared: another model, batch size or input pipeline, a copy of the data."""
    model, other = small_model(), small_model()
    pixels = torch.randint(0, 256, (6, 2, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % CLASSES
    one, two = (InputPipeline(mean=(mean, mean), std=(0.25, 0.25)) for mean in (0.5, 0.4))
    copied = [{"pixel_values": pixels[i].clone(), "label": int(labels[i])} for i in range(6)]
    a = evaluate_faithfulness(model, Batched(pixels, labels), input_pipeline=one, curves=())
    b = evaluate_faithfulness(other.to(torch.float64), copied, input_pipeline=two, batch_size=4, curves=())
    assert compare_faithfulness(a, b).n == 6
    hf = evaluate_faithfulness(model.to(torch.float32), HF, curves=())
    assert hf.dataset_fingerprint == dataset_fingerprint(HF)
    assert compare_faithfulness(hf, evaluate_faithfulness(model, HF.with_format("torch"), curves=())).n == 12
