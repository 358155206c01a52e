"""K of every sample: bounds, first visits, duplicates, statistics, file."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import reference
import torch
from datasets import Dataset, Value, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from smoot_hf import MaskBudget
from smoot_hf.fingerprint import dataset_fingerprint
from smoot_hf.training.mask_budget import count_of_ratio
from smoot_hf.training.mask_budget_file import _digest


def budget(num_samples=10, image_size=(10, 10), **overrides):
    return MaskBudget(num_samples, image_size, **overrides)


def idx(*rows):
    return torch.tensor(rows)


def require_equal(one, two):
    """Two states are the same in K, in what has moved, and in what they belong to."""
    assert torch.equal(one["k"], two["k"])
    assert torch.equal(one["has_moved"], two["has_moved"])
    assert one["metadata"] == two["metadata"]


@pytest.mark.parametrize(
    ("ratio", "positions", "count"),
    [(0.2, 28 * 28, 156), (0.8, 28 * 28, 627), (0.2, 32 * 32, 204), (0.5, 32 * 32, 512), (0.29, 100, 29),
     (0.0, 35, 0), (1.0, 35, 35)],
)  # fmt: skip
def test_a_ratio_is_floored_once(ratio, positions, count):
    """Catches a rounding up (the tables' minimum is 204 for 0.2 * 1024) and binary fractions (0.29 * 100 < 29)."""
    assert count_of_ratio(ratio, positions) == count


def test_every_sample_starts_at_the_ratio_in_int32():
    """Catches a bound or an initial value in ratios, and eight bytes where four are promised."""
    k = budget(image_size=(28, 28)).k
    assert k.dtype == torch.int32
    assert k.tolist() == [392] * 10


def test_k_is_a_copy():
    """Catches a caller's arithmetic that changes the training."""
    mine = budget()
    mine.k.zero_()
    assert mine.k.tolist() == [50] * 10


@given(st.integers(0, 2**32 - 1), st.sampled_from(["floor", "trunc", "nearest"]), st.floats(0, 100))
def test_epochs_of_updates_equal_a_slow_loop(seed, rounding, step_size):
    """Catches a move at a second visit, the wrong one of two deltas, lost bounds, and a histogram that drifts."""
    rng = np.random.default_rng(seed)
    fast, slow = budget(7), [50] * 7
    for epoch in range(3):
        visited = set()
        fast.begin_epoch(epoch)
        for _ in range(4):
            rows = rng.integers(0, 7, size=rng.integers(1, 6))
            delta = rng.uniform(-1, 1, size=len(rows))
            delta[rng.random(len(rows)) < 0.1] = np.nan
            assert fast.read(torch.from_numpy(rows)).tolist() == [slow[row] for row in rows]
            before = list(slow)
            for row, d in zip(rows, delta, strict=True):
                if row not in visited:
                    slow[row] = reference.update_budget(slow[row], d, step_size, 20, 80, rounding)
                    visited.add(row)
            moved = fast.update(torch.from_numpy(rows), torch.from_numpy(delta), step_size, rounding)
            assert moved.sum() == sum(slow) - sum(before)
            assert fast.k.tolist() == slow
    assert fast.histogram.tolist() == np.bincount(slow, minlength=81)[20:].tolist()
    statistics = fast.statistics()
    assert statistics == {"k_min": min(slow), "k_median": np.median(slow), "k_max": max(slow)}


def test_a_sample_moves_once_per_epoch_and_again_in_the_next():
    """Catches a second move for a sample that the sampler repeats, and one that never moves again."""
    mine = budget()
    mine.begin_epoch(0)
    mine.update(idx(3), torch.tensor([1.0]), 10)
    mine.begin_epoch(0)
    mine.update(idx(3), torch.tensor([1.0]), 10)
    assert mine.k[3] == 60
    mine.begin_epoch(1)
    mine.update(idx(3), torch.tensor([1.0]), 10)
    assert mine.k[3] == 70


def test_median_of_an_even_number_is_the_mean_of_the_middle_two():
    """Catches torch's lower median, which differs from the tables' and NumPy's."""
    mine = budget(2)
    mine.update(idx(0), torch.tensor([1.0]), 5)
    assert mine.statistics() == {"k_min": 50, "k_median": 52.5, "k_max": 55}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"mask_ratio": 1.2, "mask_ratio_max": 1.5}, "mask_ratio_max=1.5"),
        ({"mask_ratio": 0.1}, "mask_ratio=0.1"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    """Each names the value that is wrong."""
    with pytest.raises(ValueError, match=message):
        budget(**arguments)


# --- file --------------------------------------------------------------------------------------------------------


def moved_budget(**overrides):
    mine = budget(dataset_fingerprint="abc", **overrides)
    mine.begin_epoch(4)
    mine.update(idx(0, 1, 2), torch.tensor([1.0, -1.0, 0.3]), 10)
    return mine


def test_a_saved_budget_comes_back_with_its_epoch_and_first_visits(tmp_path):
    """Catches a resumed epoch in which samples move a second time, and one in which none moves."""
    saved, fresh = moved_budget(), budget(dataset_fingerprint="abc")
    saved.save(tmp_path / "k.safetensors")
    fresh.restore(tmp_path / "k.safetensors")
    for mine in (saved, fresh):
        mine.begin_epoch(4)
        mine.update(idx(0, 5), torch.tensor([1.0, 1.0]), 10)
    assert torch.equal(saved.k, fresh.k)
    assert fresh.k[:6].tolist() == [60, 40, 53, 50, 50, 60]
    assert torch.equal(saved.histogram, fresh.histogram)


def test_the_file_can_be_read_by_anyone(tmp_path):
    """Catches an encoding that only this class understands."""
    moved_budget().save(tmp_path / "k.safetensors")
    with safe_open(tmp_path / "k.safetensors", framework="np") as file:
        assert file.get_tensor("k")[:3].tolist() == [60, 40, 53]
        assert file.metadata()["num_samples"] == "10"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_samples": 11}, "num_samples is 10 there and 11 here"),
        ({"image_size": (10, 20)}, "image_width is 10 there and 20 here"),
        ({"mask_ratio_max": 0.9}, "k_max is 80 there and 90 here"),
        ({"dataset_fingerprint": "xyz"}, "dataset_fingerprint is abc there and xyz here"),
    ],
)
def test_a_budget_of_another_run_is_refused_and_nothing_taken_up(tmp_path, other, message):
    """Catches K of another data set, which would train silently wrong."""
    moved_budget().save(tmp_path / "k.safetensors")
    mine = budget(**({"dataset_fingerprint": "abc"} | other))
    before = mine.k
    with pytest.raises(ValueError, match=message):
        mine.restore(tmp_path / "k.safetensors")
    assert torch.equal(mine.k, before)


