"""Every image classifier of transformers trains with SMOOT, or is refused for a stated reason.

`pytest -m slow tests/compatibility/test_sweep.py` runs all architectures. Without `-m slow` a subset runs that varies
in what matters: convolutions and attention, batch statistics, dropout and stochastic depth, windows, two heads, towers,
other inputs.
"""

import re

import architectures
import pytest
import sweep
import timm
import torch
from architectures import CLASSES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from smoot_hf import MaskBudget
from smoot_hf import functional as SF
from smoot_hf.models.classifier import load_model
from smoot_hf.training import problem

SUBSET = [
    *(
        "vit",
        "deit/WithTeacher",
        "swin",
        "convnext",
        "resnet",
        "mobilenet_v2",
        "levit",
        "clip",
        "perceiver/ConvProcessing",
    ),
    *("segformer", "timm_wrapper"),
    *("timm/resnet", "timm/efficientnet", "timm/swin_transformer", "timm/eva", "timm/convnext", "timm/repvit"),
]
# What no trainer of images can train, and what the row says of it.
REFUSED = {
    "dinat": r"requires the natten library but it was not found",
    "imagegpt": r"^ImageGPT\w+ is refused: its forward takes 'input_ids', no 'pixel_values'",
    "pp_lcnet": r"^PPLCNet\w+ is refused: its forward returns BaseModelOutputWithNoAttention, which has no 'logits'",
    "shieldgemma2": r"^ShieldGemma2\w+ is refused: its main input is text",
    "timm/coat": r"are one weight, which transformers does not save",
    "siglip2": r"^Siglip2\w+ is refused: its 'pixel_values' are patches with their 'spatial_shapes'",
}
CASES = {case.name: case for case in sweep.all_cases()}


@pytest.mark.parametrize(
    "name",
    [name if name in {*SUBSET, *REFUSED} else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_an_architecture_passes_every_check_or_is_refused_by_name(name):
    """Catches whatever one architecture does that the others do not; the checks are described in sweep.py."""
    row = sweep.row_of(CASES[name])
    if name in REFUSED:
        assert row.is_refused, row
        assert pytest.approx(0) == row.seconds
        assert re.search(REFUSED[name], row.note), row.note
    else:
        assert row.passes, row


def test_every_class_of_the_mapping_has_a_row():
    """Catches an architecture that is left out in silence."""
    kinds = [(n,) if isinstance(n, str) else n for n in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()]
    assert len(CASES) == sum(map(len, kinds)) + len(timm.list_modules())
    assert {*SUBSET, *REFUSED} <= CASES.keys()


def test_an_unknown_architecture_is_a_failing_row(monkeypatch):
    """Catches a new architecture that the rules cannot shrink, or that cannot be built, and that vanishes."""
    monkeypatch.setitem(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "resnet", "NewForImageClassification")
    (case,) = [case for case in architectures.cases() if case.name == "resnet"]
    row = sweep.row_of(case)
    assert set(row.marks.values()) == {"no"}
    assert "NewForImageClassification" in row.note
    assert "| resnet |  |  | no | no | no | no | not built: " in sweep.table([row])


FAULTS = {
    "a pixel too many": (
        SF,
        "masked_positions",
        lambda real: lambda s, k, *more: real(s, k + 1, *more),
        {"shared", "eval"},
    ),
    "the most salient": (SF, "masked_positions", lambda real: lambda s, *more: real(-s, *more), {"shared", "eval"}),
    "KL the wrong way": (
        problem,
        "SINGLE_LABEL",
        lambda real: real._replace(divergence=lambda p, q: real.divergence(q, p)),
        {"shared", "eval"},
    ),
    "no K moves": (MaskBudget, "update", lambda real: lambda *_: torch.zeros(3), {"shared", "eval"}),
    "K is not restored": (MaskBudget, "restore", lambda real: lambda *_: None, {"resume"}),
    "another score": (sweep, "attribute", lambda real: lambda *a, **o: real(*a, **o, score="log_prob"), {"captum"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_sweep_can_fail(fault, monkeypatch):
    """Each planted fault is found, in the column where it belongs."""
    place, name, change, columns = FAULTS[fault]
    monkeypatch.setattr(place, name, change(getattr(place, name)))
    marks = sweep.row_of(CASES["vit"]).marks
    assert {column for column, mark in marks.items() if mark == "no"} == columns


@pytest.mark.parametrize("model_type", MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
def test_from_scratch_any_architecture_takes_the_images_as_they_are(model_type, tmp_path):
    """Catches the image size of the configuration where it stands in a vision tower, or is a pair."""
    config = architectures.tiny_config(model_type)
    config.save_pretrained(tmp_path)
    side = config.model_args["img_size"] if model_type == "timm_wrapper" else 64
    labels = [str(i) for i in range(CLASSES)]

    def load():
        return load_model(str(tmp_path), labels=labels, image_size=(side, side), num_channels=3, from_scratch=True)

    if model_type == "dinat":
        with pytest.raises(ImportError, match=r"cannot build .* a 'dinat': Dinat\w+ requires the natten library") as e:
            load()
        assert "\n" not in str(e.value)
        return
    model = load().eval()
    if model_type not in REFUSED:
        assert model(pixel_values=torch.zeros(2, 3, side, side)).logits.shape == (2, CLASSES)
