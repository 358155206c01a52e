"""A Hub that fails: the result stays whole on the disk, and one line says what to do."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
from bad_input import ROOT, Case, judge, train_recipe, trainer_of
from loopback_hub import USER
from safetensors import safe_open
from transformers import ViTConfig, ViTForImageClassification

from smoot_hf.errors import PushError
from smoot_hf.experiments.run import RunRecord

pytestmark = [
    # The client's own, on every LFS upload.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # Old releases of matplotlib warn of what their own dependencies will drop.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*"),
]
NAME = f"{USER}/model"
REMEDY = "log in with `hf auth login` and check hub_model_id, or try again later; what is saved stays in .*`hf upload"
# What the Hub is asked for, in this order.
MAKE, ASK, BATCH, COMMIT = (
    ("POST", path) for path in ("/api/repos/create", "/preupload/", "/objects/batch", "/commit/")
)
STORE = ("PUT", "/lfs/")
DROPPED = "dropped"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Waiting between the tries of a request would be most of the test's time."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


class Fault(NamedTuple):
    """Every request of a kind is answered by `status`, or by nothing."""

    request: tuple
    status: int | str

    def set_up(self, hub):
        if self.status == DROPPED:
            hub.drop(*self.request, after=100, times=99)
        else:
            hub.fail(*self.request, self.status, times=99)


def push(folder, **overrides):
    trainer = trainer_of(folder, **{"output_dir": str(folder / "new"), "hub_model_id": NAME} | overrides)
    try:
        trainer.push_to_hub()
    finally:
        require_model(folder / "new")


def require_model(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 10 or "classifier.weight" in file.keys()  # noqa: SIM118


def weights_on_hub(hub):
    if ("models", NAME) not in hub.repositories:
        return None
    repository = hub.repository("models", NAME)
    entry = repository.files().get("model.safetensors")
    return None if entry is None else hub.content(entry, repository)


def pushed(message, request, status, **overrides):
    return Fault(request, status), Case(
        lambda folder: push(folder, **overrides), PushError, f"'{NAME}' .*{message}.*{REMEDY}"
    )


def train_and_save(folder):
    """Checkpoints are pushed in the background while training goes on; the model at the end."""
    trainer = trainer_of(
        folder, output_dir=str(folder / "new"), push_to_hub=True, hub_model_id=NAME, save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    try:
        trainer.save_model()
    finally:
        require_model(folder / "new")
        require_model(folder / "new" / "checkpoint-3")


def recipe(*flags):
    """Everything of a finished run is there when the push fails: metrics, record, card and results as well."""

    def attempt(folder):
        try:
            train_recipe("--output_dir", "{}/new", "--push_to_hub", "--hub_model_id", NAME, *flags)(folder)
        finally:
            made = {path.name for path in (folder / "new").iterdir()}
            assert made >= {"model.safetensors", "all_results.json", "trainer_state.json", "run.json", "README.md",
                            "results.json"}  # fmt: skip
            assert RunRecord.load(folder / "new").is_finished

    return attempt


CASES = {
    "unreachable": (None, Case(push, PushError, f"'{NAME}' .*\\(\\[Errno 111\\] Connection refused\\): {REMEDY}")),
    "401": pushed("401 Unauthorized", MAKE, 401),
    "403": pushed("403 Forbidden", MAKE, 403),
    "404": pushed("404 Not Found", MAKE, 404),
    "500": pushed("500 Internal Server Error", MAKE, 500),
    "a token that is none": (
        (),
        Case(lambda folder: push(folder, hub_token="hf_wrong"), PushError, f"401 Unauthorized.*{REMEDY}"),
    ),
    "somebody else's repository": (
        (),
        Case(lambda folder: push(folder, hub_model_id="other/model"), PushError, f"403 Forbidden.*{REMEDY}"),
    ),
    "a name that is none": (
        (),
        Case(lambda folder: push(folder, hub_model_id="a/b/c"), PushError, f"'a/b/c'.*{REMEDY}"),
    ),
    "401 while uploading": pushed("401 Unauthorized", COMMIT, 401),
    "403 while uploading": pushed("403 Forbidden", COMMIT, 403),
    "404 while uploading": pushed("404 Not Found", ASK, 404),
    "409 while uploading": pushed("409 Conflict", COMMIT, 409),
    "413 while uploading": pushed("413 .*Too Large", COMMIT, 413),
    "413 of the weights": pushed("413 .*Too Large", STORE, 413),
    "429 while uploading": pushed("429 Too Many Requests", COMMIT, 429),
    "500 while uploading": pushed("500 Internal Server Error", COMMIT, 500),
    "connection dropped while uploading": pushed("", COMMIT, DROPPED),
    "connection dropped in the weights": pushed("Error while uploading", STORE, DROPPED),
    "push_to_hub=True, 401 when the trainer is built": (
        Fault(MAKE, 401),
        Case(lambda folder: trainer_of(folder, push_to_hub=True), PushError, f"401 Unauthorized.*{REMEDY}"),
    ),
    "push_to_hub=True, 500 from the first checkpoint on": (
        Fault(COMMIT, 500),
        Case(train_and_save, PushError, REMEDY),
    ),
    "recipe: 401 before training": (
        Fault(MAKE, 401),
        Case(train_recipe("--push_to_hub", "--hub_model_id", NAME), 2, f"401 Unauthorized.*{REMEDY}"),
    ),
    "recipe: 409 at the end": (
        Fault(COMMIT, 409),
        Case(recipe("--save_strategy", "no", "--card_samples", "4"), 1, f"409 Conflict.*{REMEDY}"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, bad_input_folder, capsys, hub):
    """Catches a result that a failing Hub keeps from being saved, and twenty lines of its client's traceback."""
    fault, case = CASES[name]
    if fault is None:
        hub.close()
    elif fault:
        fault.set_up(hub)
    judge(case, bad_input_folder, capsys)
    assert weights_on_hub(hub) is None


