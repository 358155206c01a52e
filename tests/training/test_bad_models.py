"""Models that are no image classifiers, or do not fit the images: the error names what was expected."""

import shutil

import architectures
import pytest
from bad_input import Case, judge, train_recipe, trainer_of
from conftest import TinyImages, build
from torch import nn
from transformers import BertConfig, ViTImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from smoot_hf import evaluate_faithfulness


class Returns(nn.Module):
    """A tiny ViT whose forward returns a function of its logits."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = build("vit"), change
        self.config = self.inner.config

    def forward(self, pixel_values, labels=None):
        return self.change(self.inner(pixel_values=pixel_values).logits)


def returning(message, change, method="smoot"):
    return Case(lambda folder: trainer_of(folder, Returns(change), method=method).train(), ValueError, message)


def with_logits(change):
    return lambda logits: ImageClassifierOutput(logits=change(logits))


class TakesX(Returns):
    """The same, under a name that no trainer passes."""

    def forward(self, x):
        return self.inner(pixel_values=x)


def refused(message, model_type, class_name):
    """An architecture that is refused when the trainer is built, by what its forward takes and returns."""
    return Case(
        lambda folder: trainer_of(folder, architectures.build(model_type, class_name), method="standard"),
        ValueError,
        f"{class_name} is refused: {message}",
    )


def built(message, model="vit", channels=3, **overrides):
    """A model that is refused when the trainer is built."""
    return Case(
        lambda folder: trainer_of(folder, build(model, **overrides), TinyImages(channels=channels)), ValueError, message
    )


def saved_model(message, spoil, convert_rgb=True):
    """`smoot-hf train` with a model folder that `spoil(folder)` has changed."""

    def attempt(folder):
        build("vit").save_pretrained(folder / "model")
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "model")
        spoil(folder / "model")
        train_recipe("--model", "{}/model", f"--convert_rgb={convert_rgb}")(folder)

    return Case(attempt, 2, message)


def halved(name):
    def spoil(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return spoil


def becomes_bert(folder):
    shutil.rmtree(folder)
    BertConfig().save_pretrained(folder)


CASES = {
    "a tuple": returning(r"output \(tuple\) has no 'logits'", lambda logits: (logits,)),
    "a tuple, standard": returning(r"output \(tuple\) has no 'logits'", lambda logits: (logits,), "standard"),
    "a bare tensor": returning(r"output \(Tensor\) has no 'logits'", lambda logits: logits),
    "features alone": returning(r"output \(dict\) has no 'logits'", lambda logits: {"features": logits}),
    "nothing": returning(r"output \(NoneType\) has no 'logits'", lambda logits: None),
    "logits of pixels": returning(r"got torch.float32 \(8, 4, 1, 1\)", with_logits(lambda x: x[:, :, None, None])),
    "too few classes": returning(r"here \(8, 4\), got torch.float32 \(8, 3\)", with_logits(lambda x: x[:, :3])),
    "too few classes, standard": returning(r"got torch.float32 \(8, 3\)", with_logits(lambda x: x[:, :3]), "standard"),
    "too few rows": returning(r"got torch.float32 \(1, 4\)", with_logits(lambda x: x[:1])),
    "integer logits": returning(r"must be floating point .* got torch.int64", with_logits(lambda x: x.long())),
    "detached logits": returning("logits carry no gradient", with_logits(lambda x: x.detach())),
    "images by another name": Case(
        lambda folder: trainer_of(folder, TakesX(None)),
        ValueError,
        "TakesX is refused: its forward takes 'x'",
    ),
    "tokens": refused("its forward takes 'input_ids', no 'pixel_values'", "imagegpt", "ImageGPTForImageClassification"),
    "text": refused(r"its main input is text \('input_ids'\)", "shieldgemma2", "ShieldGemma2ForImageClassification"),
    "patches": refused("its 'pixel_values' are patches with their", "siglip2", "Siglip2ForImageClassification"),
    "no logits": refused("its forward returns Base.*no 'logits'", "pp_lcnet", "PPLCNetForImageClassification"),
    "return_dict=False": built("return_dict=False is refused.*Set model.config.return_dict", return_dict=False),
    "one class": built("at least 2 classes, got num_labels=1", "cnn", num_labels=1),
    "regression": built("problem_type='regression' is refused", problem_type="regression"),
    "vit of other channels": built("takes images of 3 channels, 'pixel_values' have 1", channels=1),
    "resnet of other channels": built("takes images of 3 channels, 'pixel_values' have 4", "resnet", channels=4),
    "cnn of other channels": built("takes images of 3 channels.*num_channels=1", "cnn", channels=1),
    "clip of other channels": Case(
        lambda folder: trainer_of(
            folder, architectures.build("clip", "CLIPForImageClassification"), TinyImages(channels=1)
        ),
        ValueError,
        "takes images of 3 channels, 'pixel_values' have 1",
    ),
    "cnn of another image size": Case(
        lambda folder: trainer_of(folder, build("cnn"), TinyImages(size=12)).train(),
        ValueError,
        r"\(C, H, W\) = \(3, 8, 8\), got \(8, 3, 12, 12\): resize",
    ),
    "faithfulness of a tuple": Case(
        lambda _: evaluate_faithfulness(Returns(lambda logits: (logits,)), TinyImages(4)),
        ValueError,
        r"output \(tuple\) has no 'logits'",
    ),
    "faithfulness of NaN": Case(
        lambda _: evaluate_faithfulness(Returns(with_logits(lambda x: x * float("nan"))), TinyImages(4)),
        ValueError,
        "holds NaN in every one of the 4 images",
    ),
    "recipe: grey images, model of colour": saved_model(
        "takes images of 3 channels, the data have 1.*--convert_rgb", lambda _: None, convert_rgb=False
    ),
    "recipe: no such model": Case(train_recipe("--model", "someone/nothing"), 2, "--model takes a local directory"),
    "recipe: torn weights": saved_model("cannot load the weights of .*model'", halved("model.safetensors")),
    "recipe: no weights": saved_model("cannot load the weights", lambda f: (f / "model.safetensors").unlink()),
    "recipe: torn configuration": saved_model("cannot load the model .*config.json", halved("config.json")),
    "recipe: no image processor": saved_model(
        "comes without an image processor", lambda folder: (folder / "preprocessor_config.json").unlink()
    ),
    "recipe: a language model": saved_model("is a 'bert', of which transformers has no image classifier", becomes_bert),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, bad_input_folder, capsys):
    """Catches an error deep in autograd, on the device or in a file format that does not say what was expected."""
    judge(CASES[name], bad_input_folder, capsys)
