"""Faithfulness of models with several labels for an image: by hand, against the slow loop, one error for bad input."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import reference
import torch
from conftest import tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smoot_hf.evaluation import (
    Convention,
    NothingToMeasureError,
    Results,
    compare_faithfulness,
    evaluate_faithfulness,
    find_image_classes,
    load_results,
    randomized_weights_correlation,
    referee_matrix,
)
from smoot_hf.evaluation.attributions import attribute
from smoot_hf.evaluation.diff_roar import diff_roar
from smoot_hf.evaluation.results import describe_environment, faithfulness_row
from smoot_hf.functional.removal import removed_counts
from smoot_hf.models import LogitsModel

MULTI_LABEL = SimpleNamespace(problem_type="multi_label_classification")


class Linear(nn.Module):
    """Every label's output is linear in the pixels: gradients, curves and areas can be worked out."""

    config = MULTI_LABEL

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, images):
        return torch.einsum("bchw,kchw->bk", images, self.weight) + self.bias


def linear_case(n=6, classes=3, channels=2, height=3, width=4, seed=0, share=0.5):
    """A model, rows with float labels, and the plain values of both."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, channels, height, width, dtype=torch.float64, generator=generator)
    bias = torch.randn(classes, dtype=torch.float64, generator=generator)
    images = torch.randn(n, channels, height, width, dtype=torch.float64, generator=generator)
    labels = (torch.rand(n, classes, generator=generator) < share).float()
    labels[0, 0] = 1
    data = [{"pixel_values": image, "labels": row} for image, row in zip(images, labels, strict=True)]
    return Linear(weight, bias), data, images, labels


def linear_net(classes=3):
    """With layers that every captum method and Grad-CAM knows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, classes))
    return net.double().eval()


def multi(model):
    """The same model, with a sigmoid for each output."""
    model.config = MULTI_LABEL
    return model


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_by_hand():
    """Catches another label's probability, a mean over all labels, and a wrong order, area or scale.

    Output j is the sum of row j. The image has both labels; both rows have slope 1, so that the image itself, which is
    the attribution, ranks: 4, 3, 2, 1 are removed in turn. Left are (3, 7), (3, 3), (3, 0), (1, 0) and (0, 0).
    """
    weight = torch.zeros(2, 1, 2, 2)
    weight[0, 0, 0], weight[1, 0, 1] = 1.0, 1.0
    data = [{"pixel_values": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), "labels": [1, 1]}]

    def pixels(model, images, target):
        assert target.tolist() == [[1, 1]]
        return images[:, 0]

    found = evaluate_faithfulness(Linear(weight, torch.zeros(2)), data, pixels, steps=4, fill="zero")
    p = [1 / (1 + math.exp(-total)) for total in (0, 1, 3, 7)]
    expected = [p[2] + p[3], p[2] + p[2], p[2] + p[0], p[1] + p[0], p[0] + p[0]]
    assert found.deletion_curve.tolist() == pytest.approx([50 * value for value in expected], abs=1e-4)
    area = sum((low + high) / 2 for low, high in itertools.pairwise(expected)) / 4
    assert found.deletion_auc == pytest.approx(50 * area, abs=1e-4)
    assert found.accuracy == found.subset_accuracy == 100
    assert found.convention.measure == "label_probability"
    assert "mean probability of an image's labels" in found.convention.describe()


