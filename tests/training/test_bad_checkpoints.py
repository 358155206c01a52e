"""Checkpoints that cannot be resumed from and places that cannot be written to: nothing saved before is lost."""

import resource
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from bad_input import Case, contents, judge, train_recipe, trainer_of
from conftest import TinyImages
from safetensors import safe_open
from safetensors.torch import save_file

from smoot_hf import MaskBudget
from smoot_hf.errors import SaveError
from smoot_hf.training.mask_budget_file import _digest

K_FILE = "mask_budget.safetensors"


def spoiled(message, spoil, data=None, **overrides):
    """Resume from a copy of the checkpoint that `spoil(checkpoint)` has changed."""

    def attempt(folder):
        copy = shutil.copytree(folder / "run" / "checkpoint-2", folder / "checkpoint-2")
        spoil(copy)
        trainer = trainer_of(folder, data=data, max_steps=4, **overrides)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}, trainer.mask_budget.k
        try:
            trainer.train(resume_from_checkpoint=str(copy))
        finally:
            if "model.safetensors" in message:
                assert all(torch.equal(before[0][name], value) for name, value in trainer.model.state_dict().items())
            assert torch.equal(before[1], trainer.mask_budget.k)

    return Case(attempt, ValueError, message)


def nothing(_):
    pass


def cut(name, share=0.5):
    def spoil(checkpoint):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: int(len(whole) * share)])

    return spoil


def altered(name, at):
    def spoil(checkpoint):
        content = bytearray((checkpoint / name).read_bytes())
        content[at] ^= 1
        (checkpoint / name).write_bytes(content)

    return spoil


