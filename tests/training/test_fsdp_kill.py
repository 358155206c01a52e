"""Trainings under FSDP 2 whose processes are killed with SIGKILL and resumed end as undisturbed ones, bit for bit."""

import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smoot_hf.training.checkpoint_folder import checkpoint_folders, find_damage

HERE = Path(__file__).parents[1]
# In the order in which they are written; the file at which a kill is aimed.
AIMS = ("model.safetensors", "pytorch_model_fsdp.bin", "optimizer.bin", "mask_budget.safetensors", "rng_state")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kills():
    """The benchmark of kills, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE.parent / "recipes" / "benchmarks")
        yield importlib.import_module("kill_test")


def start(folder, *more):
    """Start both processes, in a process group of their own; what they print goes to a log beside the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "begun").unlink(missing_ok=True)
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [sys.executable, str(HERE / "fsdp_kill_run.py"), str(folder), *more],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            process_group=0,
        )


def finish(process, folder):
    assert process.wait(timeout=600) == 0, folder.with_suffix(".log").read_text()[-3000:]


@pytest.fixture(scope="module")
def undisturbed(kills, tmp_path_factory):
    """The folder of a training from beginning to end, and its seconds without the start of the interpreter."""
    folder = tmp_path_factory.mktemp("fsdp") / "undisturbed"
    process = start(folder)
    kills.wait_for("begun", process, folder)
    began = time.perf_counter()
    kills.wait_for("trained", process, folder)
    seconds = time.perf_counter() - began
    finish(process, folder)
    return folder, seconds


def run_state(kills, folder):
    """What two runs must share."""
    last = Path(checkpoint_folders(folder)[0])
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        "last checkpoint": last.name,
        "weights": load_file(folder / "model.safetensors"),
        "optimizer": torch.load(last / "optimizer.bin", weights_only=True),
        "schedule": torch.load(last / "scheduler.pt", weights_only=True),
        "K": load_file(last / "mask_budget.safetensors"),
        "logs": [{k: v for k, v in entry.items() if not k.endswith(kills.TIMES)} for entry in logs],
    }


@pytest.mark.parametrize("number", range(10))
def test_a_killed_training_under_fsdp_ends_as_the_undisturbed(number, kills, undisturbed, tmp_path):
    """Catches weights, optimizer, K or a random state that a kill loses, and a torn checkpoint that is taken up.

    Every second kill is aimed at a save; the others come at a moment drawn from the duration of the training.
    """
    expected, seconds = undisturbed
    folder, dice = tmp_path / "killed", random.Random(number)
    was_killed = False
    while not was_killed:
        shutil.rmtree(folder, ignore_errors=True)
        process = start(folder)
        kills.wait_for("begun", process, folder)
        if number % 2:
            was_killed = kills.kill_in_a_save(process, folder, dice.randint(0, 9), AIMS[number // 2])
        else:
            was_killed = kills.kill_at_random(process, dice.uniform(0, seconds))
        if not was_killed:
            finish(process, folder)
    damage = {Path(path).name: find_damage(path) for path in checkpoint_folders(folder)}
    print(f"kill {number}: {damage}")  # noqa: T201 - where it was killed, by `pytest -s`
    finish(start(folder, *(["resume"] if None in damage.values() else [])), folder)
    one, other = run_state(kills, expected), run_state(kills, folder)
    assert [name for name in one if not kills.is_same(one[name], other[name])] == []
