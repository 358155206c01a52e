"""results.json: written and read back, refused where it does not keep to its schema; the metrics load offline."""

import copy
import dataclasses
import functools
import importlib.resources
import json
import math
import shutil
import statistics
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from smoot_hf.evaluation.convention import Convention
from smoot_hf.evaluation.faithfulness import evaluate_faithfulness
from smoot_hf.evaluation.localisation import MEASURES
from smoot_hf.evaluation.metrics import metric_path
from smoot_hf.evaluation.results import (
    Measurement,
    Results,
    Row,
    describe_environment,
    faithfulness_row,
    left_out_notes,
    load_results,
)
from smoot_hf.functional.localisation import top_outside
from smoot_hf.functional.perturbation import area_under_curve


def faithfulness(seed, images=0, **convention):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    pixels = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(images))
    data = [{"pixel_values": pixels[i], "labels": i % 3} for i in range(6)]
    return evaluate_faithfulness(model, data, steps=4, convention=Convention(**convention), seed=seed)


def results():
    rows = [
        Row("standard", {"accuracy": Measurement({0: 98.0, 1: 99.0, 2: 98.5})}),
        faithfulness_row("smoot", {0: faithfulness(0)}),
        faithfulness_row("smoot", {seed: faithfulness(seed, fill="mean") for seed in range(2)}),
    ]
    return Results("compare_methods", {"epochs": 3, "seeds": [0, 1, 2]}, describe_environment(), rows)


def test_saved_is_loaded(tmp_path):
    """Catches a field that is lost or changes its type on the way through the file."""
    written = results()
    path = tmp_path / "results.json"
    written.save(path)
    assert load_results(path).to_dict() == written.to_dict() == json.loads(path.read_text())


def test_statistics_are_the_samples():
    """Catches the population's standard deviation, and a spread claimed from one run."""
    many = Measurement({0: 1.0, 1: 2.0, 2: 4.0})
    assert many.to_dict() == {
        "unit": "percent",
        "values": {"0": 1.0, "1": 2.0, "2": 4.0},
        "mean": pytest.approx(7 / 3),
        "std": pytest.approx(math.sqrt(7 / 3)),
        "n": 3,
    }
    assert many.format() == "2.33 ± 1.53 (n=3)"
    one = Measurement({5: 36.35})
    assert (one.mean, one.std, one.format()) == (36.35, None, "36.35 (n=1)")
    assert statistics.stdev([1, 2, 4]) == pytest.approx(many.std)
    with pytest.raises(ValueError, match="at least one seed"):
        Measurement({})
    with pytest.raises(ValueError, match="must be finite"):
        Measurement({0: math.nan})


def test_table_carries_its_conventions():
    """Catches a number in a table without what it depends on, and a missing one shown as something else."""
    table = results().markdown_table({"accuracy": "Accuracy (%)", "deletion_auc": "Deletion AUC"})
    lines = table.splitlines()
    assert lines[:3] == [
        "| | Accuracy (%) | Deletion AUC |",
        "|---|---|---|",
        "| standard | 98.50 ± 0.50 (n=3) | – |",
    ]
    assert lines[3].startswith("| smoot [1] | ")
    assert lines[3].count("(n=1)") == 2
    assert lines[4].startswith("| smoot [2] | ")
    assert lines[4].count("(n=2)") == 2
    assert lines[5] == ""
    assert "corner fill" in lines[6]
    assert "mean fill" in lines[7]


def test_row_keeps_what_was_measured():
    """Catches metrics under each other's names, and two conventions in one row."""
    measured = {seed: faithfulness(seed) for seed in (3, 4)}
    row = faithfulness_row("sgt", measured)
    assert row.metrics["deletion_auc"].values == {3: measured[3].deletion_auc, 4: measured[4].deletion_auc}
    assert row.metrics["insertion_auc"].values[3] == measured[3].insertion_auc
    assert row.metrics["gap"].values[3] == measured[3].gap
    assert row.metrics["random_auc"].values[4] == measured[4].random_auc
    assert row.convention == measured[3].convention.to_dict()
    assert row.details["by_seed"]["4"]["deletion"]["values"] == measured[4].deletion_curve.tolist()
    with pytest.raises(ValueError, match="row 'sgt' must have one convention, got 2"):
        faithfulness_row("sgt", {0: faithfulness(0), 1: faithfulness(1, fill="mean")})


def test_a_row_is_of_one_data_set():
    """Fault: a mean over seeds that were measured on different images, as if the seed were all that differs."""
    with pytest.raises(ValueError, match="row 'sgt' must be measured on one data set, got the fingerprints"):
        faithfulness_row("sgt", {0: faithfulness(0), 1: faithfulness(1, images=1)})
    written = faithfulness_row("sgt", {0: faithfulness(0)}).details["by_seed"]["0"]["dataset_fingerprint"]
    assert written == faithfulness(0).dataset_fingerprint != faithfulness(0, images=1).dataset_fingerprint


