"""What is read from a run's folder, which may come from anybody: checked before it is used, one ValueError else."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoot_hf.experiments import run

RECORD = {
    "method": "smoot",
    "seed": 0,
    "settings": {"dataset": "digits", "model": "cnn", "num_train_epochs": 3.0},
    "dataset_fingerprint": "0123456789abcdef",
    "k": {"k_min": 12, "k_median": 20.5, "k_max": 45},
    "train_seconds": 10.5,
    "is_finished": True,
}
HISTORY = {"pixels": 64, "k_min": 12, "epochs": [0.0, 1.0], "counts": [[0, 3, 0], [1, 1, 1]]}


def with_entry(content, name, value):
    """The text of a file in which one entry is another."""
    return json.dumps({**content, name: value})


CRAFTED_RECORDS = {
    "method is a path out of the folder": (with_entry(RECORD, "method", "../../outside"), "method must be one of"),
    "method is an absolute path": (with_entry(RECORD, "method", "/tmp/outside"), "method must be one of"),
    "method is a list": (with_entry(RECORD, "method", ["smoot"]), "method must be one of"),
    "method has a line break": (with_entry(RECORD, "method", "smoot\n# Heading"), "method must be one of"),
    "method is missing": (json.dumps({"seed": 0}), "no entry 'method'"),
    "seed is missing": (json.dumps({"method": "sgt"}), "no entry 'seed'"),
    "seed is text": (with_entry(RECORD, "seed", "0/../.."), "seed must be a whole number"),
    "seed is true": (with_entry(RECORD, "seed", True), "seed must be a whole number"),
    "seed is negative": (with_entry(RECORD, "seed", -1), "seed must be a whole number"),
    "seed is a fraction": (with_entry(RECORD, "seed", 0.5), "seed must be a whole number"),
    "seed is above what NumPy takes": (with_entry(RECORD, "seed", 2**32), "seed must be a whole number"),
    "seed is huge": (with_entry(RECORD, "seed", 10**400), "seed must be a whole number"),
    "seed has more digits than Python reads": (
        json.dumps(RECORD).replace('"seed": 0', f'"seed": {"9" * 9999}'),
        "read",
    ),
    "settings are a list": (with_entry(RECORD, "settings", ["digits"]), "settings must be an object"),
    "data set is a number": (with_entry(RECORD, "settings", {"dataset": 5}), "settings.dataset must be text"),
    "column is a list": (with_entry(RECORD, "settings", {"image_column": []}), "image_column must be text or null"),
    "samples are text": (
        with_entry(RECORD, "settings", {"max_train_samples": "9"}),
        "max_train_samples must be a whole number or null",
    ),
    "convert_rgb is text": (with_entry(RECORD, "settings", {"convert_rgb": "no"}), "convert_rgb must be true or false"),
    "optimizer is none of ours": (with_entry(RECORD, "settings", {"optimizer": "sgd"}), "optimizer must be one of"),
    "fingerprint is a number": (with_entry(RECORD, "dataset_fingerprint", 7), "dataset_fingerprint must be text"),
    "k is a number": (with_entry(RECORD, "k", 3), "k must be null or an object"),
    "k lacks a number": (with_entry(RECORD, "k", {"k_min": 1}), "k must be null or an object"),
    "k has text": (with_entry(RECORD, "k", {**RECORD["k"], "k_max": "<b>"}), "k must be null or an object"),
    "k falls": (with_entry(RECORD, "k", {**RECORD["k"], "k_max": 1}), "k_min <= k_median <= k_max"),
    "k is huge": (with_entry(RECORD, "k", {**RECORD["k"], "k_max": 10**400}), "k must be null or an object"),
    "k is infinite": (with_entry(RECORD, "k", {**RECORD["k"], "k_max": float("inf")}), "not a finite number"),
    "k is NaN": (with_entry(RECORD, "k", {**RECORD["k"], "k_max": float("nan")}), "not a finite number"),
    "time overflows": (json.dumps(RECORD).replace("10.5", "1e999"), "not a finite number"),
    "time is negative": (with_entry(RECORD, "train_seconds", -1), "train_seconds must be null or a number"),
    "finished is text": (with_entry(RECORD, "is_finished", "false"), "is_finished must be true or false"),
    "an entry nobody knows": (with_entry(RECORD, "x" * 500, 1), "unknown entry"),
    "a list": ("[]", "must hold an object"),
    "text": ('"smoot"', "must hold an object"),
    "nothing": ("", "cannot be read"),
    "half a file": (json.dumps(RECORD)[:40], "cannot be read"),
    "nested a little too deep": (with_entry(RECORD, "settings", json.loads('{"a":' * 20 + "1" + "}" * 20)), "nested"),
    "nested beyond what Python reads": ("[" * 200_000, "cannot be read"),
}


@pytest.mark.parametrize("name", CRAFTED_RECORDS)
def test_a_crafted_record_is_one_error_that_names_the_entry(name, tmp_path):
    """Fault: a name or number of a downloaded run is used as it is: as a folder, in a table, in a report."""
    text, message = CRAFTED_RECORDS[name]
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json") as refused:
        run.RunRecord.load(tmp_path)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


def test_a_record_that_is_no_text_is_refused(tmp_path):
    """Fault: the error of a codec, without the file's name."""
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        run.RunRecord.load(tmp_path)


