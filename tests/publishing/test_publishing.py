"""The life of a model on the Hub: pushed by the trainer, used without smoot_hf, taken up again on another machine."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import QUICK, TinyImages, build, parameters
from huggingface_hub import ModelCard, snapshot_download
from loopback_hub import ENDPOINT, TOKEN, USER
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.models.timm_wrapper import TimmWrapperImageProcessor

from smoot_hf import InputPipeline, SmootTrainer, SmootTrainingArguments, evaluate_faithfulness
from smoot_hf.experiments import train
from smoot_hf.experiments.recipes import RECIPES
from smoot_hf.models.classifier import load_image_processor, load_model

pytestmark = [
    # The client's own, on every LFS upload.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # Old releases of matplotlib warn of what their own dependencies will drop.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*"),
]
LABELS = ["ant", "bee", "cat"]


class Uint8Images(Dataset):
    """Noise as decoded images: uint8 rows, labels in turn."""

    def __init__(self, channels, size, length=12):
        generator = torch.Generator().manual_seed(length)
        self.images = torch.randint(0, 256, (length, channels, *size), dtype=torch.uint8, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": i % len(LABELS)}


def grey_cnn():
    model = load_model("cnn", labels=LABELS, image_size=(8, 9), num_channels=1)
    return model, load_image_processor("cnn", model, (8, 9), (0.4,), (0.3,)), (8, 9)


def names():
    return {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}


def vit(channels=3):
    """Made larger on its way into the model, by other means and deviations than the default ones."""
    config = ViTConfig(image_size=12, patch_size=4, num_channels=channels, hidden_size=16, num_hidden_layers=1,
                       num_attention_heads=2, intermediate_size=16, initializer_range=0.5, **names())  # fmt: skip
    processor = ViTImageProcessor(
        size={"height": 12, "width": 12}, image_mean=[0.4, 0.5, 0.6][:channels], image_std=[0.2, 0.3, 0.4][:channels]
    )
    return ViTForImageClassification(config), processor, (10, 7)


def timm():
    """Resized by Pillow, cropped."""
    data = {"input_size": (3, 16, 16), "interpolation": "bicubic", "crop_pct": 0.8, "mean": (0.5,) * 3,
            "std": (0.25,) * 3, "num_classes": 3}  # fmt: skip
    config = TimmWrapperConfig.from_dict(
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": data, "num_classes": 3, "model_args": {
            "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}}
    )  # fmt: skip
    config.id2label, config.label2id = names().values()
    model = TimmWrapperForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # From its own start it tells no images apart.
            parameter.mul_(5)
    return model, TimmWrapperImageProcessor(data, "vit_tiny_patch16_224"), (40, 31)


def published(name, parts, folder):
    """Train for some steps and push; the evaluation images as files, and what the trainer says of them."""
    model, processor, size = parts
    channels = len(InputPipeline.from_image_processor(processor).mean)
    test = Uint8Images(channels, size, length=5)
    args = SmootTrainingArguments(str(folder / name), **QUICK, hub_model_id=f"{USER}/{name}")
    trainer = SmootTrainer(
        model=model, args=args, train_dataset=Uint8Images(channels, size), eval_dataset=test,
        processing_class=processor, input_pipeline=InputPipeline.from_image_processor(processor),
    )  # fmt: skip
    trainer.train()
    found = evaluate_faithfulness(trainer.model, test, input_pipeline=trainer.input_pipeline, steps=2)
    trainer.push_to_hub(dataset="noise", faithfulness=[found])
    paths = []
    for i, image in enumerate(test.images):
        paths.append(str(folder / f"{name}-{i}.png"))
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(paths[-1])
    logits = torch.from_numpy(trainer.predict(test).predictions)
    return paths, logits.softmax(dim=1)


def test_a_published_model_is_used_without_smoot_hf(hub, tmp_path):
    """Fault: another image processor than the evaluation's, code that needs the package, a card whose code is wrong.

    Probabilities agree to 1e-5: rounding of float32, added up in another order.
    """
    torch.manual_seed(0)
    repositories = {"grey-cnn": grey_cnn(), "vit": vit(), "timm": timm()}
    expected, asked = {}, []
    for name, parts in repositories.items():
        images, expected[f"{USER}/{name}"] = published(name, parts, tmp_path)
        # The architectures of transformers and timm need no code of anybody.
        asked.append({"repo": f"{USER}/{name}", "trust_remote_code": name == "grey-cnn", "images": images})
        libraries = "transformers and timm" if name == "timm" else "transformers"
        assert f"With {libraries} alone:" in ModelCard.load(tmp_path / name / "README.md").text
    (tmp_path / "elsewhere").mkdir()
    environment = {
        k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "PYTHONPATH")
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "without_us.py"), "answers.json"],
        input="\n".join(map(json.dumps, asked)), cwd=tmp_path / "elsewhere", capture_output=True, text=True,
        env={**environment, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((tmp_path / "elsewhere" / "answers.json").read_text())
    for repo, probabilities in expected.items():
        assert probabilities.std(dim=0).min() > 1e-4, "all images alike show nothing"
        for way in ("pipeline", "by_hand"):
            torch.testing.assert_close(torch.tensor(answers[repo][way]), probabilities, rtol=0, atol=1e-5)
        assert answers[repo]["drew"] > 1000
    assert hub.unknown == []


def test_the_repository_holds_what_belongs_together(hub, tmp_path):
    """Fault: a push without code, processor, card or results, or with somebody's training state."""
    published("grey-cnn", grey_cnn(), tmp_path)
    files = set(hub.repository("models", f"{USER}/grey-cnn").files())
    assert files >= {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json",
                     "modeling_smoot_cnn.py", "grey_image_processor.py", "figures/curves.png", "figures/saliency.png",
                     "figures/k_histogram.png"}  # fmt: skip
    assert not [name for name in files if "budget" in name or "checkpoint" in name]
    card = ModelCard(hub.content(hub.repository("models", f"{USER}/grey-cnn").files()["README.md"],
                                 hub.repository("models", f"{USER}/grey-cnn")).decode())  # fmt: skip
    assert f'pipeline("image-classification", "{USER}/grey-cnn", trust_remote_code=True)' in card.text
    # The Hub's column shows so many letters of code; what is longer must be scrolled to.
    lines = "\n".join(re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)).splitlines()
    assert max(map(len, lines)) <= 88


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_no_token_is_published(hub, trained, strategy):
    """Fault: the Trainer's pickled arguments, on a public page, with the token that may write there."""
    trainer = trained("vit", push_to_hub=True, hub_model_id="run", hub_strategy=strategy, hub_token=TOKEN,
                      save_strategy="steps", save_steps=6)  # fmt: skip
    trainer.push_to_hub()
    repository = hub.repository("models", f"{USER}/run")
    files = {name: hub.content(entry, repository) for name, entry in repository.files().items()}
    assert "training_args.bin" in files
    assert [name for name, content in files.items() if TOKEN.encode() in content] == []