def test_images_left_out_are_said():
    """Catches a mean over fewer images than the reader thinks: NaN and flat attributions are counted and reported."""
    whole, holed = faithfulness(0), dataclasses.replace(faithfulness(1), nan_skipped=3, flat_skipped=2)
    checks = {"image_classes": {"nan_skipped": 0, "flat_skipped": 4, "n": 8}}
    checks["random_weights"] = {"images": 12, "undefined": 5}
    rows = [
        faithfulness_row("sgt", {0: whole, 1: holed}),
        Row("other", {"accuracy": Measurement({0: 1.0})}),
        Row("gradient: checks", {}, whole.convention.to_dict(), checks),
    ]
    assert left_out_notes(rows) == [
        f"sgt, seed 1, corner fill: 3 images left out, whose attribution holds a NaN; {holed.n} measured.",
        "sgt, seed 1, corner fill: 2 images left out, whose attribution has one value at all positions; "
        f"{holed.n} measured.",
        "gradient: checks, corner fill: 4 images left out, whose attribution has one value at all positions; "
        "8 measured.",
        "gradient: checks, corner fill: 5 of 12 maps have no rank correlation with random weights, because one of the "
        "two is constant or holds a NaN.",
    ]


def test_predictions_counted_as_wrong_are_said():
    """Catches NaN predictions, and maps that random weights have made constant, of which no reader is told."""
    measured = faithfulness(0)
    poor = dataclasses.replace(measured, deletion=dataclasses.replace(measured.deletion, nan_predictions=7))
    classes = {"nan_skipped": 2, "n": 8, "nan_predictions": 5, "predictions": 88}
    check = {"undefined": 4, "images": 10}
    convention = measured.convention.to_dict()
    rows = [
        faithfulness_row("sgt", {0: poor}),
        Row("sgt: classes", {}, convention, {"image_classes": classes, "random_weights": check}),
        Row("whole", {}, convention, {"image_classes": {"nan_predictions": 0}, "random_weights": {"undefined": 0}}),
    ]
    assert left_out_notes(rows) == [
        f"sgt, seed 0, corner fill: 7 of {measured.predictions} predictions hold a NaN or an infinity, and count as "
        "wrong.",
        "sgt: classes, corner fill: 2 images left out, whose attribution holds a NaN; 8 measured.",
        "sgt: classes, corner fill: 5 of 88 predictions hold a NaN or an infinity, and count as wrong.",
        "sgt: classes, corner fill: 4 of 10 maps have no rank correlation with random weights, because one of the two "
        "is constant or holds a NaN.",
    ]