def test_a_state_dict_comes_back_with_its_epoch_and_first_visits(tmp_path):
    """Catches a state without what has moved, one that shares memory with the budget, and one of no plain data."""
    mine, other = moved_budget(), budget(dataset_fingerprint="abc")
    state = mine.state_dict()
    torch.save(state, tmp_path / "state.pt")
    mine.begin_epoch(9)
    mine.update(idx(0), torch.tensor([1.0]), 30)
    assert not torch.equal(mine.k, state["k"])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    mine.load_state_dict(state)
    for taken_up in (mine, other):
        require_equal(taken_up.state_dict(), moved_budget().state_dict())
    assert torch.equal(mine.histogram, torch.bincount(mine.k - mine.k_min, minlength=len(mine.histogram)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, r"must have \['has_moved', 'k', 'metadata'\], got \[\]"),
        (lambda state: state | {"metadata": state["metadata"] | {"k_min": "1"}}, "k_min is 1 there and 20 here"),
        (lambda state: state | {"k": state["k"][:1]}, r"of shape \(10,\), got \(1,\)"),
        (lambda state: state | {"has_moved": state["has_moved"].int()}, "got .* torch.int32"),
        (lambda state: state | {"has_moved": torch.tensor([True])}, r"'has_moved' bool of shape .* torch.bool \(1,\)"),
        (lambda state: state | {"k": state["k"] + 1000}, r"must be int32 in \[20, 80\]"),
        (lambda state: state | {"k": state["k"].long()}, r"must be int32 in \[20, 80\]"),
    ],
)
def test_a_state_that_is_not_this_budgets_is_refused_and_nothing_taken_up(change, message):
    """Catches one flag that is spread over all samples, and the K of other data or bounds."""
    mine = budget(dataset_fingerprint="abc")
    before = mine.state_dict()
    with pytest.raises(ValueError, match=message):
        mine.load_state_dict(change(moved_budget().state_dict()))
    require_equal(mine.state_dict(), before)