OTHER_PROCESSORS = {
    "the evaluation's": (lambda own: own, None, "Images are resized and normalised as in the evaluation."),
    "other means": (
        lambda own: ViTImageProcessor(size=own.size),
        "ViTImageProcessor makes other pixels than the evaluation's input pipeline",
        "**The image processor of this repository makes other pixels than the evaluation did",
    ),
    "other channels": (
        lambda own: ViTImageProcessor(size=own.size, image_mean=[0.5] * 2, image_std=[0.5] * 2),
        "ViTImageProcessor does not take the evaluation's images (",
        "**The image processor of this repository makes other pixels than the evaluation did",
    ),
    "none": (lambda own: None, "there is no image processor beside the model: ", "## Training"),
}


@pytest.mark.parametrize("method", ["smoot", "standard"])
@pytest.mark.parametrize("name", OTHER_PROCESSORS)
def test_a_processor_that_is_not_the_evaluations_is_said_to_be_so(quick_trainer, tmp_path, monkeypatch, name, method):
    """Fault: a card that promises the evaluation's predictions of a processor with other means or channels."""
    said = []
    monkeypatch.setattr("smoot_hf.data.image_processor.logger.warning", said.append)
    model, own, size = vit()
    make, warning, on_card = OTHER_PROCESSORS[name]
    parts = {"processing_class": make(own), "input_pipeline": InputPipeline.from_image_processor(own)}
    quick_trainer(model, Uint8Images(3, size), method=method, trainer_kwargs=parts).create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md").text
    assert on_card in card
    assert ("as in the evaluation" in card) == (warning is None)
    assert [warning in line for line in said] == [True] * (warning is not None)


# --- what is published, and what is not ----------------------------------------------------------------------------