def broken(change):
    content = copy.deepcopy(results().to_dict())
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=2), "schema_version 2; this package reads 1"),
        (lambda c: c.pop("schema_version"), "results.json must have 'schema_version'"),
        (lambda c: c.pop("settings"), "results.json must have 'settings'"),
        (lambda c: c.update(rows={}), r"results.json.rows must be list"),
        (lambda c: c["environment"].pop("commit"), "environment must name 'commit'"),
        (lambda c: c["environment"].update(torch=None), "environment must name 'torch' as text, got None"),
        (lambda c: c["rows"].append([]), r"rows\[3\] must be an object, got list"),
        (lambda c: c["rows"][0].pop("metrics"), r"rows\[0\] must have 'metrics'"),
        (lambda c: c["rows"][0]["metrics"]["accuracy"].update(n=True), r"metrics\['accuracy'\].n must be int"),
        (lambda c: c["rows"][0]["metrics"]["accuracy"].update(mean=98.6), "mean must be 98.5"),
        (lambda c: c["rows"][0]["metrics"]["accuracy"].update(std=None), "std must be 0.5"),
        (lambda c: c["rows"][0]["metrics"]["accuracy"]["values"].update(first=1.0), "must map seeds to numbers"),
        (lambda c: c["rows"].append(c["rows"][0]), "got 'standard' twice"),
        (
            lambda c: c["rows"][1]["details"].update(by_seed=[]),
            r"rows\[1\].details.by_seed must be an object, got list",
        ),
        (lambda c: c["rows"][1]["details"].update(by_seed={"0": 1}), r"by_seed\['0'\] must be an object, got int"),
        (
            lambda c: c["rows"][1]["details"]["by_seed"]["0"].update(flat_skipped="7"),
            r"by_seed\['0'\].flat_skipped must be int, got '7'",
        ),
        (lambda c: c["rows"][0]["details"].update(random_weights=1), "random_weights must be an object, got int"),
    ],
)
def test_broken_files_are_refused(tmp_path, change, message):
    """Catches a file of another version, or edited by hand, that is read as if it were sound."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(ValueError, match=message) as error:
        load_results(path)
    assert str(path) in str(error.value)


HUGE = 10**400


def values_of(change):
    return lambda content: change(content["rows"][0]["metrics"]["accuracy"]["values"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=HUGE), "schema_version 1000"),
        (lambda c: c["rows"][0]["metrics"]["accuracy"].update(mean=HUGE), r"mean must be int \| float, got 1000"),
        (lambda c: c["rows"][0]["metrics"]["accuracy"].update(std=-HUGE), "std must be"),
        (lambda c: c["rows"][0]["metrics"]["accuracy"].update(n=HUGE), "n must be int"),
        (lambda c: c["rows"][1]["details"]["by_seed"]["0"].update(n=HUGE), "n must be int"),
        (values_of(lambda v: v.update({"0": HUGE})), "must map seeds to numbers, got '0': 1000"),
        (values_of(lambda v: v.update({"0": 1e308, "1": 1e308, "2": 1e308})), "must have a finite mean and spread"),
        (values_of(dict.clear), "accuracy'.: values must hold at least one seed"),
        (values_of(lambda v: v.update({str(HUGE): 1.0})), "must map seeds to numbers, got '1000"),
        (values_of(lambda v: v.update({"--5": 1.0})), "must map seeds to numbers, got '--5'"),
        (values_of(lambda v: v.update({"²": 1.0})), "must map seeds to numbers, got '²'"),
        (values_of(lambda v: v.update({"01": 1.0})), "must map seeds to numbers, got '01'"),
        (values_of(lambda v: v.update({"": 1.0})), "must map seeds to numbers, got ''"),
    ],
)
def test_crafted_numbers_are_one_error_that_names_the_file(tmp_path, change, message):
    """Fault: OverflowError or an error without a place, of numbers that JSON has and a float has not."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(ValueError, match=message) as error:
        load_results(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


def nested(depth):
    """Lists in lists, without the recursion that writing them would take."""
    text = json.dumps(broken(lambda content: content["settings"].update(deep="HERE")))
    return text.replace('"HERE"', "[" * depth + "]" * depth)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested(100_000), "is no JSON that can be read"),
        (nested(300), "must not be more than 50 objects and lists deep"),
        ("[" * 100_000, "is no JSON that can be read"),
        ('{"schema_version": 1' + "0" * 5000 + "}", "is no JSON that can be read"),
        ('{"schema_version": NaN}', "JSON has no NaN"),
        ('{"schema_version": 1e999}', "schema_version inf"),
        (b"\xff\xfe{}", "is no JSON that can be read"),
        ("", "is no JSON that can be read"),
        ("null", "must be an object, got NoneType"),
        ("[]", "must be an object, got list"),
        ('"' + "x" * 100_000 + '"', "must be an object, got str"),
    ],
    ids=range(11),
)
def test_crafted_files_are_one_error_that_names_the_file(tmp_path, text, message):
    """Fault: RecursionError, UnicodeDecodeError or a decoder's own words, without the file."""
    path = tmp_path / "results.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_results(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-HUGE, HUGE) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(content, here=()):
    """The path to every value of nested objects and lists."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*here, key)
        yield from places(value, (*here, key))


SOUND = results().to_dict()
PLACES = [place for place in places(SOUND) if "by_seed" not in place or place[-1] in ("by_seed", "0", "n")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.sampled_from(PLACES), value=JSON, is_missing=st.booleans())
def test_any_value_at_any_place_is_read_or_refused_by_a_value_error(tmp_path, place, value, is_missing):
    """Fault: TypeError, AttributeError or OverflowError of a value that the schema does not expect there."""
    content = copy.deepcopy(SOUND)
    *outer, last = place
    holder = functools.reduce(lambda inner, key: inner[key], outer, content)
    if is_missing:
        del holder[last]
    else:
        holder[last] = value
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    try:
        loaded = load_results(path)
    except ValueError as error:
        assert type(error) is ValueError  # noqa: PT017 - not a decoder's own, and the file is named
        assert str(path) in str(error)  # noqa: PT017
    else:
        left_out_notes(loaded.rows)
        assert loaded.markdown_table({"accuracy": "Accuracy"})
        assert json.loads(json.dumps(loaded.to_dict()))["rows"] == content["rows"]


def test_a_file_that_does_not_name_its_data_set_is_said_to_be_old(tmp_path, monkeypatch):
    """Fault: a file of an older version is taken without a word, and put beside measurements of other images."""
    said = []
    monkeypatch.setattr("smoot_hf.evaluation.results.logger.warning", said.append)
    path = tmp_path / "results.json"
    results().save(path)
    load_results(path)
    assert said == []
    content = results().to_dict()
    del content["rows"][1]["details"]["by_seed"]["0"]["dataset_fingerprint"]
    path.write_text(json.dumps(content))
    load_results(path)
    (warning,) = said
    assert f"{path} does not say which data set 'smoot' was measured on" in warning


def test_what_is_no_json_is_refused(tmp_path):
    """Catches a bare decoder error, and NaN, which JSON has not, written all the same."""
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is no JSON that can be read"):
        load_results(path)
    with pytest.raises(ValueError, match="JSON"):
        Results("t", {"x": math.nan}, describe_environment(), []).save(path)


def test_environment_names_the_commit_or_none(tmp_path):
    """Catches the commit of some other project's checkout, in which the package is merely installed."""
    from smoot_hf.evaluation.results import _commit

    copied = tmp_path / "results.py"
    shutil.copy(importlib.resources.files("smoot_hf.evaluation") / "results.py", copied)
    assert _commit(copied) is None
    assert describe_environment()["device"].startswith("cpu: ")


