"""One reading of a model's logits: how it is given its images, and what of its output is taken, wherever it is run."""

from types import SimpleNamespace

import pytest
import torch
from bad_input import trainer_of
from conftest import CLASSES, TinyImages, build
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from smoot_hf import evaluate_faithfulness
from smoot_hf.evaluation.convention import Convention
from smoot_hf.evaluation.image_classes import find_image_classes
from smoot_hf.evaluation.sanity_check import randomized_weights_correlation
from smoot_hf.models.logits import LogitsModel, takes_pixel_values

BY_PROBABILITY = Convention(measure="probability")

READABLE = {
    "a ModelOutput": lambda logits: ImageClassifierOutput(logits=logits),
    "a dict": lambda logits: {"logits": logits},
    "a dict with a loss": lambda logits: {"loss": logits.sum(), "logits": logits, "features": logits[:, 0]},
    "an object": lambda logits: SimpleNamespace(logits=logits),
    "a tensor": lambda logits: logits,
}
UNREADABLE = {
    "a tuple": lambda logits: (logits,),
    "a tuple with a loss": lambda logits: (logits.sum(), logits),
    "a dict without logits": lambda logits: {"scores": logits},
    "nothing": lambda logits: None,
}


class Returns(nn.Module):
    """A tiny ViT whose forward returns a function of its logits."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = build("vit"), change
        self.config = self.inner.config

    def forward(self, pixel_values, labels=None):
        return self.change(self.inner(pixel_values=pixel_values).logits)


@pytest.mark.parametrize("kind", READABLE)
def test_every_readable_output_is_measured_alike(kind):
    """Catches a model that trains and cannot be evaluated, by any of the three measurements."""
    data, plain, model = TinyImages(8), build("vit"), Returns(READABLE[kind])
    found = evaluate_faithfulness(model, data, steps=3, convention=BY_PROBABILITY)
    expected = evaluate_faithfulness(plain, data, steps=3, convention=BY_PROBABILITY)
    assert torch.equal(found.deletion.sample_auc, expected.deletion.sample_auc)
    assert torch.equal(
        find_image_classes(model, data, steps=3).probability, find_image_classes(plain, data, steps=3).probability
    )
    assert randomized_weights_correlation(model, data).n == 8


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_output_is_refused_in_the_same_words(kind, tmp_path):
    """Catches an entry of a tuple taken for the logits, and two errors for one fault."""
    message = r"the model's output \(.*\) has no 'logits': return a ModelOutput or a dict with logits"
    with pytest.raises(ValueError, match=message):
        evaluate_faithfulness(Returns(UNREADABLE[kind]), TinyImages(8))
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, Returns(UNREADABLE[kind])).train()


def test_a_model_that_returns_a_dict_trains_and_is_measured(quick_trainer):
    """Catches a training that ends at its first evaluation for an output that its own steps could read."""
    found = []
    for kind in ("a dict", "a ModelOutput"):
        trainer = quick_trainer(
            Returns(READABLE[kind]), deletion_auc_samples=8, trainer_kwargs={"eval_dataset": TinyImages(8)}
        )
        trainer.train()
        found.append(trainer.evaluate()["eval_deletion_auc"])
    assert found[0] == found[1]


# --- how the images are passed -------------------------------------------------------------------------------------


class Head(nn.Module):
    """The mean of each channel, weighted."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, CLASSES))

    def logits(self, images):
        return images.mean(dim=(2, 3)) @ self.weight


class PixelsLast(Head):
    def forward(self, labels=None, pixel_values=None):
        assert labels is None
        return self.logits(pixel_values)


class Images(Head):
    def forward(self, images):
        return self.logits(images)


class ImagesAndMore(Head):
    def forward(self, images, **kwargs):
        assert not kwargs
        return self.logits(images)


class AnyKeyword(Head):
    def forward(self, labels=None, **inputs):
        assert labels is None
        return self.logits(inputs["pixel_values"])


class Wrapper(nn.Module):
    """Passes on what it gets, as PEFT and DDP do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


BY_NAME = {PixelsLast: True, Images: False, ImagesAndMore: False, AnyKeyword: True}


@pytest.mark.parametrize("kind", BY_NAME)
def test_images_go_to_the_parameter_that_is_meant(kind):
    """Catches images taken for labels (a positional call), and a name that the forward does not know."""
    images = torch.randn(2, 3, 4, 4)
    model = kind()
    assert takes_pixel_values(model) is BY_NAME[kind]
    for judged in (model, Wrapper(model), Wrapper(Wrapper(model))):
        assert torch.equal(LogitsModel(judged)(images), model.logits(images))
    assert takes_pixel_values(torch.compile(model)) is BY_NAME[kind]


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_model_is_read_by_its_schema():
    """Catches a scripted model, which has no signature, given its images under a name that it does not know."""
    images = torch.randn(2, 3, 4, 4)
    for kind, by_name in ((Images, False), (PixelsOnly, True)):
        model = kind()
        scripted = torch.jit.trace(model, images)
        assert takes_pixel_values(scripted) is by_name
        assert torch.equal(LogitsModel(scripted)(images), model.logits(images))


class PixelsOnly(Head):
    def forward(self, pixel_values):
        return self.logits(pixel_values)