def test_mean_average_precision_by_hand():
    """Catches a precision of the wrong images, and one over labelled images alone.

    One label occurs. Without removal its image has 2 and the unlabelled one 1: 100 %. Once every pixel is gone both
    have 0, and one threshold: 1 of 2. The second label occurs nowhere.
    """
    weight = torch.ones(2, 1, 1, 2)
    data = [
        {"pixel_values": torch.tensor([[[1.0, 1.0]]]), "labels": [1, 0]},
        {"pixel_values": torch.tensor([[[0.5, 0.5]]]), "labels": [0, 0]},
    ]

    def first(model, images, target):
        return torch.tensor([[[2.0, 1.0]]]).expand(len(images), 1, 2)

    found = evaluate_faithfulness(Linear(weight, torch.zeros(2)), data, first, steps=2, fill="zero")
    assert found.mean_average_precision == 100
    assert found.deletion.mean_average_precision.tolist() == [100, 100, 50]
    assert found.mean_average_precision_auc == 87.5
    assert (found.n, found.unlabelled, found.sample_idx.tolist()) == (1, 1, [0])
    # Both are predicted to have both labels.
    assert found.subset_accuracy == 0


# --- against the slow loop -------------------------------------------------------------------------------------------


@given(
    st.integers(1, 5), st.integers(2, 4), st.integers(1, 2), st.integers(1, 3), st.integers(2, 4),
    st.integers(0, 2**31), st.sampled_from([1, 2, 256]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_equals_the_slow_loop(n, classes, channels, height, width, seed, batch_size):
    """Catches an attribution of one label alone, curves that mix images or labels, and unlabelled images that count."""
    model, data, images, labels = linear_case(n, classes, channels, height, width, seed)
    found = evaluate_faithfulness(model, data, fill="zero", steps=3, curves=(), batch_size=batch_size)
    weights, bias = model.weight.tolist(), model.bias.tolist()
    counts = removed_counts(found.convention.fractions, height * width)
    outputs, curves = [], []
    for image, row in zip(images.tolist(), labels.tolist(), strict=True):
        target = reference.multi_label_target(reference.linear_outputs(image, weights, bias), row)
        saliency = reference.multi_label_saliency(weights, target)
        outputs.append(reference.deletion_outputs(image, saliency, weights, bias, counts))
        if any(row):
            curves.append([100 * reference.label_probability(one, row) for one in outputs[-1]])
    mean = [sum(column) / len(curves) for column in zip(*curves, strict=True)]
    assert found.deletion_curve.tolist() == pytest.approx(mean, abs=1e-9)
    assert (found.n, found.unlabelled) == (len(curves), n - len(curves))
    precision = [100 * reference.mean_average_precision(point, labels.tolist()) for point in zip(*outputs, strict=True)]
    assert found.deletion.mean_average_precision.tolist() == pytest.approx(precision, abs=1e-9)
    assert found.mean_average_precision == pytest.approx(precision[0], abs=1e-9)
    right = [
        all((value > 0) == bool(has) for value, has in zip(one[0], row, strict=True))
        for one, row in zip(outputs, labels.tolist(), strict=True)
    ]
    assert found.subset_accuracy == pytest.approx(100 * sum(right) / n)


def test_all_curves_and_their_ends():
    """Catches an end point that is not shared: both curves end at the fill alone, or at the whole image."""
    model, data, _, _ = linear_case()
    found = evaluate_faithfulness(model, data)
    assert float(found.insertion_curve[-1]) == pytest.approx(float(found.deletion_curve[0]), abs=1e-9)
    assert float(found.insertion_curve[0]) == pytest.approx(float(found.deletion_curve[-1]), abs=1e-9)
    precision = found.insertion.mean_average_precision
    assert float(precision[-1]) == pytest.approx(found.mean_average_precision, abs=1e-9)
    assert found.random.mean_average_precision_auc is not None
    assert found.gap is not None
    assert 0 < found.deletion.interval[0] < found.deletion_auc < found.deletion.interval[1] < 100


def test_predicted_labels_are_followed():
    """Catches the true labels in the place of the predicted ones, and unlabelled images that are left out of these."""
    weight = torch.zeros(2, 1, 1, 2)
    weight[0, 0, 0, 0], weight[1, 0, 0, 1] = 1.0, 1.0
    data = [
        {"pixel_values": torch.tensor([[[2.0, -1.0]]]), "labels": [0, 1]},
        {"pixel_values": torch.tensor([[[-3.0, -1.0]]]), "labels": [0, 0]},
    ]
    seen = []

    def keep(model, images, target):
        seen.append(target.tolist())
        return images[:, 0].abs()

    convention = Convention(measure="label_probability", target="predicted", fill="zero", fractions=(0.0, 1.0))
    found = evaluate_faithfulness(Linear(weight, torch.zeros(2)), data, keep, convention=convention, curves=())
    # The second image has no output above one half: its highest one is followed.
    assert seen == [[[1, 0], [0, 1]]]
    expected = 50 / (1 + math.exp(-2)) + 50 / (1 + math.exp(1))
    assert found.deletion_curve.tolist() == pytest.approx([expected, 50], abs=1e-4)
    assert (found.n, found.unlabelled) == (2, 0)


# --- attributions ----------------------------------------------------------------------------------------------------

NAMES = [
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "smooth_grad",
    "gradient_shap",
    "deep_lift",
    "grad_cam",
]


@pytest.mark.parametrize("method", [*NAMES, "random"])
def test_one_label_is_explained_as_one_class(method):
    """Catches a method that explains another output of a multi-label model than of the same one with a softmax."""
    images, rows = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.arange(3)
    classes = torch.tensor([2, 0, 1])
    single = attribute(LogitsModel(linear_net()), images, classes, rows, method=method)
    one_hot = nn.functional.one_hot(classes, 3)
    found = attribute(LogitsModel(multi(linear_net())), images, one_hot, rows, method=method)
    assert torch.allclose(found, single, atol=1e-12)


@pytest.mark.parametrize("batch_size", [2, 256])
@pytest.mark.parametrize("method", NAMES)
def test_several_labels_are_explained_by_the_sum_of_their_scores(method, batch_size):
    """Catches labels of which one is explained, and labels that captum's copies of an image do not follow.

    All of these methods are linear in the score, by the signed values; DeepLIFT's Rescale rule as well.
    """
    model = LogitsModel(multi(linear_net()))
    images, rows = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.arange(3)
    labels = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]])

    def maps(target):
        options = {"method": method, "signed": True, "batch_size": batch_size}
        return attribute(model, images, target, rows, **options)

    each = sum(
        maps(torch.eye(3)[[label] * 3]) * labels[:, label, None, None].double() for label in range(labels.shape[1])
    )
    assert torch.allclose(maps(labels), each, atol=1e-10)