PRIVATE = {
    "run.json": '{"dataset": "/home/somebody/patients"}', "runs/Nov01_somebodys-laptop/events.out.tfevents.1": "x",
    "notes.txt": "x", "train.py": "x", "data.safetensors": "x", "all_results.json": "{}", "trainer_state.json": "{}",
    "README.txt": "x", ".env": "TOKEN=x", "figures/private.png": "x", "wandb/model.safetensors": "x",
    "config.json.bak": "x", "model.safetensors.tmp": "x", "mask_budget.safetensors": "x", "config.json~": "x",
}  # fmt: skip
CARD = {"README.md", "results.json", "figures/k_histogram.png", "figures/curves.png", "figures/saliency.png"}
OF_THE_CNN = {"config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin",
              "modeling_smoot_cnn.py", "grey_image_processor.py"}  # fmt: skip
CHECKPOINT = {"mask_budget.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
              "run_identity.json"}  # fmt: skip


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_only_what_belongs_to_the_model_is_published(hub, tmp_path, strategy):
    """Fault: records with local paths, logs with the host's name, code and keys of the user's own, on a public page."""
    model, processor, size = grey_cnn()
    folder = tmp_path / "somebodys-secret-place" / "run"
    for name, content in PRIVATE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    args = SmootTrainingArguments(
        str(folder), **QUICK | {"save_strategy": "steps", "save_steps": 3}, push_to_hub=True, hub_model_id="run",
        hub_strategy=strategy, hub_always_push=True, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = SmootTrainer(
        model=model, args=args, train_dataset=Uint8Images(1, size), eval_dataset=Uint8Images(1, size, length=5),
        processing_class=processor, input_pipeline=InputPipeline.from_image_processor(processor),
    )  # fmt: skip
    trainer.train()
    repository = hub.repository("models", f"{USER}/run")
    places = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-3", "checkpoint-6"]}.get(strategy, [])
    in_checkpoints = {f"{place}/{name}" for place in places for name in CHECKPOINT | OF_THE_CNN}
    during = set() if strategy == "end" else OF_THE_CNN | in_checkpoints
    assert set(repository.files()) == {".gitattributes"} | during
    found = evaluate_faithfulness(trainer.model, trainer.eval_dataset, input_pipeline=trainer.input_pipeline, steps=2)
    trainer.push_to_hub(dataset="noise", faithfulness=[found])
    assert trainer.failed_pushes == {}
    files = {name: hub.content(entry, repository) for name, entry in repository.files().items()}
    assert set(files) == {".gitattributes"} | OF_THE_CNN | in_checkpoints | CARD
    # Nor in what is published: the arguments and the state of training hold paths.
    assert [name for name, content in files.items() if b"secret-place" in content] == []
    assert args.output_dir == str(folder)
    if places:
        copy = snapshot_download(f"{USER}/run", local_dir=tmp_path / "copy", endpoint=ENDPOINT)
        args.max_steps, args.push_to_hub = 8, False
        trainer.train(resume_from_checkpoint=str(Path(copy) / places[-1]))
        assert trainer.state.global_step == 8
        assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [3, 6, 8]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_every_part_of_a_model_is_published(hub, tmp_path, quick_trainer):
    """Fault: an allow-list without the shards of a large model, or without the adapters that PEFT keeps in folders."""
    trainer = quick_trainer(hub_model_id="shards")
    trainer.model.save_pretrained = partial(trainer.model.save_pretrained, max_shard_size="10KB")
    trainer.push_to_hub()
    files = set(hub.repository("models", f"{USER}/shards").files())
    index = json.loads((tmp_path / "run" / "model.safetensors.index.json").read_text())
    assert {"model.safetensors.index.json", *index["weight_map"].values()} <= files
    assert len(set(index["weight_map"].values())) > 1

    peft = pytest.importorskip("peft")
    names = [name for name, module in build("vit").named_modules() if isinstance(module, torch.nn.Linear)]
    model = peft.get_peft_model(build("vit"), peft.LoraConfig(r=2, target_modules=names[:2]))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=names[:2]))
    trainer = quick_trainer(model, hub_model_id="adapters", output_dir=str(tmp_path / "adapters"))
    trainer.push_to_hub(dataset="noise")
    files = set(hub.repository("models", f"{USER}/adapters").files())
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "second/adapter_model.safetensors",
            "second/adapter_config.json"} <= files  # fmt: skip


# --- a card that fails ---------------------------------------------------------------------------------------------


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