@pytest.fixture(scope="module")
def load_metric(tmp_path_factory):
    """`evaluate.load` from the package's own files, with every cache in a folder of this module's tests."""
    cache = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache / "modules")
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        # evaluate imports its copies by name: those of another cache must be forgotten.
        patch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "evaluate_modules").is_dir()])
        for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
            patch.delitem(sys.modules, name)
        yield lambda name: evaluate.load(metric_path(name), cache_dir=str(cache))
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["deletion_auc", "insertion_auc"])
def test_metrics_load_offline_and_agree_with_the_function(load_metric, name):
    """Catches a metric that needs the Hub, and another rule for the area; true fractions are uneven."""
    metric = load_metric(name)
    fractions = [0.0, 78 / 784, 0.5, 1.0]
    curves = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = area_under_curve(torch.tensor(fractions, dtype=torch.float64), curves).mean().item()
    assert metric.compute(predictions=curves.tolist(), fractions=fractions) == {
        name: pytest.approx(expected, abs=1e-12)
    }
    for i in range(5):
        metric.add(prediction=curves[i].tolist())
    assert metric.compute(fractions=fractions) == {name: pytest.approx(expected, abs=1e-12)}
    with pytest.raises(ValueError, match="every curve must have 4 values"):
        metric.compute(predictions=[[1.0, 0.0]], fractions=fractions)
    with pytest.raises(ValueError, match="rising numbers"):
        metric.compute(predictions=[[1.0, 0.0]], fractions=[0.5, 0.5])
    with pytest.raises(ValueError, match=r"within \[0, 1\], got \[0.0, 100.0\]"):
        metric.compute(predictions=[[1.0, 0.0]], fractions=[0.0, 100.0])


@pytest.mark.parametrize(("name", "value"), [("deletion_auc", 0.375), ("insertion_auc", 0.625)])
def test_example_of_the_card_holds(load_metric, name, value):
    """Catches a card whose example gives another number."""
    card = Path(metric_path(name), "README.md").read_text()
    call = next(line for line in card.splitlines() if line.startswith("metric.compute"))
    assert eval(call, {"metric": load_metric(name)}) == {name: value}
    assert f"# {{'{name}': {value}}}" in card


def test_the_metric_of_localisation_loads_offline_and_agrees_with_the_functions(load_metric):
    """Catches rows of maps and masks that are paired wrongly, and a card whose example gives another number."""
    metric = load_metric("localisation")
    maps = torch.rand(5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = torch.rand(5, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    found = metric.compute(predictions=maps.tolist(), references=masks.tolist(), top=0.25)
    expected = {name: measure(maps, masks).mean().item() for name, measure in MEASURES.items()}
    assert found == pytest.approx(expected | {"outside": top_outside(maps, masks, 0.25).mean().item()}, abs=1e-12)
    card = Path(metric_path("localisation"), "README.md").read_text()
    call = next(line for line in card.splitlines() if line.startswith("metric.compute"))
    assert eval(call, {"metric": metric}) == 0.75
    with pytest.raises(ValueError, match="references must mark some of each image and not all, which mask 1"):
        metric.compute(predictions=maps[:2].tolist(), references=[masks[0].tolist(), [[False] * 6] * 4])


def test_a_metric_that_does_not_exist_is_refused():
    """Catches a path that `evaluate.load` takes for the name of a metric on the Hub."""
    with pytest.raises(ValueError, match=r"name must be one of 'deletion_auc'.*'localisation', got 'sensitivity'"):
        metric_path("sensitivity")
