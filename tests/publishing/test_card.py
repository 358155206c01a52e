"""The model card: written from the run, and from nothing else."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import TinyImages, build
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from loopback_hub import USER
from PIL import Image
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from smoot_hf import evaluate_faithfulness, evaluate_localisation
from smoot_hf.data.dataset import load_image_dataset
from smoot_hf.data.decoded_images import DecodedImages, decode_images
from smoot_hf.evaluation.results import load_results
from smoot_hf.fingerprint import hub_revision
from smoot_hf.publishing.card import final_metrics

# Old releases of matplotlib warn of what their own dependencies will drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*")


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def run(trained, tmp_path):
    """Train, and write the card into tmp_path/run; the trainer, what was measured, and the card."""

    def make(measured=True, card=None, **settings):
        trainer = trained(
            "vit", **settings, trainer_kwargs={"eval_dataset": TinyImages(8), "compute_metrics": accuracy}
        )
        found = []
        if measured:
            trainer.evaluate()
            found = [
                evaluate_faithfulness(trainer.model, trainer.eval_dataset, fill=fill, steps=4)
                for fill in ("corner", "mean")
            ]
        trainer.create_model_card(**{"dataset": "noise", "faithfulness": found} | (card or {}))
        return trainer, found, ModelCard.load(tmp_path / "run" / "README.md")

    return make


def test_the_metadata_are_the_hubs_own(run, tmp_path):
    """Fault: a model-index that the Hub's classes cannot read, or that loses convention or value on the way."""
    trainer, found, card = run()
    data = card.data
    assert {"smoot", "saliency", "interpretability", "image-classification"} <= set(data.tags)
    assert (data.pipeline_tag, data.library_name) == ("image-classification", "transformers")
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert eval_results_to_model_index(name, results) == data.to_dict()["model-index"]
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()
    reported = [(result.metric_type, result.metric_value) for result in data.eval_results]
    assert reported == [
        ("accuracy", trainer.state.log_history[-1]["eval_accuracy"]),
        *((name, getattr(one, name)) for one in found for name in ("deletion_auc", "insertion_auc")),
    ]
    conventions = [r.metric_args["description"] for r in data.eval_results if r.metric_type == "deletion_auc"]
    assert conventions == [one.convention.describe() for one in found]
    assert {result.dataset_name for result in data.eval_results} == {"noise"}