def test_what_is_saved_is_read_again_and_old_records_too(tmp_path):
    """Fault: a check that refuses this package's own files, or those of before an entry was added."""
    load = run.RunRecord.load
    record = run.RunRecord(**RECORD)
    record.save(tmp_path)
    assert load(tmp_path) == record
    (tmp_path / "run.json").write_text(json.dumps({"method": "sgt", "seed": 3}))
    assert (load(tmp_path).method, load(tmp_path).seed, load(tmp_path).is_finished) == ("sgt", 3, True)


def test_every_entry_of_a_record_is_checked():
    """Fault: a field that is added to the record and read unchecked."""
    assert run._ENTRIES.keys() == {field.name for field in dataclasses.fields(run.RunRecord)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(name=st.sampled_from([*RECORD, "other"]), value=JSON)
def test_any_value_of_an_entry_is_taken_whole_or_refused(tmp_path_factory, name, value):
    """Fault: another kind of error than ValueError, or a record whose method or seed is not one of ours."""
    folder = tmp_path_factory.mktemp("crafted")
    (folder / "run.json").write_text(with_entry(RECORD, name, value))
    record, message = None, ""
    try:
        record = run.RunRecord.load(folder)
    except ValueError as error:
        message = str(error)
    if record is None:
        assert "run.json" in message
    else:
        assert record.name in {f"{method}-seed{record.seed}" for method in ("standard", "sgt", "smoot")}
        assert record == run.RunRecord(**{**RECORD, name: value})


CRAFTED_HISTORIES = {
    "a list": ("[]", "must hold an object"),
    "an entry too many": (with_entry(HISTORY, "more", 1), "must hold an object"),
    "pixels are text": (with_entry(HISTORY, "pixels", "64"), "whole numbers"),
    "k_min above the pixels": (with_entry(HISTORY, "k_min", 65), "0 <= k_min <= pixels"),
    "pixels are huge": (with_entry(HISTORY, "pixels", 10**400), "whole numbers"),
    "epochs fall": (with_entry(HISTORY, "epochs", [1.0, 0.0]), "epochs must be rising"),
    "epochs are text": (with_entry(HISTORY, "epochs", ["a", "b"]), "epochs must be rising"),
    "fewer counts than epochs": (with_entry(HISTORY, "counts", [[1]]), "one list of whole numbers"),
    "counts are negative": (with_entry(HISTORY, "counts", [[-1, 2], [1, 1]]), "one list of whole numbers"),
    "no image counted": (with_entry(HISTORY, "counts", [[0, 0], [1, 1]]), "one list of whole numbers"),
    "no counts": (with_entry(HISTORY, "counts", [[], []]), "one list of whole numbers"),
    "counts of different lengths": (with_entry(HISTORY, "counts", [[1], [1, 2]]), "lists of one length"),
    "more numbers than K has": (with_entry(HISTORY, "counts", [[1] * 54, [1] * 54]), "at most pixels"),
}


@pytest.mark.parametrize("name", CRAFTED_HISTORIES)
def test_a_crafted_history_of_k_is_one_error(name, tmp_path):
    """Fault: a traceback from a figure, or a figure of what was never counted."""
    text, message = CRAFTED_HISTORIES[name]
    (tmp_path / "k_history.json").write_text(text)
    with pytest.raises(ValueError, match=r"k_history\.json") as refused:
        run.BudgetHistory.load(tmp_path)
    assert message in str(refused.value)


def test_a_history_of_k_is_read_as_it_was_saved(tmp_path):
    """Fault: a check that refuses this package's own files. 53 numbers from 12 to 64 are all that 64 pixels have."""
    history = run.BudgetHistory(64, 12, [0.0, 0.5], [[1] * 53, [2] * 53])
    history.save(tmp_path)
    assert run.BudgetHistory.load(tmp_path) == history