def test_log_probability_is_that_of_the_sigmoid():
    """Catches a softmax over labels that are independent."""
    model = multi(linear_net())
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    expected = torch.autograd.grad((model(images).sigmoid().log() * labels).sum(), images)[0].abs().mean(dim=1)
    for method in ("gradient", "smooth_grad"):
        found = attribute(LogitsModel(model), images, labels, torch.arange(2), method=method, score="log_prob")
        assert found.shape == expected.shape
        if method == "gradient":
            assert torch.allclose(found, expected, atol=1e-12)


def test_attention_rollout_takes_several_labels():
    """Catches a method that is the same for all labels, and is refused for many."""
    model = tiny_vit(problem_type="multi_label_classification")
    images = torch.randn(2, 3, 8, 8)
    labels = torch.zeros(2, model.config.num_labels)
    labels[:, :2] = 1
    assert attribute(LogitsModel(model), images, labels, torch.arange(2), method="attention_rollout").shape == (2, 8, 8)


@pytest.mark.parametrize(("is_multi", "target"), [(True, torch.tensor([0, 1])), (False, torch.ones(2, 3))])
def test_targets_of_the_other_kind_are_refused(is_multi, target):
    """Catches class numbers that are taken for weights of labels, or the reverse."""
    model = multi(linear_net()) if is_multi else linear_net()
    with pytest.raises(ValueError, match=r"target must hold (labels|classes)"):
        attribute(LogitsModel(model), torch.randn(2, 1, 8, 8).double(), target, torch.arange(2))