def removed(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def rewritten(k=None, **metadata):
    """K's file with another K, and a digest that fits it, or other metadata."""

    def spoil(checkpoint):
        with safe_open(checkpoint / K_FILE, "pt") as file:
            said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if k is not None:
            tensors["k"] = k
        said |= metadata
        said["sha256"] = _digest([tensors["k"]], [tensors["has_moved"]], said)
        save_file(tensors, checkpoint / K_FILE, metadata=said)

    return spoil


def a_folder_in_place_of(name):
    def spoil(checkpoint):
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()

    return spoil


def entries(value, dtype=torch.int32):
    return torch.full((24,), value, dtype=dtype)


OUT_OF_BOUNDS = r"is damaged: its K are not in \[12, 51\]\. Resume from an earlier checkpoint"
NOT_WHOLE_NUMBERS = r"is damaged: k is F32 \[24\], not I32 of one entry per sample"
DAMAGED = "is damaged: it cannot be read to its end. Resume from an earlier checkpoint"
RESUMING = {
    "torn weights": spoiled(f"model.safetensors {DAMAGED}", cut("model.safetensors")),
    "weights of no bytes": spoiled(f"model.safetensors {DAMAGED}", cut("model.safetensors", 0)),
    "weights without their last bytes": spoiled(f"model.safetensors {DAMAGED}", cut("model.safetensors", 0.99)),
    "no weights": spoiled("it has no weights .model.safetensors.. Resume", removed("model.safetensors")),
    "weights of another model": Case(
        lambda folder: trainer_of(folder, "resnet").train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2")),
        ValueError,
        "the weights in .*checkpoint-2 are not this model's.*Build the architecture that was saved",
    ),
    "torn optimizer": spoiled(f"optimizer.pt {DAMAGED}", cut("optimizer.pt")),
    "torn scheduler": spoiled(f"scheduler.pt {DAMAGED}", cut("scheduler.pt")),
    "torn random state": spoiled(f"rng_state.pth {DAMAGED}", cut("rng_state.pth")),
    "torn state": spoiled(f"trainer_state.json {DAMAGED}", cut("trainer_state.json")),
    "no state": spoiled("is not a whole checkpoint: it has no trainer_state", removed("trainer_state.json")),
    "no such folder": Case(
        lambda folder: trainer_of(folder).train(resume_from_checkpoint=str(folder / "nowhere")),
        ValueError,
        "nowhere is not a whole checkpoint: no such folder",
    ),
    "torn K": spoiled(f"{K_FILE} {DAMAGED}", cut(K_FILE)),
    "K of no bytes": spoiled(f"{K_FILE} {DAMAGED}", cut(K_FILE, 0)),
    "altered K": spoiled(f"{K_FILE} is damaged: its content is not what was written. Resume", altered(K_FILE, -40)),
    "a folder in place of K": spoiled(f"{K_FILE} {DAMAGED}", a_folder_in_place_of(K_FILE)),
    "K of a future version": spoiled("format .*/2 but .*/3: install", rewritten(format="smoot_hf.mask_budget/3")),
    "K below its bound": spoiled(OUT_OF_BOUNDS, rewritten(entries(-5))),
    "K above its bound": spoiled(OUT_OF_BOUNDS, rewritten(entries(60))),
    "K in fractions": spoiled(NOT_WHOLE_NUMBERS, rewritten(entries(30.0, torch.float32))),
    "K of another length": spoiled("num_samples is 24 there and 32 here", nothing, data=TinyImages(32)),
    "K of other bounds": spoiled("k_max is 51 there and 57 here", nothing, mask_ratio_max=0.9),
    "K of another method": spoiled("k_min is 12 there and 32 here", nothing, method="sgt"),
    "K of another data set": spoiled("dataset_fingerprint is xyz there", rewritten(dataset_fingerprint="xyz"),
                                     data=type("Known", (TinyImages,), {"fingerprint": "abc"})()),
    "K of another image size": spoiled("image_height is 16 there and 8 here", rewritten(image_height="16")),
    "recipe: no such checkpoint": Case(
        train_recipe("--resume_from_checkpoint", "nowhere"), 2, "nowhere: no such folder; leave the flag away"
    ),
    "recipe: weights of another model": Case(
        train_recipe("--resume_from_checkpoint", "true"),
        1,
        "no whole checkpoint of this run in .*its model is ViTForImageClassification-.*, not PaperCnn",
    ),
}  # fmt: skip


@contextmanager
def files_of_at_most(size):
    """Writing beyond `size` bytes fails in the operating system: what a full disk does, in any process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_after(size):
    """A training that can write no file beyond `size` bytes: config, weights or optimizer does not fit."""

    def attempt(folder):
        with files_of_at_most(size):
            trainer_of(folder, save_strategy="steps", save_steps=3, max_steps=4).train()

    return Case(attempt, SaveError, r"cannot write to .*run.*free space or set output_dir")


def a_file(path):
    path.write_text("in the way")
    return str(path)


# Root may write everywhere, so a read-only folder stops nobody in a container: a file where a folder should be, and
# /proc, stop everybody.
WRITING = {
    "no room for the configuration": full_after(100),
    "no room for the weights": full_after(10_000),
    "no room for the optimizer": full_after(30_000),
    "no room for the model at the end": Case(
        lambda folder: limited_save(folder), SaveError, "cannot write to .*final.*free space or set output_dir"
    ),
    "a file in place of the output folder": Case(
        lambda folder: trainer_of(folder, output_dir=a_file(folder / "file")), SaveError, "cannot write to .*/file "
    ),
    "a file in place of the checkpoint": Case(
        lambda folder: (
            a_file(folder / "run" / "checkpoint-3"),
            trainer_of(folder, save_strategy="steps", save_steps=3).train(),
        ),
        SaveError,
        "cannot write to .*checkpoint-3.*File exists",
    ),
    "a file in place of the model's folder": Case(
        lambda folder: trainer_of(folder).save_model(a_file(folder / "file")), SaveError, "cannot write to .*/file "
    ),
    "a folder that nobody can make": Case(
        lambda folder: trainer_of(folder, output_dir="/proc/smoot"), SaveError, "cannot write to /proc/smoot"
    ),
    "recipe: a file in place of the output folder": Case(
        lambda folder: train_recipe("--output_dir", a_file(folder / "file"))(folder), 2, "cannot write to .*/file "
    ),
    "recipe: a folder that nobody can make": Case(
        train_recipe("--output_dir", "/proc/smoot"), 2, "cannot write to /proc/smoot"
    ),
    "recipe: no room for the optimizer": Case(
        lambda folder: full_recipe(folder), 1, "cannot write to .*free space or set output_dir"
    ),
}


def limited_save(folder):
    trainer = trainer_of(folder)
    with files_of_at_most(10_000):
        trainer.save_model(str(folder / "final"))


def full_recipe(folder):
    # The decoded images are a few kilobytes, the weights of the CNN more.
    with files_of_at_most(60_000):
        train_recipe()(folder)


CASES = RESUMING | WRITING


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, bad_input_folder, capsys):
    """Catches a half restored training, an error that names no file, and an earlier checkpoint that is lost."""
    judge(CASES[name], bad_input_folder, capsys)


def test_a_disk_that_is_full(saved_run, tmp_path):
    """Catches the last whole checkpoint lost with the one that did not fit; on a real full disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    # In pages of 4 KiB; what is left is enough for the next weights, and not for the optimizer.
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in saved_run.rglob("*")) + 60_000
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs privileges")
    try:
        shutil.copytree(saved_run, disk / "run")
        saved = contents(disk / "run")
        with pytest.raises(SaveError, match="0 MiB are free on its disk"):
            trainer_of(disk, save_strategy="steps", save_steps=2, max_steps=4).train(resume_from_checkpoint=True)
        assert contents(disk / "run").items() >= saved.items()
        shutil.rmtree(disk / "run" / "checkpoint-4")
        trainer = trainer_of(disk, max_steps=4)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4
    finally:
        # torch keeps the file open that it could not write.
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_budget_without_pixels_is_refused():
    """Catches a division by zero."""
    with pytest.raises(ValueError, match="image_size must be at least 1x1 pixels, got 0x8"):
        MaskBudget(4, (0, 8))
