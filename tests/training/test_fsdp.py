"""FSDP 2 in two processes gives what one process gives; what has not been shown to be exact is refused."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import largest_difference, mean_difference
from fsdp_run import RUNS, gradients, make_trainer, train

from smoot_hf.training.checkpoint_folder import find_damage

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every run in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: train(name, folder / name, 1) for name in RUNS} | {"folder": folder}


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """Every run in two processes under FSDP, and what was refused there."""
    folder = tmp_path_factory.mktemp("fsdp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(HERE / "fsdp_run.py"), str(folder), str(alone["folder"] / "adamw" / "checkpoint-4")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(folder / "found.pt", weights_only=False) | {"folder": folder}


@pytest.mark.parametrize("name", RUNS)
def test_k_and_weights_are_those_of_one_process(name, alone, together):
    """Catches a run that shards nothing, gradients of shards that are lost, and K of a rank's own."""
    one, two = alone[name], together[name]
    # After an evaluation the outermost weights stay gathered until the next training step.
    assert two["sharded"] == len(two["parameters"]) or (name == "measured" and two["sharded"] > 30)
    assert one["sharded"] == 0
    if name != "standard":
        assert torch.equal(one["k"], two["k"])
        assert name in ("sgt", "dropout") or len(one["k"].unique()) > 1
    if name != "dropout":  # each process draws its own
        # AdamW makes steps of full length of gradients that are rounding alone, as those of the keys' biases.
        measure, most = (mean_difference, 1e-4) if name == "adamw" else (largest_difference, 1e-5)
        off = measure(one["parameters"], two["parameters"])
        print(f"{name}: weights off by {off:.1e}")  # noqa: T201 - the figure for docs/reliability.md, by `pytest -s`
        assert off < most


def test_both_views_have_the_same_dropout(together):
    """Catches a random state that the gathering of weights moves between the views: nothing is masked, and KL is 0."""
    assert [entry["kl_loss"] for entry in together["dropout"]["logs"] if "kl_loss" in entry] == [0.0] * 6


def test_what_is_measured_is_that_of_one_process(alone, together):
    """Catches an evaluation that one rank does alone, which would wait for ever, and a deletion area of shards."""
    for name in ("eval_loss", "eval_deletion_auc"):
        one, two = ([e[name] for e in found["measured"]["logs"] if name in e] for found in (alone, together))
        assert len(one) == 2
        assert two == pytest.approx(one, rel=1e-4)


def test_resumed_is_uninterrupted_bit_for_bit(together):
    """Catches weights, optimizer or K that a checkpoint of whole states does not bring back."""
    assert torch.equal(together["resumed"]["k"], together["adamw"]["k"])
    for name, value in together["adamw"]["parameters"].items():
        assert torch.equal(value, together["resumed"]["parameters"][name])


@pytest.mark.parametrize("reshards", [0, 1], ids=["gathered again", "kept"])
def test_gradients_in_float64_are_those_of_one_process(reshards, together):
    """Catches weights that are named to autograd though they are shards: the cross-entropy's gradient would be lost."""
    assert largest_difference(together["gradients"][reshards], gradients(1, 0)) < 1e-12


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sharded states", "save_model would write no weights.*FULL_STATE_DICT"),
        ("checkpointing", "FSDP with activation_checkpointing is refused"),
        ("offload", "FSDP with cpu_offload is refused"),
        ("share", "FSDP with masked_share below 1 is refused"),
        ("of one process", "was written without FSDP, and this training runs with it: resume as it was begun"),
    ],
)
def test_the_rest_is_refused_by_name(what, message, together):
    assert re.search(message, together["refused"][what] or "")


def test_a_checkpoint_of_fsdp_is_refused_without_it(together, tmp_path):
    """Catches weights taken from it, and an optimizer that starts afresh without a word."""
    shutil.copytree(together["folder"] / "adamw", tmp_path / "adamw")
    trainer = make_trainer("adamw", tmp_path / "adamw", 1)
    with pytest.raises(ValueError, match="was written with FSDP, and this training runs without it"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "adamw" / "checkpoint-4"))


@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "optimizer.bin", "model.safetensors"])
def test_a_torn_checkpoint_is_not_taken_for_whole(name, together, tmp_path):
    """Catches files of FSDP that nobody looks at."""
    folder = shutil.copytree(together["folder"] / "adamw" / "checkpoint-4", tmp_path / "checkpoint-4")
    assert find_damage(folder) is None
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert name in find_damage(folder)