def test_torn_altered_and_foreign_files_are_refused(tmp_path):
    """Catches a crash while writing and a flipped bit that pass for K."""
    path, mine = tmp_path / "k.safetensors", budget(dataset_fingerprint="abc")
    moved_budget().save(path)
    whole = path.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read"):
            mine.restore(path)
    path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    with pytest.raises(ValueError, match="damaged"):
        mine.restore(path)
    with pytest.raises(ValueError, match="cannot be read"):
        mine.restore(tmp_path / "absent.safetensors")


def test_a_file_altered_or_cut_off_in_any_byte_is_refused(tmp_path):
    """Catches an epoch, a bound or a data set that a flipped bit has changed: K would move twice, or be another's."""
    path, mine = tmp_path / "k.safetensors", budget(dataset_fingerprint="abc")
    moved_budget(meaning={"mask_fill": "mean"}).save(path)
    whole, before = path.read_bytes(), mine.k
    for at in range(len(whole)):
        for spoiled in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            path.write_bytes(spoiled)
            with pytest.raises(ValueError, match="mask budget"):
                mine.restore(path)
            with pytest.raises(ValueError, match="mask budget"):
                MaskBudget.load(path)
    assert torch.equal(mine.k, before)
    assert mine.epoch is None


def test_a_file_of_version_0_1_0_can_be_read_and_taken_up():
    """Catches the K of an earlier run lost: it does not say which run it is of, and its data by another fingerprint."""
    path = Path(__file__).parent / "mask_budget_of_0.1.0.safetensors"
    assert MaskBudget.load(path).k.tolist() == [11, 5, 8, 8, 8, 8]
    meaning = {"saliency_score": "logit", "signed_saliency": True, "saliency_target": "label", "mask_fill": "uniform"}
    data = Dataset.from_dict({"x": list(range(6)), "labels": [0] * 6})
    mine = budget(6, (4, 4), meaning=meaning, dataset_fingerprint=dataset_fingerprint(data))
    mine.restore(path, {"run_id": None, "seed": 3, "global_step": 7})
    assert mine.k.tolist() == [11, 5, 8, 8, 8, 8]
    assert mine.epoch == 2
    with pytest.raises(ValueError, match="run_id is None there and abc here"):
        mine.restore(path, {"run_id": "abc"})


ORIGIN = {"run_id": "abc", "seed": 0, "global_step": 4}


@pytest.mark.parametrize(
    "other", [{"run_id": "xyz"}, {"seed": 1}, {"global_step": 8}], ids=lambda other: next(iter(other))
)
def test_k_of_another_run_seed_or_step_is_refused(other, tmp_path):
    """Catches a K file copied from a later checkpoint, or from the run of another seed, of which all else is equal."""
    path, mine = tmp_path / "k.safetensors", budget(dataset_fingerprint="abc")
    moved_budget().save(path, ORIGIN)
    with pytest.raises(ValueError, match=r"is of another training, or of another time in it: .* there and .* here"):
        mine.restore(path, ORIGIN | other)
    assert mine.k.tolist() == [50] * 10
    mine.restore(path, ORIGIN)
    assert mine.k[:3].tolist() == [60, 40, 53]


def crafted(path, k=None, has_moved=None, **metadata):
    """A file by hand: what it says fits its digest. An entry of `None` is left out."""
    moved_budget().save(path)
    with safe_open(path, "pt") as file:
        said = file.metadata() | metadata
        tensors = {"k": file.get_tensor("k") if k is None else k}
        tensors["has_moved"] = file.get_tensor("has_moved") if has_moved is None else has_moved
    said = {name: value for name, value in said.items() if value is not None}
    if tensors["k"].dtype != torch.bfloat16:
        said["sha256"] = _digest([tensors["k"]], [tensors["has_moved"]], said)
    save_file(tensors, path, metadata=said)