def test_a_hub_without_fault_takes_the_model(bad_input_folder, hub):
    """The tests above fail by their faults, and not by a Hub that takes nothing."""
    push(bad_input_folder)
    assert weights_on_hub(hub) == (bad_input_folder / "new" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("request_kind", "status"), [(ASK, 429), (BATCH, 429), (STORE, 500), (STORE, 503)])
def test_what_passes_is_tried_again(bad_input_folder, hub, request_kind, status):
    """Catches a busy Hub taken for a refusal."""
    hub.fail(*request_kind, status, times=2, Retry_After="0")
    push(bad_input_folder)
    assert hub.count(*request_kind) >= 3
    assert weights_on_hub(hub) == (bad_input_folder / "new" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("times", [1, 99])
def test_a_connection_lost_in_the_middle_of_the_weights(hub, tmp_path, times):
    """Catches half of the weights taken for the whole, or a second attempt that sends their second half alone."""
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=128, num_hidden_layers=4, num_attention_heads=2,
                       intermediate_size=512, num_labels=4)  # fmt: skip
    hub.drop(*STORE, after=1_500_000, times=times)
    trainer = trainer_of(tmp_path, ViTForImageClassification(config), hub_model_id=NAME)
    if times == 1:
        trainer.push_to_hub()
        assert weights_on_hub(hub) == (tmp_path / "run" / "model.safetensors").read_bytes()
        return
    with pytest.raises(PushError, match=r"Error while uploading 'model.safetensors'"):
        trainer.push_to_hub()
    assert weights_on_hub(hub) is None


def test_the_remedy_works(hub, tmp_path, bad_input_folder):
    """Catches a command that the Hub's own program does not take, or that uploads training state as well."""
    folder = tmp_path / "my runs"
    trainer = trainer_of(folder, output_dir=str(folder), hub_model_id=NAME)
    shutil.copytree(bad_input_folder / "run" / "checkpoint-2", folder / "checkpoint-2")
    hub.fail(*COMMIT, 409, times=99)
    with pytest.raises(PushError) as failure:
        trainer.push_to_hub()
    hub.faults.clear()
    program, *words = shlex.split(re.search("`(hf upload .*)`", str(failure.value))[1])
    assert program == "hf"
    hf = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
    done = subprocess.run([*hf, *words], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "0"})
    assert done.returncode == 0, done.stderr
    assert weights_on_hub(hub) == (folder / "model.safetensors").read_bytes()
    assert not [name for name in hub.repository("models", NAME).files() if "checkpoint" in name]


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("smoot_hf.training.publishing.logger.warning", lines.append)
    return lines


