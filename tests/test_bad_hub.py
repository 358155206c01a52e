"""A Hub that fails: the result stays whole on the disk, and one line says what to do."""

import importlib
import os
import socket
import subprocess
import sys

import huggingface_hub
import pytest
import transformers
from bad_input import RECIPES, Case, judge, train_recipe, trainer_of
from hub_faults import faulty_hub
from safetensors import safe_open

from smoot_hf.saving_trainer import PushError

REMEDY = "log in with `hf auth login` and check hub_model_id, or try again later; what is saved stays in .*`hf upload"
# What the Hub is asked for, in this order.
MAKE, ASK, COMMIT = "/api/repos/create", "/preupload/", "/commit/"


@pytest.fixture
def hub(monkeypatch):
    """Let the clients of the Hub talk to an address of this machine."""

    def at(address):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        # Waiting between the tries of a request would be most of the test's time.
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
        # The client of transformers (5.23), and the one that stands behind the functions of huggingface_hub (5.17).
        client = huggingface_hub.HfApi(endpoint=address)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", client, raising=False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)

    return at


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def push(folder, **overrides):
    trainer = trainer_of(folder, **{"output_dir": str(folder / "new"), "hub_model_id": "me/model"} | overrides)
    try:
        trainer.push_to_hub()
    finally:
        require_model(folder / "new")


def require_model(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 10 or "classifier.weight" in file.keys()  # noqa: SIM118


def pushed(message, faults, **overrides):
    return faults, Case(lambda folder: push(folder, **overrides), PushError, f"'me/model' .*{message}.*{REMEDY}")


def train_and_save(folder):
    """Checkpoints are pushed in the background while training goes on; the model at the end."""
    trainer = trainer_of(
        folder, output_dir=str(folder / "new"), push_to_hub=True, hub_model_id="me/model", hub_token="hf_token",
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    try:
        trainer.save_model()
    finally:
        require_model(folder / "new")
        require_model(folder / "new" / "checkpoint-3")


def recipe(folder):
    """Everything of a finished run is there when the push fails, metrics and record as well."""
    try:
        train_recipe("--output_dir", "{}/new", "--push_to_hub", "--hub_model_id", "me/model", "--hub_token", "hf_token",
                     "--save_strategy", "no")(folder)  # fmt: skip
    finally:
        made = {path.name for path in (folder / "new").iterdir()}
        assert made >= {"model.safetensors", "all_results.json", "trainer_state.json", "run.json"}
        assert importlib.import_module("run_record").RunRecord.load(folder / "new").is_finished


TOKEN = {"hub_token": "hf_token"}
CASES = {
    "unreachable": pushed("Connection refused", None),
    "no token": pushed("401 Unauthorized", {MAKE: 401}),
    "401 with a token": pushed("401 Unauthorized", {MAKE: 401}, **TOKEN),
    "403": pushed("403 Forbidden", {MAKE: 403}, **TOKEN),
    "404": pushed("404 Not Found", {MAKE: 404}, **TOKEN),
    "500": pushed("500 Internal Server Error", {MAKE: 500}, **TOKEN),
    "401 while uploading": pushed("401 Unauthorized", {COMMIT: 401}, **TOKEN),
    "404 while uploading": pushed("404 Not Found", {ASK: 404}, **TOKEN),
    "409 while uploading": pushed("409 Conflict", {COMMIT: 409}, **TOKEN),
    "500 while uploading": pushed("500 Internal Server Error", {COMMIT: 500}, **TOKEN),
    "connection dropped while uploading": pushed("", {COMMIT: 0}, **TOKEN),
    "a name that is none": (
        {},
        Case(lambda folder: push(folder, hub_model_id="a/b/c"), PushError, f"'a/b/c'.*{REMEDY}"),
    ),
    "push_to_hub=True, 401 when the trainer is built": (
        {MAKE: 401},
        Case(lambda folder: trainer_of(folder, push_to_hub=True), PushError, f"401 Unauthorized.*{REMEDY}"),
    ),
    "push_to_hub=True, 500 from the first checkpoint on": ({COMMIT: 500}, Case(train_and_save, PushError, REMEDY)),
    "recipe: 401 before training": (
        {MAKE: 401},
        Case(train_recipe("--push_to_hub", "--hub_model_id", "me/model"), 2, f"401 Unauthorized.*{REMEDY}"),
    ),
    "recipe: 409 at the end": ({COMMIT: 409}, Case(recipe, 1, f"409 Conflict.*{REMEDY}")),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, bad_input_folder, capsys, hub):
    """Catches a result that a failing Hub keeps from being saved, and twenty lines of its client's traceback."""
    faults, case = CASES[name]
    if faults is None:
        hub(f"http://127.0.0.1:{free_port()}")
        judge(case, bad_input_folder, capsys)
        return
    with faulty_hub(faults) as address:
        hub(address)
        judge(case, bad_input_folder, capsys)


def test_a_hub_without_fault_takes_the_model(bad_input_folder, hub):
    """The tests above fail by their faults, and not by a Hub that takes nothing."""
    with faulty_hub({}) as address:
        hub(address)
        assert push(bad_input_folder, **TOKEN) is None


def test_a_checkpoint_that_was_not_pushed_is_said_so(bad_input_folder, hub, monkeypatch):
    """Catches the silence of the Trainer, which pushes checkpoints in the background and drops their errors."""
    said = []
    monkeypatch.setattr("smoot_hf.saving_trainer.logger.warning", said.append)
    with faulty_hub({COMMIT: 500}) as address:
        hub(address)
        with pytest.raises(PushError):
            train_and_save(bad_input_folder)
    assert said
    assert "a checkpoint was not pushed to the Hub (500" in said[0] or "500 Internal Server Error" in said[0]


@pytest.mark.parametrize("name", [pytest.param("a wrong flag", marks=pytest.mark.slow), "409 at the end of training"])
def test_bad_input_of_a_process(name, tmp_path):
    """As a user sees it: exit code and stderr of `python recipes/train.py`; catches what a call of main() hides."""
    argv, code, message = {
        "a wrong flag": (["--alpha", "2"], 2, "train.py: error: alpha must be in [0, 1], got 2.0"),
        "409 at the end of training": (
            ["--dataset", "digits", "--max_train_samples", "32", "--num_train_epochs", "1", "--push_to_hub",
             "--save_strategy", "no", "--hub_model_id", "me/model", "--hub_token", "hf_token"],
            1, "train.py: error: cannot push to 'me/model' on the Hub (",
        ),
    }[name]  # fmt: skip
    is_pushed = "--push_to_hub" in argv
    with faulty_hub({COMMIT: 409}) as address:
        settings = {
            "PYTHONPATH": str(RECIPES.parent),
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": str(int(not is_pushed)),
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        }
        done = subprocess.run(
            [sys.executable, str(RECIPES / "train.py"), *argv, "--use_cpu", "--output_dir", str(tmp_path / "run")],
            capture_output=True, text=True, env=os.environ | settings, timeout=300,
        )  # fmt: skip
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code
    assert lines[-1].startswith(message)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists() == is_pushed