CRAFTED = {
    "K of two dimensions": {"k": torch.full((10, 1), 50, dtype=torch.int32)},
    "K of none": {"k": torch.tensor(50, dtype=torch.int32)},
    "K of no samples": {"k": torch.zeros(0, dtype=torch.int32), "has_moved": torch.zeros(0, dtype=torch.bool),
                        "num_samples": "0"},
    "K in int64": {"k": torch.full((10,), 50)},
    "K in bfloat16": {"k": torch.full((10,), 50, dtype=torch.bfloat16)},
    "K outside its bounds": {"k": torch.full((10,), 90, dtype=torch.int32)},
    "K below 0": {"k": torch.full((10,), -1, dtype=torch.int32)},
    "a flag for all": {"has_moved": torch.ones(1, dtype=torch.bool)},
    "flags of two dimensions": {"has_moved": torch.ones(10, 10, dtype=torch.bool)},
    "flags in uint8": {"has_moved": torch.ones(10, dtype=torch.uint8)},
    "another number of samples": {"num_samples": "11"},
    **{f"no {name}": {name: None} for name in ("epoch", "image_height", "image_width", "k_min", "k_max",
                                               "num_samples")},
    "an epoch in words": {"epoch": "four"},
    "an epoch of 400 digits": {"epoch": "1" * 400},
    "an epoch below 0": {"epoch": "-1"},
    "no height": {"image_height": "0"},
    "cells without a side": {"mask_cell": "0"},
    "cells larger than the image": {"mask_cell": "11"},
    "more cells masked than there are": {"mask_cell": "2"},
    "more pixels than any image": {"image_height": "100000000"},
    "bounds the other way round": {"k_min": "90", "k_max": "20"},
    "a bound above the pixels": {"k_max": "101"},
    "a bound below 0": {"k_min": "-20"},
    "a bound of NaN": {"k_max": "nan"},
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_one_error_that_names_it(name, tmp_path):
    """Catches torch's own words, memory for a billion pixels, and one flag that is taken for those of all samples."""
    path, mine = tmp_path / "k.safetensors", budget(dataset_fingerprint="abc")
    crafted(path, **CRAFTED[name])
    for read in (MaskBudget.load, mine.restore):
        with pytest.raises(ValueError, match=r"mask budget .*k\.safetensors is damaged: .*; resume from an earlier"):
            read(path)
    assert mine.k.tolist() == [50] * 10
    assert mine.epoch is None


def test_a_file_by_hand_can_be_right(tmp_path):
    """Catches a `crafted` whose files are refused whatever stands in them."""
    crafted(tmp_path / "k.safetensors")
    assert torch.equal(MaskBudget.load(tmp_path / "k.safetensors").k, moved_budget().k)


def test_a_failed_save_leaves_the_previous_file(tmp_path, monkeypatch):
    """Catches a write in place: a full disk must not cost the K that was saved."""
    path = tmp_path / "k.safetensors"
    moved_budget().save(path)
    whole = path.read_bytes()

    def disk_full(pieces, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("smoot_hf.training.mask_budget_file._written", disk_full)
    with pytest.raises(OSError, match="no space left"):
        moved_budget().save(path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_budget_of_many_pieces_is_the_file_that_safetensors_writes(tmp_path, monkeypatch):
    """Catches a piece that is left out, twice or out of place, and offsets that only our own reader understands."""
    for module in ("mask_budget", "mask_budget_file"):
        monkeypatch.setattr(f"smoot_hf.training.{module}.PIECE", 3)
    mine, path = moved_budget(), tmp_path / "k.safetensors"
    mine.update(idx(9, 7, 6), torch.tensor([0.5, -0.7, 0.9]), 10)
    mine.save(path)
    state = mine.state_dict()
    with safe_open(path, "pt") as file:
        said = file.metadata()
        assert torch.equal(file.get_tensor("k"), state["k"])
        assert torch.equal(file.get_tensor("has_moved"), state["has_moved"])
    save_file({name: state[name] for name in ("k", "has_moved")}, tmp_path / "whole.safetensors", metadata=said)
    for written in (path, tmp_path / "whole.safetensors"):
        other = budget(dataset_fingerprint="abc")
        other.restore(written)
        require_equal(other.state_dict(), state)
        assert torch.equal(other.histogram, mine.histogram)


@pytest.mark.parametrize("fingerprint", ["abc", None])
def test_a_file_is_enough_to_load_a_budget(tmp_path, fingerprint):
    """Catches bounds that a round trip through ratios moves by a pixel, and a budget that cannot go on."""
    for bounds in ({}, {"mask_ratio": 0.5, "mask_ratio_min": 0.29, "mask_ratio_max": 0.57}):
        saved = budget(23, (7, 13), dataset_fingerprint=fingerprint, **bounds)
        saved.begin_epoch(4)
        saved.update(idx(0, 1, 2), torch.tensor([1.0, -1.0, 0.3]), 10)
        saved.save(tmp_path / "k.safetensors")
        loaded = MaskBudget.load(tmp_path / "k.safetensors")
        assert loaded._identity() == saved._identity()
        assert loaded.statistics() == saved.statistics()
        for mine in (saved, loaded):
            mine.begin_epoch(4)
            mine.update(idx(0, 5), torch.tensor([1.0, 1.0]), 10)
        assert torch.equal(loaded.k, saved.k)
        assert torch.equal(loaded.histogram, saved.histogram)


# --- data set ----------------------------------------------------------------------------------------------------


# HF Datasets 5.2 sorts by an argument that pyarrow 25 has deprecated.
@pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")
def test_k_is_a_data_set_that_sorts_joins_and_goes_through_parquet(tmp_path):
    """Catches rows in another order than the training set's, a ratio of something else, and columns lost on the way."""
    mine = moved_budget()
    images = Dataset.from_dict({"name": [f"image {row}" for row in range(10)]})
    rows = mine.to_dataset(labels=[row % 3 for row in range(10)])
    assert rows.features == {
        "sample_idx": Value("int64"),
        "k": Value("int32"),
        "ratio": Value("float64"),
        "label": Value("int64"),
    }
    assert rows[:3] == {"sample_idx": [0, 1, 2], "k": [60, 40, 53], "ratio": [0.6, 0.4, 0.53], "label": [0, 1, 2]}
    lowest, highest = (rows.sort("k", reverse=reverse)[0]["sample_idx"] for reverse in (False, True))
    assert (lowest, highest) == (1, 0)
    assert images.select(rows.sort("k")["sample_idx"])[0]["name"] == "image 1"
    joined = concatenate_datasets([images, rows], axis=1)
    assert joined[1] == {"name": "image 1", "sample_idx": 1, "k": 40, "ratio": 0.4, "label": 1}
    # What push_to_hub uploads is Parquet.
    rows.to_parquet(tmp_path / "k.parquet")
    assert Dataset.from_parquet(str(tmp_path / "k.parquet"), cache_dir=str(tmp_path))[:] == rows[:]


@pytest.mark.parametrize(
    "labels", [["a", "b"] * 5, np.arange(10), torch.arange(10), Dataset.from_dict({"y": [0, 1] * 5})["y"]]
)
def test_labels_may_come_in_any_form(labels):
    """Catches a tensor, or a column of HF Datasets, that is stored as something else than its values."""
    column = moved_budget().to_dataset(labels)["label"]
    assert list(column) == [value.item() if hasattr(value, "item") else value for value in labels]


def test_labels_of_another_data_set_are_refused():
    """Catches K beside the labels of other images."""
    assert "label" not in budget().to_dataset().column_names
    with pytest.raises(ValueError, match="labels must be one per training sample, 10, got 9"):
        budget().to_dataset([0] * 9)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_k_is_pushed_and_comes_back(hub, tmp_path, monkeypatch):
    """Fault: columns or types that the file of a data set on the Hub does not keep."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    rows = MaskBudget(5, (4, 4)).to_dataset(labels=["ant", "bee", "ant", "bee", "ant"])
    rows.push_to_hub("tester/digits-k")
    back = datasets.load_dataset("tester/digits-k", split="train", cache_dir=str(tmp_path / "cache"))
    assert back.to_dict() == rows.to_dict()
    assert back.features == rows.features
    assert hub.unknown == []