# --- labels, conventions, NaN ----------------------------------------------------------------------------------------


def with_labels(labels):
    _, data, _, _ = linear_case()
    return [{**row, "labels": label} for row, label in zip(data, labels, strict=False)]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8])
def test_labels_may_be_of_any_type(kind):
    """Catches a type of labels that is refused or read otherwise; the Trainer's are float32."""
    model, data, _, labels = linear_case()
    expected = evaluate_faithfulness(model, data)
    found = evaluate_faithfulness(model, with_labels(labels.to(kind)))
    assert found.deletion_curve.tolist() == expected.deletion_curve.tolist()
    assert found.dataset_fingerprint == expected.dataset_fingerprint


def test_the_collators_float_labels_are_measured():
    """Catches a batch of a Trainer's collator that is refused: float (B, classes)."""
    model, data, _, _ = linear_case()

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels")}

    found = evaluate_faithfulness(model, data, data_collator=collate, label_name="labels", curves=())
    assert found.deletion_auc == evaluate_faithfulness(model, data, curves=()).deletion_auc


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 0], [0, 1]], "a column for each of the model's 3 classes, got 2"),
        ([[1.0, 0.0, 0.5]], r"0 or 1 for each class, got the value 0\.5"),
        ([[1.0, 0.0, torch.nan]], "0 or 1 for each class, got the value nan"),
        ([[1, 0, 2]], "0 or 1 for each class, got the value 2"),
        ([[1, 0, -1]], "0 or 1 for each class, got the value -1"),
        ([1, 2], "got the one value 1: make a row with a 1 for each of its labels"),
        ([["cat", "dog"]], r"\(classes,\) for each image, 0 or 1 for each class, got \['cat', 'dog'\]"),
        ([[1, 0, 0], [1, 0]], "labels must have one shape"),
        ([None], "must hold 'labels', got None in some"),
        ([[[1, 0, 0]]], r"labels \(classes,\) of 0 and 1, got batches of shapes"),
    ],
)
def test_labels_that_are_no_rows_of_0_and_1_get_a_line(labels, message):
    """Catches soft, cut or missing labels that are measured, and an error from deep inside."""
    model, _, _, _ = linear_case()
    with pytest.raises(ValueError, match=message):
        evaluate_faithfulness(model, with_labels(labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 0, 1]], "and one integer label, got batches of shapes"),
        ([[1.0, 0.0, 1.0]], "several labels for an image says so by config.problem_type='multi_label_classification'"),
    ],
)
def test_rows_of_labels_are_refused_for_exclusive_classes(labels, message):
    """Catches a model that was not said to be one of several labels, measured by a softmax."""
    model, _, _, _ = linear_case()
    model.config = SimpleNamespace(problem_type=None)
    with pytest.raises(ValueError, match=message):
        evaluate_faithfulness(model, with_labels(labels))


@pytest.mark.parametrize("measure", ["accuracy", "probability"])
def test_a_convention_of_the_other_kind_is_refused(measure):
    """Catches an accuracy of one class that a multi-label model does not have, and the reverse."""
    model, data, _, _ = linear_case()
    with pytest.raises(ValueError, match=f"must be 'label_probability' for a multi-label model, got '{measure}'"):
        evaluate_faithfulness(model, data, convention=Convention(measure=measure))
    model.config = None
    with pytest.raises(ValueError, match="must be 'accuracy' or 'probability' for a model of exclusive classes"):
        evaluate_faithfulness(model, data, convention=Convention(measure="label_probability"))


def test_a_data_set_without_any_label_is_refused():
    """Catches a mean over nothing."""
    model, _, _, labels = linear_case()
    with pytest.raises(NothingToMeasureError, match="none of the 6 images that can be measured has a label"):
        evaluate_faithfulness(model, with_labels(torch.zeros_like(labels)))


