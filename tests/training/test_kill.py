"""Trainings that are killed with SIGKILL and resumed end as undisturbed ones, bit for bit."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def kill_test(monkeypatch):
    """The benchmark, as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("kill_test")


@pytest.mark.slow
def test_three_kills_leave_no_difference(kill_test, tmp_path):
    """Catches anything that a crash loses; `recipes/benchmarks/kill_test.py` does twenty."""
    assert kill_test.main(["--kills", "3", "--output", str(tmp_path / "kills")]) == 0
    found = json.loads((tmp_path / "kills" / "kill_test.json").read_text())
    assert (found["kills"], found["same"]) == (3, 3)
    assert found["in_save"] >= 1


def test_what_is_compared_can_differ(kill_test):
    """Fault: a comparison that calls everything the same."""
    one = {"state": {0: {"step": torch.tensor(3.0), "square_avg": torch.zeros(2)}}, "groups": [{"lr": 1.0}]}
    same = {"state": {0: {"step": torch.tensor(3.0), "square_avg": torch.zeros(2)}}, "groups": [{"lr": 1.0}]}
    assert kill_test.is_same(one, same)
    for path, value in [
        (("state", 0, "square_avg"), torch.tensor([0.0, 1e-45])),
        (("state", 0, "step"), torch.tensor(3)),
        (("groups",), [{"lr": 1.1}]),
        (("groups",), []),
    ]:
        other = json_like_copy(one)
        place = other
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert not kill_test.is_same(one, other), path


def json_like_copy(value):
    return {key: json_like_copy(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def test_a_folder_in_use_is_refused(kill_test, tmp_path, capsys):
    """Fault: runs of an earlier test taken for those of this one."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        kill_test.main(["--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "is not empty" in capsys.readouterr().err