@pytest.mark.parametrize(
    "error",
    [ValueError("no such head"), torch.OutOfMemoryError("CUDA out of memory"), OSError("No space left"), KeyError("x")],
    ids=lambda error: type(error).__name__,
)
def test_a_card_that_cannot_be_written_costs_the_card_alone(hub, quick_trainer, tmp_path, monkeypatch, error):
    """Fault: "log in with hf auth login" for a card that fails, and no model on the Hub after a whole training."""
    said = []
    monkeypatch.setattr("smoot_hf.training.publishing.logger.warning", said.append)
    trainer = quick_trainer(hub_model_id="run")
    # Of an earlier run, and none that the Hub would take.
    (tmp_path / "run" / "README.md").write_text("---\n[a: b\n---\n")
    monkeypatch.setattr("smoot_hf.publishing.card.card_text", raising(error))
    trainer.push_to_hub(dataset="noise")
    files = hub.repository("models", f"{USER}/run").files()
    assert "model.safetensors" in files
    assert not CARD & files.keys()
    assert len(said) == 1
    assert re.search(
        f"without a card, which could not be written \\({type(error).__name__}: .*{error.args[0]}", said[0]
    )


@pytest.mark.parametrize("blocking", [True, False])
def test_a_card_that_the_hub_refuses_costs_the_card_alone(hub, quick_trainer, monkeypatch, blocking):
    """Fault: a licence that the Hub does not know keeps the model from being published."""
    said = []
    monkeypatch.setattr("smoot_hf.publishing.files.logger.warning", said.append)
    hub.fail("POST", "/api/validate-yaml", 400)
    pushed = quick_trainer(hub_model_id="run").push_to_hub(dataset="noise", license="mine", blocking=blocking)
    if not blocking:
        pushed.result(timeout=60)
    files = hub.repository("models", f"{USER}/run").files()
    assert "model.safetensors" in files
    assert not CARD & files.keys()
    assert len(said) == 1
    assert "without its card, which the Hub does not take: Invalid metadata in README.md." in said[0]


def test_a_wrong_keyword_is_refused_before_anything_is_done(hub, quick_trainer, tmp_path):
    """Fault: a typing error told as a login that is missing, after the model was uploaded or before it was saved."""
    trainer = quick_trainer(hub_model_id="run")
    with pytest.raises(TypeError, match="take no 'licence', 'faithfullness': the card takes language, license, tags"):
        trainer.push_to_hub(licence="mit", faithfullness=[])
    assert hub.repositories == {}
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_errors_of_other_code_are_not_the_hubs(hub, quick_trainer):
    """Fault: what a callback raises in a push is told as a login that is missing."""

    class Broken(TrainerCallback):
        def on_push_begin(self, *_, **__):
            raise LookupError("of the callback")

    trainer = quick_trainer(hub_model_id="run", trainer_kwargs={"callbacks": [Broken()]})
    with pytest.raises(LookupError, match="of the callback"):
        trainer.push_to_hub()


def test_a_push_without_an_evaluation_set_or_with_several_arrives(hub, quick_trainer, tmp_path):
    """Fault: the example images of the card cost the push."""
    found = []
    for name, dataset in {"none": None, "several": {"a": TinyImages(4), "b": TinyImages(4)}}.items():
        trainer = quick_trainer(
            hub_model_id=name, output_dir=str(tmp_path / name), trainer_kwargs={"eval_dataset": dataset}
        )
        found = found or [evaluate_faithfulness(trainer.model, TinyImages(4), steps=2)]
        trainer.push_to_hub(dataset="noise", faithfulness=found)
        files = hub.repository("models", f"{USER}/{name}").files()
        assert {"model.safetensors", "README.md", "figures/curves.png"} <= files.keys()
        assert "figures/saliency.png" not in files


