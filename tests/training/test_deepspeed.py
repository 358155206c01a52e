"""DeepSpeed's ZeRO 1, 2 and 3 in two processes give what one process gives; the rest is refused by name."""

import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import fsdp_run
import pytest
import torch
from conftest import largest_difference, mean_difference
from deepspeed_run import BF16, RUNS

from smoot_hf.training.checkpoint_folder import find_damage
from smoot_hf.training.checkpoints import CheckpointTrainer

HERE = Path(__file__).parents[1]
STAGES = (1, 2, 3)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed: make test-deepspeed"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every run in this process, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp_run, "RUNS", RUNS | {"bf16": BF16})
        return {name: fsdp_run.train(name, folder / name, 1) for name in fsdp_run.RUNS} | {"folder": folder}


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """Every run in two processes under each stage, and what was refused there."""
    folder = tmp_path_factory.mktemp("deepspeed")
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(HERE / "deepspeed_run.py"), str(folder), str(alone["folder"] / "adamw" / "checkpoint-4")]
    # DeepSpeed compiles what its processes share, the first time.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(folder / "found.pt", weights_only=False) | {"folder": folder}


def weights_off(name, one, other):
    """AdamW makes steps of full length of gradients that are rounding alone, as those of the keys' biases."""
    measure, most = (mean_difference, 1e-4) if name == "adamw" else (largest_difference, 1e-5)
    return measure(one["parameters"], other["parameters"]), most


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", RUNS)
def test_k_and_weights_are_those_of_one_process(name, stage, alone, together):
    """Catches a saliency that the engine takes for the backward pass of the loss, and a loss that is scaled twice."""
    one, two = alone[name], together[name, stage]
    assert two["sharded"] == (len(two["parameters"]) if stage == 3 else 0)
    if not name.startswith("standard"):
        assert torch.equal(one["k"], two["k"])
        assert name in ("sgt", "dropout") or len(one["k"].unique()) > 1
    if name != "dropout":  # each process draws its own
        off, most = weights_off(name, one, two)
        print(f"ZeRO {stage}, {name}: weights off by {off:.1e}")  # noqa: T201 - the figure for the docs, by `pytest -s`
        assert off < most


@pytest.mark.parametrize("stage", STAGES)
def test_both_views_have_the_same_dropout(stage, together):
    """Catches a random state that the engine moves between the views: nothing is masked, and KL is 0."""
    logs = together["dropout", stage]["logs"]
    losses = [entry["kl_loss"] for entry in logs if "kl_loss" in entry]
    # The eval pass has no dropout, but the two views of the loss do.
    assert losses == [0.0] * 6


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_measured_is_that_of_one_process(stage, alone, together):
    """Catches an evaluation of the parts that a process holds, and losses and norms that are logged otherwise."""
    for name in ("eval_loss", "eval_deletion_auc", "loss", "grad_norm"):
        runs = alone["measured"], together["measured", stage]
        one, two = ([entry[name] for entry in run["logs"] if name in entry] for run in runs)
        assert len(one) >= 2
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["adamw", "bf16"])
def test_resumed_is_uninterrupted_bit_for_bit(name, stage, together):
    """Catches weights, optimizer, learning rate or K that the engine's checkpoint does not bring back."""
    whole, resumed = together[name, stage], together[f"{name} resumed", stage]
    assert torch.equal(resumed["k"], whole["k"])
    for key, value in whole["parameters"].items():
        assert torch.equal(value, resumed["parameters"][key])


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_agrees_with_one_process(stage, alone, together):
    """Catches a saliency or a loss that bf16 ruins; weights that are rounded to 8 bits do not give the same ones."""
    one, two = alone["bf16"], together["bf16", stage]
    assert {value.dtype for value in two["parameters"].values()} == {torch.bfloat16}
    losses = [[entry["loss"] for entry in run["logs"] if "loss" in entry] for run in (one, two)]
    off = (one["k"] - two["k"]).abs().float()
    loss_off = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    print(f"ZeRO {stage}, bf16: K off by {off.mean():.2f}, at most {off.max():.0f}, loss off by {loss_off:.1e}")  # noqa: T201
    # Logits of 8 bits; K moves by 3000 times a shift of the softmax that is itself a few thousandths.
    assert loss_off < 2e-2
    assert off.mean() < 3