def test_training_state_that_was_not_pushed_is_said_so(bad_input_folder, hub, said):
    """Catches the silence of the Trainer, which pushes checkpoints in the background and drops their errors."""
    trainer = trainer_of(bad_input_folder, push_to_hub=True, hub_model_id=NAME, hub_strategy="checkpoint",
                         save_strategy="steps", save_steps=3, hub_always_push=True)  # fmt: skip
    hub.fail(*COMMIT, 403, times=2)
    trainer.train()
    assert trainer.state.global_step == 3
    assert set(trainer.failed_pushes) == {".", "last-checkpoint"}
    assert said == list(trainer.failed_pushes.values())
    for line in said:
        assert re.search(f"403 Forbidden.*{REMEDY}", line), line
    assert "checkpoint-3 last-checkpoint`" in trainer.failed_pushes["last-checkpoint"]
    # The next push makes up for the model, and says so.
    trainer.push_to_hub()
    assert set(trainer.failed_pushes) == {"last-checkpoint"}
    assert weights_on_hub(hub) is not None


def test_a_later_checkpoint_makes_up_for_an_earlier_one(bad_input_folder, hub, said):
    """Catches a complaint about what is on the Hub by now."""
    trainer = trainer_of(bad_input_folder, push_to_hub=True, hub_model_id=NAME, hub_strategy="checkpoint",
                         save_strategy="steps", save_steps=1, hub_always_push=True)  # fmt: skip
    hub.fail(*COMMIT, 403, times=2)
    trainer.train()
    assert len(said) == 2
    assert trainer.failed_pushes == {}


def test_a_push_that_is_not_waited_for_is_reported_as_well(bad_input_folder, hub, said):
    """Catches an error that stays in a Future which nobody asks."""
    hub.fail(*COMMIT, 403)
    trainer = trainer_of(bad_input_folder, hub_model_id=NAME)
    assert trainer.push_to_hub(blocking=False).exception(timeout=60) is not None
    assert re.search(f"403 Forbidden.*{REMEDY}", trainer.failed_pushes["."])


def test_a_recipe_whose_training_state_was_refused_says_so(bad_input_folder, hub, capsys):
    """Catches exit code 0 where another machine cannot go on, though the model itself has arrived."""
    hub.fail(*COMMIT, 403, skip=1)
    judge(
        Case(
            recipe("--hub_strategy", "all_checkpoints", "--card_samples", "0"), 1, f"403 Forbidden.*{REMEDY}.*point-4`"
        ),
        bad_input_folder,
        capsys,
    )
    assert weights_on_hub(hub) is not None


@pytest.mark.parametrize("name", [pytest.param("a wrong flag", marks=pytest.mark.slow), "409 at the end of training"])
def test_bad_input_of_a_process(name, tmp_path, hub):
    """As a user sees it: exit code and stderr of `smoot-hf train`; catches what a call of main() hides."""
    argv, code, message = {
        "a wrong flag": (["--alpha", "2"], 2, "smoot-hf train: error: alpha must be in [0, 1], got 2.0"),
        "409 at the end of training": (
            ["--dataset", "digits", "--max_train_samples", "32", "--num_train_epochs", "1", "--push_to_hub",
             "--save_strategy", "no", "--hub_model_id", NAME, "--card_samples", "4"],
            1, f"smoot-hf train: error: cannot push to '{NAME}' on the Hub (",
        ),
    }[name]  # fmt: skip
    is_pushed = "--push_to_hub" in argv
    hub.fail(*COMMIT, 409, times=99)
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": str(int(not is_pushed)),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    command = "from smoot_hf.experiments.command import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "train", *argv, "--use_cpu", "--output_dir", str(tmp_path / "run")],
        capture_output=True, text=True, env=os.environ | settings, timeout=300,
    )  # fmt: skip
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code
    assert lines[-1].startswith(message)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists() == is_pushed