def test_every_number_comes_from_the_run(run, tmp_path):
    """Fault: a number on the card that results.json does not have, or that is another run's."""
    trainer, found, card = run(step_size=500, learning_rate=0.02)
    results = load_results(tmp_path / "run" / "results.json")
    first, *rows = results.rows
    assert first.metrics["accuracy"].mean == trainer.state.log_history[-1]["eval_accuracy"]
    assert [row.metrics["deletion_auc"].mean for row in rows] == [one.deletion_auc for one in found]
    k = trainer.mask_budget.statistics()
    assert {name: first.metrics[name].mean for name in k} == k
    assert first.details["k_histogram"]["counts"] == trainer.mask_budget.histogram.tolist()
    assert f"{k['k_min']:g} / {k['k_median']:g} / {k['k_max']:g} of 64 pixels" in card.text
    at_bounds = [int((trainer.mask_budget.k == bound).sum()) for bound in (12, 51)]
    assert f"{at_bounds[0]} images were at the lower bound of 12 and {at_bounds[1]} at the upper one of 51" in card.text
    assert f"- accuracy: {trainer.state.log_history[-1]['eval_accuracy']:.4f}" in card.text
    for one in found:
        assert re.search(rf"\| {one.accuracy:.2f} \| {one.deletion_auc:.2f} \|", card.text)
    for argument, value in {"step_size": 500, "learning_rate": 0.02, "max_steps": 6, "optimizer": "AdamW"}.items():
        assert f"| `{argument}` | `{value}` |" in card.text
    for package in (torch, datasets):
        assert f"| {package.__name__} | {package.__version__} |" in card.text
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert f"of {parameters:,} parameters" in card.text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", card.text)
    assert pictures == ["figures/curves.png", "figures/saliency.png", "figures/k_histogram.png"]
    assert all((tmp_path / "run" / path).read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_what_was_not_measured_is_not_on_the_card(run, tmp_path):
    """Fault: an empty heading, a zero that nobody measured, a figure of an earlier run in the same folder."""
    run()
    _, _, card = run(measured=False, method="standard", card={"dataset": None})
    assert card.data.eval_results is None
    for word in ("AUC", "accuracy", "](figures", "K:", "| None"):
        assert word not in card.text.split("## Limits")[0], word
    assert "was not measured" in card.text
    assert list((tmp_path / "run" / "figures").iterdir()) == []


def test_one_k_for_all_needs_no_histogram(run):
    """Fault: a histogram of one bar, or bounds that sgt does not have."""
    _, _, card = run(measured=False, method="sgt")
    assert "K was 32 of 64 pixels for every training image." in card.text
    assert "k_histogram" not in card.text
    assert "sgt" in card.data.tags


def test_a_saliency_no_better_than_chance_is_said_to_be(run, monkeypatch):
    """Fault: a card that praises whatever it holds."""
    _, found, card = run()
    said = [f"[{i}] **The deletion AUC is not below" in card.text for i in (1, 2)]
    assert said == [one.deletion_auc >= one.random_auc for one in found]
    assert any(said), "these six steps on noise are meant to have taught nothing in one convention at least"


def test_without_matplotlib_the_card_is_written_and_the_user_told(run, tmp_path, monkeypatch):
    """Fault: a push that fails at the end of a training for want of a figure, or pictures that are not there."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = []
    monkeypatch.setattr("smoot_hf.publishing.card.logger.warning", said.append)
    _, _, card = run()
    assert len(said) == 1
    assert "pip install matplotlib" in said[0]
    assert "](figures" not in card.text
    assert "Deletion AUC" in card.text


def test_the_token_and_local_paths_stay_at_home(run, tmp_path):
    """Fault: the arguments that differ from their defaults, secrets and folders among them."""
    _, _, card = run(hub_token="hf_secret")
    written = str(card) + (tmp_path / "run" / "results.json").read_text()
    assert "hf_secret" not in written
    assert str(tmp_path) not in written


def test_results_are_those_of_the_final_weights(quick_trainer):
    """Fault: with the best model back in place, the metrics of the last step beside its weights."""
    scores = iter([1.0, 0.25, 0.75])
    trainer = quick_trainer(
        "vit", save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
        trainer_kwargs={"eval_dataset": TinyImages(8), "compute_metrics": lambda _: {"score": next(scores)}},
    )  # fmt: skip
    assert final_metrics(trainer) == {}
    trainer.train()
    assert final_metrics(trainer)["score"] == 1.0
    trainer.evaluate()
    assert final_metrics(trainer)["score"] == 0.75


def score_of(*scores):
    """`compute_metrics` that gives these scores, one after the other."""
    left = iter(scores)
    return lambda _: {"score": next(left)}


OF_THE_EVALUATION_SET = {
    "the set itself": (lambda t: [t.evaluate()], 0.1),
    "the set by hand": (lambda t: [t.evaluate(t.eval_dataset)], 0.1),
    "the training set after it": (lambda t: [t.evaluate(), t.evaluate(t.train_dataset)], 0.1),
    "the training set alone": (lambda t: [t.evaluate(t.train_dataset)], None),
    "the training set under a prefix of its own": (
        lambda t: [t.evaluate(), t.evaluate(t.train_dataset, metric_key_prefix="eval_train")], 0.1
    ),
    "others by name": (lambda t: [t.evaluate(), t.evaluate({"train": t.train_dataset, "more": TinyImages(4)})], 0.1),
    "the set again": (lambda t: [t.evaluate(), t.evaluate(t.train_dataset), t.evaluate()], 0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_EVALUATION_SET)
def test_the_card_has_metrics_of_the_evaluation_set_alone(trained, tmp_path, name):
    """Fault: training accuracy stated as "On the evaluation set", and in the Hub's leaderboards."""
    evaluate, expected = OF_THE_EVALUATION_SET[name]
    kwargs = {"eval_dataset": TinyImages(8), "compute_metrics": score_of(0.1, 0.2, 0.3, 0.4)}
    trainer = trained("vit", trainer_kwargs=kwargs)
    evaluate(trainer)
    # As it is after a checkpoint.
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    trainer.state = type(trainer.state).load_from_json(str(tmp_path / "state.json"))
    trainer.create_model_card(dataset="noise")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert {key: value for key, value in final_metrics(trainer).items() if key != "loss"} == (
        {} if expected is None else {"score": expected}
    )
    assert [result.metric_value for result in card.data.eval_results or []] == ([] if expected is None else [expected])
    assert ("On the evaluation set (8 images)" in card.text) == (expected is not None)


def test_metrics_of_the_training_set_during_training_are_not_on_the_card(quick_trainer):
    """Fault: a callback that evaluates the training set as well, by the same name, has the last word."""

    class AlsoTrain(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **_):
            if metrics["eval_score"] in (0.1, 0.3):
                trainer.evaluate(trainer.train_dataset)

    trainer = quick_trainer(
        "vit", eval_strategy="steps", eval_steps=3,
        trainer_kwargs={"eval_dataset": TinyImages(8), "compute_metrics": score_of(0.1, 0.9, 0.3, 0.9),
                        "callbacks": [AlsoTrain()]},
    )  # fmt: skip
    trainer.train()
    assert [entry["eval_score"] for entry in trainer.state.log_history if "eval_score" in entry] == [0.1, 0.9, 0.3, 0.9]
    assert final_metrics(trainer)["score"] == 0.3


def test_each_of_several_evaluation_sets_has_its_metrics(trained, tmp_path, monkeypatch):
    """Fault: the metrics of the last set alone; a card that fails for want of one set."""
    said = []
    monkeypatch.setattr("smoot_hf.publishing.card.logger.warning", said.append)
    sets = {"day": TinyImages(8), "night": TinyImages(4)}
    trainer = trained("vit", trainer_kwargs={"eval_dataset": sets, "compute_metrics": score_of(0.1, 0.2)})
    trainer.evaluate()
    found = [evaluate_faithfulness(trainer.model, sets["day"], steps=2)]
    trainer.create_model_card(dataset="noise", faithfulness=found)
    metrics = final_metrics(trainer)
    assert (metrics["day_score"], metrics["night_score"]) == (0.1, 0.2)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "On the evaluation sets, as the metrics report them:" in card.text
    assert ("figures/curves.png" in card.text, "figures/saliency.png" in card.text) == (True, False)
    assert said == ["the card has no saliency maps: eval_dataset holds several evaluation sets ('day', 'night')"]


def test_without_an_evaluation_set_the_card_has_no_maps(trained, tmp_path, monkeypatch):
    """Fault: `'NoneType' has no len()` after the training."""
    said = []
    monkeypatch.setattr("smoot_hf.publishing.card.logger.warning", said.append)
    trainer = trained("vit")
    trainer.create_model_card(
        dataset="noise", faithfulness=[evaluate_faithfulness(trainer.model, TinyImages(8), steps=2)]
    )
    text = ModelCard.load(tmp_path / "run" / "README.md").text
    assert ("figures/curves.png" in text, "figures/saliency.png" in text) == (True, False)
    assert said == ["the card has no saliency maps: the trainer has no eval_dataset"]


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_images_of_any_number_of_channels_are_drawn(trained, tmp_path, channels):
    """Fault: a card that fails on images that are neither grey nor in colour."""
    config = ViTConfig(image_size=8, patch_size=4, num_channels=channels, hidden_size=16, num_hidden_layers=1,
                       num_attention_heads=2, intermediate_size=16, num_labels=4)  # fmt: skip
    test = TinyImages(8, channels=channels)
    trainer = trained(ViTForImageClassification(config), TinyImages(channels=channels),
                      trainer_kwargs={"eval_dataset": test})  # fmt: skip
    trainer.create_model_card(dataset="noise", faithfulness=[evaluate_faithfulness(trainer.model, test, steps=2)])
    assert (tmp_path / "run" / "figures" / "saliency.png").is_file()


HEADS = ["no head at all", "---\n[a: b\n---\n", "---\n- a\n- b\n---\n", "---\na: 1", "---\nlibrary_name: [1\n---", ""]


@pytest.mark.parametrize("head", HEADS)
def test_a_card_that_is_there_already_is_replaced_whatever_it_holds(quick_trainer, tmp_path, head):
    """Fault: a README.md whose head is no YAML costs the new card."""
    trainer = quick_trainer()
    (tmp_path / "run" / "README.md").write_text(head)
    trainer.create_model_card(dataset="noise")
    assert ModelCard.load(tmp_path / "run" / "README.md").data.library_name == "transformers"


@pytest.mark.parametrize("name", ["$a$", "$\\frac{$", "_", "x" * 3000, "a\n# b", "<b>|`"])
def test_class_names_that_are_markup_are_drawn(trained, tmp_path, name):
    """Fault: a class name that is TeX, or as long as a page, ends the run at its card."""
    trainer = trained("vit", trainer_kwargs={"eval_dataset": TinyImages(8)})
    trainer.model.config.id2label = {i: f"{name}{i}" for i in range(4)}
    found = [evaluate_faithfulness(trainer.model, trainer.eval_dataset, steps=2)]
    trainer.create_model_card(dataset=name, dataset_tags=name, model_name=name, finetuned_from=name, faithfulness=found)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (card.data.model_name, card.data.eval_results[0].dataset_name) == (name, name)
    # What is no name of the Hub's would be refused there.
    assert (card.data.base_model, card.data.datasets) == ((name, [name]) if name == "_" else (None, None))
    assert (tmp_path / "run" / "figures" / "saliency.png").is_file()


def test_what_the_model_or_the_data_raise_is_told_as_it_is(trained, monkeypatch):
    """Fault: out of memory in the card's forward passes is told as a full disk, or as a login that is missing."""
    trainer = trained("vit", trainer_kwargs={"eval_dataset": TinyImages(8)})
    found = [evaluate_faithfulness(trainer.model, trainer.eval_dataset, steps=2)]
    error = torch.OutOfMemoryError("CUDA out of memory")

    def forward(*_, **__):
        raise error

    monkeypatch.setattr(trainer.model, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.create_model_card(dataset="noise", faithfulness=found)
    assert caught.value is error


def test_license_tags_and_origin_are_the_callers(run):
    """Fault: arguments of `Trainer.create_model_card` taken and forgotten."""
    _, _, card = run(card={"license": "mit", "tags": "digits", "finetuned_from": "someone/vit", "model_name": "Mine",
                           "dataset_tags": "someone/noise", "dataset_args": "plain", "language": "en"})  # fmt: skip
    data = card.data
    assert (data.license, data.base_model, data.datasets, data.language) == (
        "mit",
        "someone/vit",
        ["someone/noise"],
        "en",
    )
    assert "digits" in data.tags
    assert card.text.strip().startswith("# Mine")
    assert "from [someone/vit]" in card.text
    assert {(r.dataset_type, r.dataset_config) for r in data.eval_results} == {("someone/noise", "plain")}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_data_set_of_the_hub_is_known_by_commit(hub, tmp_path, monkeypatch):
    """Fault: results without the revision of their data, or with the id in small letters that HF Datasets keeps."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    columns = {"image": [Image.new("L", (4, 4), 20 * i) for i in range(10)], "label": ["ant", "bee"] * 5}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).class_encode_column("label")
    rows.push_to_hub(f"{USER}/BigNoise")
    assert hub_revision(rows) is None
    expected = (f"{USER}/BigNoise", hub.repository("datasets", f"{USER}/BigNoise").head)
    stored = load_image_dataset(f"{USER}/BigNoise")
    assert hub_revision(torch.utils.data.Subset(stored["test"], [0])) == expected
    # As the recipes have it: shuffled, cut, decoded.
    decoded = decode_images(datasets.DatasetDict(train=stored["train"].shuffle(seed=0).select(range(3))))["train"]
    for dataset in (decoded, DecodedImages(decoded), DecodedImages(decoded.select([2, 0]))):
        assert hub_revision(dataset) == expected
    assert hub_revision(TinyImages()) is None
    # Local files are cached in a folder of another name.
    rows.to_parquet(tmp_path / "noise.parquet")
    local = datasets.Dataset.from_parquet(str(tmp_path / "noise.parquet"), cache_dir=str(tmp_path / "cache"))
    assert hub_revision(local) is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_keeps_its_own_library(quick_trainer, tmp_path):
    """Fault: a card that says transformers of weights that PEFT alone can load."""
    peft = pytest.importorskip("peft")
    names = [name for name, module in build("vit").named_modules() if isinstance(module, torch.nn.Linear)]
    model = peft.get_peft_model(build("vit"), peft.LoraConfig(r=2, target_modules=names[:2]))
    trainer = quick_trainer(model)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset="noise")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "peft"
    assert "## Limits" in card.text


def test_results_json_is_whole(run, tmp_path):
    """Fault: curves or versions missing from the file that everything on the card is to be found in."""
    run()
    content = json.loads(Path(tmp_path / "run" / "results.json").read_text())
    assert content["settings"]["method"] == "smoot"
    assert content["environment"]["torch"] == torch.__version__
    assert len(content["rows"]) == 3
    assert len(content["rows"][1]["details"]["by_seed"]["42"]["deletion"]["values"]) == 5


class Unlabelled(TinyImages):
    """Images to predict, not to evaluate."""

    def __getitem__(self, i):
        return {"pixel_values": super().__getitem__(i)["pixel_values"]}


def test_a_saliency_grid_that_cannot_be_drawn_costs_the_grid_alone(trained, tmp_path, monkeypatch):
    """Fault: a card, and the push behind it, that fails for want of a picture; numbers written after the figures."""
    said = []
    monkeypatch.setattr("smoot_hf.publishing.card.logger.warning", said.append)
    sets = {
        "must hold 'pixel_values' and 'labels'": Unlabelled(8),
        "several evaluation sets ('a')": {"a": TinyImages(8)},
    }
    trainer = trained("vit", trainer_kwargs={"eval_dataset": TinyImages(8)})
    found = evaluate_faithfulness(trainer.model, TinyImages(8), steps=4)
    for reason, data in (sets | {"the trainer has no eval_dataset": None}).items():
        trainer.eval_dataset = data
        said.clear()
        trainer.create_model_card(dataset="noise", faithfulness=[found])
        assert len(said) == 1
        assert said[0].startswith("the card has no saliency maps: ")
        assert reason in said[0]
        text = (tmp_path / "run" / "README.md").read_text()
        assert "figures/curves.png" in text
        assert "figures/saliency.png" not in text
        assert (
            load_results(tmp_path / "run" / "results.json").rows[1].metrics["deletion_auc"].mean == found.deletion_auc
        )


def test_nan_predictions_are_said_on_the_card(run):
    """Fault: an area that NaN predictions have lowered, under which the card says nothing of them."""
    trainer, found, _ = run()
    poor = dataclasses.replace(found[0], deletion=dataclasses.replace(found[0].deletion, nan_predictions=3))
    trainer.create_model_card(faithfulness=[poor])
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert f"3 of {poor.predictions} predictions hold a NaN or an infinity, and count as wrong." in card


class Marked(TinyImages):
    """Noise with evidence in the left half."""

    def __getitem__(self, i):
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[:, :4] = True
        return super().__getitem__(i) | {"evidence": mask}


def test_the_localisation_is_on_the_card(run, tmp_path, trained):
    """Fault: scores without their interval or chance level, or an index that lacks them or names another value."""
    found = evaluate_localisation(trained("vit").model, Marked(24), only_correct=False)
    _, _, card = run(card={"localisation": found})
    for name in ("outside_0.1", "relevance_mass", "pointing_game", "roc_auc"):
        score = found.scores[name]
        shown = f"{score.interval[0]:.2f} to {score.interval[1]:.2f} | {score.chance:.2f} |"
        assert f"| {score.value:.2f} | {shown}" in card.text
        (indexed,) = [result for result in card.data.eval_results if result.metric_type == name]
        assert indexed.metric_value == score.value
    row = load_results(tmp_path / "run/results.json").rows[-1]
    assert row.metrics["outside_0.025"].values == {42: found.outside[0.025].value}
    assert "on 24 correctly classified" not in card.text
    assert len([r for r in card.data.eval_results if r.metric_type == "deletion_auc"]) == 2


class SeveralLabels(TinyImages):
    """The same images with none to all of three labels; no image has the fourth."""

    def __getitem__(self, i):
        labels = torch.tensor([i % 2, i // 2 % 2, i // 4 % 2, 0])
        return super().__getitem__(i) | {"labels": labels.float()}


def test_a_multi_label_models_card_says_so(trained, tmp_path, monkeypatch):
    """Fault: an accuracy, a softmax or one class for each image on the card of a model with several labels."""
    shown = []
    monkeypatch.setattr("smoot_hf.publishing.card.draw_saliency", lambda *figure: shown.append(figure))
    trainer = trained("vit", trainer_kwargs={"eval_dataset": SeveralLabels(8)})
    trainer.model.config.problem_type = "multi_label_classification"
    found = evaluate_faithfulness(trainer.model, trainer.eval_dataset, steps=2)
    trainer.create_model_card(dataset="noise", faithfulness=[found])
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "A multi-label image classifier of 4 classes" in card.text
    assert "the mean probability of an image's labels that remains" in card.text
    assert f"| {found.mean_average_precision:.2f} | {found.subset_accuracy:.2f} |" in card.text
    assert "assigns one of them to every image" not in card.text
    assert "ccuracy" not in card.text
    assert "1 images left out, whose row of labels is all 0; 7 measured." in card.text
    assert "multi-label-classification" in card.data.tags
    indexed = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert indexed["mean_average_precision_auc"] == found.mean_average_precision_auc
    # Every label of an image has a column, with its name and its own map: these are the first pairs of eight images.
    ((pictures, titles, maps, _),) = shown
    names = trainer.model.config.id2label
    pairs = [(1, 0), (2, 1), (3, 0), (3, 1), (4, 2), (5, 0), (5, 2), (6, 1)]
    assert [title[0] for title in titles] == [names[label] for _, label in pairs]
    assert len(pictures) == len(maps) == 8
    assert torch.equal(pictures[2], pictures[3])
    assert not torch.equal(maps[2], maps[3])