class StopAt(TrainerCallback):
    """A machine that goes away after a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_another_machine_goes_on_from_the_hub(hub, quick_trainer, tmp_path, strategy):
    """Fault: K, or anything else that training goes on from, does not reach the Hub."""
    settings = {"step_size": 500, "max_steps": 8, "save_steps": 100, "save_strategy": "steps"}
    whole = quick_trainer("cnn", **settings)
    whole.train()
    pushed = {"push_to_hub": True, "hub_model_id": "run", "hub_strategy": strategy, "save_total_limit": 1}
    first = quick_trainer("cnn", **settings, **pushed, output_dir=str(tmp_path / "first"),
                          trainer_kwargs={"callbacks": [StopAt(4)]})  # fmt: skip
    first.train()
    assert first.failed_pushes == {}
    place = "last-checkpoint" if strategy == "checkpoint" else "checkpoint-4"
    copy = snapshot_download(f"{USER}/run", local_dir=tmp_path / "copy", endpoint=ENDPOINT)
    assert (Path(copy) / place / "mask_budget.safetensors").is_file()
    # The model at the root brings its code, though training is not over.
    assert {"modeling_smoot_cnn.py", "model.safetensors", "config.json"} <= set(os.listdir(copy))
    second = quick_trainer("cnn", **settings, output_dir=str(tmp_path / "second"))
    second.train(resume_from_checkpoint=str(Path(copy) / place))
    assert torch.equal(second.mask_budget.k, whole.mask_budget.k)
    assert len(whole.mask_budget.k.unique()) > 1
    for (name, one), two in zip(parameters(whole).items(), parameters(second).values(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_other_strategies_push_no_training_state(hub, trained, strategy):
    """Fault: the optimizer and K of a run in a repository that was to hold the model alone."""
    trainer = trained("vit", push_to_hub=True, hub_model_id="run", hub_strategy=strategy, hub_always_push=True,
                      save_strategy="steps", save_steps=3)  # fmt: skip
    repository = hub.repository("models", f"{USER}/run")
    assert not [name for name in repository.files() if "checkpoint" in name or "budget" in name]
    # The one of step 3 is not overtaken by what step 6 writes.
    pushed = [f"Training in progress, step {step}" for step in (6, 3)] if strategy == "every_save" else []
    assert repository.messages() == [*pushed, "initial commit"]
    assert trainer.failed_pushes == {}


def test_every_checkpoint_arrives_though_old_ones_are_deleted(hub, trained):
    """Fault: a checkpoint deleted while it is uploaded, or skipped while the one before it is."""
    trained("vit", push_to_hub=True, hub_model_id="run", hub_strategy="all_checkpoints", save_strategy="steps",
            save_steps=1, save_total_limit=1)  # fmt: skip
    folders = {name.split("/")[0] for name in hub.repository("models", f"{USER}/run").files() if "/" in name}
    assert folders == {f"checkpoint-{step}" for step in range(1, 7)}


def test_a_model_name_is_enough(hub, quick_trainer):
    """`push_to_hub=False` and a push by hand, as in Trainer; catches a repository that nobody created."""
    trainer = quick_trainer(build("vit"), trainer_kwargs={"eval_dataset": TinyImages(8)})
    trainer.evaluate()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.repository("models", f"{USER}/run").files()


# --- the recipes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(hub, monkeypatch, tmp_path):
    """The recipe of the digits, one epoch, pushed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*flags):
        argv = ["--use_cpu", "--num_train_epochs", "1", "--max_train_samples", "200", "--max_eval_samples", "60",
                "--disable_tqdm", "true", "--push_to_hub", "--hub_model_id", "run", "--output_dir", "out"]  # fmt: skip
        return train.main(RECIPES["digits"], [*argv, *flags])

    return run


def test_a_measurement_that_fails_costs_the_card_its_numbers_alone(hub, digits, monkeypatch):
    """Fault: a trained model that is not pushed, for the measurement of its card did not fit into memory."""
    monkeypatch.setattr(
        "smoot_hf.experiments.training_run.evaluate_faithfulness", raising(torch.OutOfMemoryError("CUDA out of memory"))
    )
    said = []
    monkeypatch.setattr("smoot_hf.experiments.training_run.logger.warning", said.append)
    digits()
    files = hub.repository("models", f"{USER}/run").files()
    assert {"model.safetensors", "README.md"} <= files.keys()
    assert said == ["the card lacks what could not be measured of the saliency: CUDA out of memory"]


def test_a_recipe_ends_with_its_push(hub, digits):
    """Fault: a card without what was measured, because the push came before it."""
    digits("--card_samples", "20", "--hub_strategy", "checkpoint")
    repository = hub.repository("models", f"{USER}/run")
    assert repository.messages()[0] == "End of training"
    assert "End of training" not in repository.messages()[1:]
    card = hub.content(repository.files()["README.md"], repository).decode()
    assert "on 20 images of it" in card
    assert "| `optimizer` | `Adadelta` |" in card
    assert "last-checkpoint/mask_budget.safetensors" in repository.files()