def test_a_pipeline_gives_bf16_images_to_weights_of_bf16(together):
    """Catches images in float32, which a convolution of bf16 weights does not take; ViT casts what it is given."""
    logs = together["bf16 cnn"]["logs"]
    assert all(math.isfinite(entry["loss"]) for entry in logs if "loss" in entry)
    assert len(together["bf16 cnn"]["k"].unique()) > 1


@pytest.mark.parametrize("stage", STAGES)
def test_how_gradients_are_sent_changes_nothing(stage, alone, together):
    """Catches an option of ZeRO that is let through and counts a gradient twice."""
    assert torch.equal(alone["accumulated"]["k"], together["tuned", stage]["k"])
    off, most = weights_off("accumulated", alone["accumulated"], together["tuned", stage])
    assert off < most


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("stage 0", "ZeRO stage 0 is refused: it shards nothing"),
        ("stage 3, shared", "ZeRO stage 3 is refused with saliency_pass='shared'.*Set saliency_pass='eval'"),
        ("stage 3, not gathered", "refused without 'stage3_gather_16bit_weights_on_model_save'"),
        ("offload", "DeepSpeed with offload_optimizer is refused"),
        ("share", "DeepSpeed with masked_share below 1 is refused"),
        ("compiled", "DeepSpeed with torch_compile is refused"),
        ("optimizer", "DeepSpeed with optimizer is refused"),
        ("clipping", r"max_grad_norm=1\.0, but DeepSpeed would clip by its own 'gradient_clipping', 0.*'auto'"),
        ("of one process", "was written without DeepSpeed, and this training runs with it: resume as it was begun"),
        (
            "of ZeRO 2",
            "written by ZeRO 1 or 2 with a world size of 2, and this training runs ZeRO 3 with .* of 2: resume",
        ),
    ],
)
def test_the_rest_is_refused_by_name(what, message, together):
    assert re.search(message, together["refused"][what] or "")


def test_a_checkpoint_of_deepspeed_is_refused_without_it(together, tmp_path):
    """Catches weights taken from it, and an optimizer that starts afresh without a word."""
    shutil.copytree(together["folder"] / "adamw-2", tmp_path / "adamw")
    trainer = fsdp_run.make_trainer("adamw", tmp_path / "adamw", 1)
    with pytest.raises(ValueError, match="was written with DeepSpeed, and this training runs without it"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "adamw" / "checkpoint-4"))


def test_a_checkpoint_of_more_processes_is_refused(together):
    """Catches an optimizer of which a part is left behind."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    accelerator = SimpleNamespace(num_processes=1, state=state)
    trainer = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=True, accelerator=accelerator)
    for stage, message in ((2, "ZeRO 1 or 2 with .* of 2, and .* runs ZeRO 1 or 2 with .* of 1"), (3, "ZeRO 3 with")):
        with pytest.raises(ValueError, match=f"was written by {message}"):
            CheckpointTrainer._require_same_engine(trainer, str(together["folder"] / f"adamw-{stage}" / "checkpoint-4"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_torn_checkpoint_is_not_taken_for_whole(stage, together, tmp_path):
    """Catches files of DeepSpeed that nobody looks at: each is cut off, and each is taken away."""
    original = together["folder"] / f"adamw-{stage}" / "checkpoint-4"
    assert find_damage(original) is None
    states = sorted(path.relative_to(original) for path in (original / "global_step4").iterdir())
    assert len(states) == (4 if stage == 3 else 3)
    for state in states:
        folder = shutil.copytree(original, tmp_path / "checkpoint-4")
        content = (folder / state).read_bytes()
        (folder / state).write_bytes(content[: len(content) // 2])
        assert f"{state} is damaged" in find_damage(folder)
        (folder / state).unlink()
        assert "global_step4 is not whole" in find_damage(folder)
        shutil.rmtree(folder)
    folder = shutil.copytree(original, tmp_path / "checkpoint-4")
    shutil.rmtree(folder / "global_step4")
    assert "has no folder 'global_step4'" in find_damage(folder)