def test_outputs_with_a_nan_count_as_none():
    """Catches a NaN that reaches the curves, or ranks first in a precision."""
    _, data, _, _ = linear_case(share=1.0)

    class Diverges(Linear):
        def forward(self, images):
            logits = super().forward(images)
            return logits.masked_fill((images.flatten(1) == 0).all(dim=1)[:, None], torch.nan)

    model = Diverges(*linear_case()[0].parameters())
    found = evaluate_faithfulness(model, data, fill="zero", curves=())
    assert found.deletion.nan_predictions == len(data)
    assert float(found.deletion_curve[-1]) == 0
    assert float(found.deletion.mean_average_precision[-1]) == 100  # every image has every label


# --- what else measures ----------------------------------------------------------------------------------------------


def test_a_row_of_results_says_what_it_holds(tmp_path):
    """Catches a subset accuracy under the name of an accuracy, and a file that cannot be read back."""
    model, data, _, _ = linear_case()
    measured = {seed: evaluate_faithfulness(model, data, seed=seed) for seed in (0, 1)}
    row = faithfulness_row("mine", measured)
    assert "accuracy" not in row.metrics
    assert "accuracy" not in row.details["by_seed"]["0"]
    assert row.metrics["mean_average_precision"].mean == pytest.approx(measured[0].mean_average_precision)
    assert row.metrics["subset_accuracy"].mean == measured[0].subset_accuracy
    assert row.metrics["mean_average_precision_auc"].mean == pytest.approx(measured[0].mean_average_precision_auc)
    assert row.convention["measure"] == "label_probability"
    Results("evaluate", {}, describe_environment(), [row]).save(tmp_path / "results.json")
    loaded = load_results(tmp_path / "results.json").rows[0]
    assert loaded.to_dict() == json.loads(json.dumps(row.to_dict()))
    assert len(loaded.details["by_seed"]["0"]["deletion"]["mean_average_precision"]) == 11


def test_two_models_are_compared_image_by_image():
    """Catches a comparison that does not know the measure, or pairs other images."""
    model, data, _, _ = linear_case()
    other = linear_case(seed=1)[0]
    a, b = evaluate_faithfulness(model, data), evaluate_faithfulness(other, data)
    assert compare_faithfulness(a, b).difference == pytest.approx(a.deletion_auc - b.deletion_auc)


def test_models_of_both_kinds_do_not_judge_each_other():
    """Catches maps of a softmax that rank the pixels of a multi-label model."""
    model, data, _, _ = linear_case()
    other = linear_case(seed=1)[0]
    matrix = referee_matrix({"one": model, "other": other}, data)
    assert matrix.deletion_auc.isfinite().all()
    assert float(matrix.deletion_auc[0, 0]) == evaluate_faithfulness(model, data, curves=()).deletion_auc
    other.config = None
    with pytest.raises(ValueError, match="must both be multi-label models, or both have exclusive classes"):
        evaluate_faithfulness(model, data, ranked_by=other)


def test_random_weights_explain_the_labels():
    """Catches a check that takes the labels for class numbers, or leaves unlabelled images without a map."""
    model = multi(linear_net())
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
    data = [{"pixel_values": image, "labels": row} for image, row in zip(images, labels, strict=True)]
    found = randomized_weights_correlation(model, data)
    assert found.correlation.shape == (1, 4)
    assert int(found.undefined[0]) == 0
    with pytest.raises(ValueError, match="a column for each of the model's 3 classes, got 2"):
        randomized_weights_correlation(model, [{**row, "labels": [1, 0]} for row in data])


def test_what_needs_one_class_of_an_image_is_refused():
    """Catches image classes and DiffROAR of whatever label stands first."""
    model, data, images, labels = linear_case()
    with pytest.raises(ValueError, match=r"image classes .* a multi-label model is refused"):
        find_image_classes(model, data)
    with pytest.raises(ValueError, match=r"DiffROAR .* a multi-label model is refused"):
        diff_roar(model, lambda *_: model, (images, labels), (images, labels), 0.5)
