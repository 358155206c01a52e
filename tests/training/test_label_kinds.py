"""Training with soft labels and with several labels an image: the equations, equal runs, and what is refused."""

import numpy as np
import pytest
import reference
import torch
from conftest import CLASSES, PixelImages, TinyImages, build, freeze_batch_statistics, largest_difference, parameters
from transformers import Trainer, TrainingArguments

from smoot_hf import InputPipeline, SmootTrainer
from smoot_hf.data import Mixing
from smoot_hf.training.masked_step import masked_step

MULTI = "multi_label_classification"
SETTINGS = [{}, {"kl_gradient": "masked", "saliency_score": "log_prob"}, {"saliency_pass": "eval"}]


class Weighted(TinyImages):
    """Tiny images whose labels are weights of the classes.

    Args:
        kind: "one-hot", "soft" (a distribution), or "several" (some images of no label, of one and of two).
    """

    def __init__(self, kind, length=24):
        super().__init__(length)
        one_hot = torch.eye(CLASSES)[self.labels]
        if kind == "one-hot":
            weights = one_hot
        elif kind == "soft":
            weights = (one_hot + 0.5 * one_hot.roll(1, dims=1)) / 1.5
        else:
            weights = ((one_hot + one_hot.roll(1, dims=0)) * (torch.arange(length) % 5 > 0)[:, None]).clamp(max=1)
        self.labels = weights.tolist()


def several_labels(name, **overrides):
    model = build(name, **overrides)
    model.config.problem_type = MULTI
    return model


def model_of(kind, name="vit"):
    return several_labels(name) if kind == "several" else build(name)


def slow_step(model, images, labels, k, settings, is_several):
    """Algorithm 2 by tests/reference.py, with the noise of the samples in their order."""
    ce, kl, delta = [], [], []
    for i, (image, weights) in enumerate(zip(images, labels.tolist(), strict=True)):
        leaf = image[None].clone().requires_grad_()
        logits = model(pixel_values=leaf).logits[0]
        target = reference.multi_label_target(logits.tolist(), weights) if is_several else weights
        if settings.saliency_score == "log_prob" and is_several:
            derivative = [w * reference.sigmoid(-z) for w, z in zip(target, logits.tolist(), strict=True)]
        else:
            derivative = reference.score_derivative(logits.tolist(), target, settings.saliency_score)
        (gradient,) = torch.autograd.grad(logits, leaf, torch.tensor(derivative, dtype=logits.dtype))
        mask = reference.least_salient_mask(gradient[0].abs().mean(0).tolist(), int(k[i]))
        noise = torch.tensor(reference.counter_uniform(settings.seed, 0, i, image.numel())).reshape(image.shape)
        fill = [reference.uniform_fill(image[c].tolist(), mask, noise[c].tolist()) for c in range(len(image))]
        masked = torch.where(torch.tensor(mask), torch.tensor(fill).to(image.dtype), image)
        one, other = logits.tolist(), model(pixel_values=masked[None]).logits[0].tolist()
        if is_several:
            ce.append(reference.binary_cross_entropy(one, weights) / CLASSES)
            kl.append(reference.bernoulli_divergence(one, other) / CLASSES)
            shift, label = reference.multi_label_shift, weights
        else:
            ce.append(reference.soft_cross_entropy(one, weights))
            kl.append(reference.kl_divergence(one, other))
            shift, label = reference.probability_shift, weights.index(max(weights))
        delta.append(shift(one, other, settings.alpha, settings.top_n, settings.delta_mode, label))
    return ce, kl, delta


@pytest.mark.parametrize("name", ["vit", "timm"])
@pytest.mark.parametrize("overrides", [*SETTINGS, {"delta_mode": "label"}])
@pytest.mark.parametrize("kind", ["soft", "several"])
def test_a_step_equals_the_algorithm_done_slowly(kind, overrides, name, quick_args):
    """Catches the hard label in the score, softmax outputs of several labels, and a KL in another unit."""
    model, data = model_of(kind, name).double().train(), Weighted(kind)
    images, labels, k = data.images[:8].double(), torch.tensor(data.labels[:8]).double(), torch.arange(0, 64, 8)
    settings = quick_args(top_n=3, **overrides).settings
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    step = masked_step(model, images, labels, torch.arange(8), k, 0, settings, weights=weights)
    ce, kl, delta = slow_step(model, images, labels, k, settings, kind == "several")
    np.testing.assert_allclose(step.ce.detach(), ce, rtol=1e-9)
    np.testing.assert_allclose(step.kl.detach(), kl, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(step.delta, delta, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("overrides", [*SETTINGS, {"method": "standard"}, {"masked_share": 0.5}])
@pytest.mark.parametrize("name", ["vit", "cnn", "timm"])
def test_one_hot_labels_train_as_hard_labels_bit_for_bit(name, overrides, trained):
    """Catches another reading of the same labels anywhere on the way to the weights and to K."""
    if name == "cnn" and "masked_share" in overrides:
        overrides = overrides | {"shared_dropout": False}
    hard, soft = (trained(name, data, step_size=300, **overrides) for data in (TinyImages(), Weighted("one-hot")))
    assert largest_difference(parameters(hard), parameters(soft)) == 0
    if overrides.get("method") != "standard":
        assert torch.equal(hard.mask_budget.k, soft.mask_budget.k)
        assert len(hard.mask_budget.k.unique()) > 2


@pytest.mark.parametrize("method", ["standard", "smoot"])
@pytest.mark.parametrize("kind", ["soft", "several"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_accumulation_of_four_is_the_fourfold_batch(name, kind, method, quick_trainer):
    """Catches every weight of a class counted as a sample, which would make the loss four times too small."""
    final = {}
    for accumulation in (1, 4):
        model = model_of(kind, name)
        freeze_batch_statistics(model)
        trainer = quick_trainer(
            model, Weighted(kind, 22), method=method, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation, step_size=300, optim="sgd",
        )  # fmt: skip
        trainer.train()
        final[accumulation] = parameters(trainer), None if method == "standard" else trainer.mask_budget.k
    assert largest_difference(final[1][0], final[4][0]) < 1e-5
    if method != "standard":
        assert torch.equal(final[1][1], final[4][1])


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_standard_training_of_several_labels_is_the_plain_trainers(name, tmp_path, quick_args, quick_trainer):
    """Catches another loss than transformers' for `problem_type="multi_label_classification"`."""
    settings = {name: value for name, value in quick_args().to_dict().items() if name in QUICK_NAMES}
    args = TrainingArguments(output_dir=str(tmp_path / "plain"), **settings)
    plain = Trainer(several_labels(name), args, train_dataset=Weighted("several"))
    plain.train()
    ours = quick_trainer(several_labels(name), Weighted("several"), method="standard")
    ours.train()
    # A mean of means is rounded in another way than a mean over all.
    assert largest_difference(dict(plain.model.named_parameters()), parameters(ours)) < 1e-5


QUICK_NAMES = {"max_steps", "per_device_train_batch_size", "learning_rate", "report_to", "save_strategy", "use_cpu"}


def test_evaluation_of_several_labels_has_their_loss(quick_trainer):
    """Catches a cross-entropy of one class, and labels that do not reach `compute_metrics`."""
    data, seen = Weighted("several"), []

    def metrics(prediction):
        seen.append(prediction.label_ids)
        return {}

    trainer = quick_trainer(several_labels("vit"), data, {"compute_metrics": metrics})
    logits = trainer.model.eval()(pixel_values=data.images).logits
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(data.labels))
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_array_equal(seen[0], np.array(data.labels, dtype=np.float32))


@pytest.mark.parametrize("kind", ["soft", "several"])
def test_bfloat16_trains_near_float32(kind, trained):
    """Catches weights of classes that autocast rounds, or refuses."""
    losses = [trained(model_of(kind), Weighted(kind), bf16=bf16).state.log_history[-1] for bf16 in (False, True)]
    assert losses[0]["train_loss"] == pytest.approx(losses[1]["train_loss"], rel=0.03)
    assert losses[0]["train_loss"] != losses[1]["train_loss"]


def mixing_trainer(quick_trainer, **overrides):
    mix = overrides.pop("mix", Mixing(CLASSES, erasing_probability=0.5))
    pipeline = InputPipeline((0.5,) * 3, (0.25,) * 3, crop_padding=2, mix=mix)
    return quick_trainer("vit", PixelImages(24), {"input_pipeline": pipeline}, step_size=300, **overrides)


def test_the_pipeline_mixes_in_training_alone(quick_trainer, recorder):
    """Catches mixed images in an evaluation, labels that stay hard, and images that stay as they were."""
    trainer = mixing_trainer(quick_trainer)
    trainer.train()
    assert all(call["labels"].shape == (8, CLASSES) for call in recorder.calls)
    assert all(torch.allclose(call["labels"].sum(dim=1), torch.ones(8)) for call in recorder.calls)
    assert any((call["labels"].max(dim=1).values < 1).any() for call in recorder.calls)
    first, data = recorder.calls[0], PixelImages(24)
    plain = InputPipeline((0.5,) * 3, (0.25,) * 3, crop_padding=2)
    images = torch.stack([data[i]["pixel_values"] for i in first["sample_idx"].tolist()])
    assert not torch.equal(first["images"], plain.prepare_training(images, first["sample_idx"], 0))
    assert trainer.evaluate(PixelImages(8))["eval_loss"] == trainer.evaluate(PixelImages(8))["eval_loss"]


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_resumed_training_mixes_as_the_uninterrupted_one(library, quick_trainer, tmp_path):
    """Catches a mixing whose random state is not in the checkpoint."""
    from torchvision.transforms import v2

    def mix():
        return Mixing(CLASSES, erasing_probability=0.5) if library == "timm" else v2.CutMix(num_classes=CLASSES)

    settings = {"save_strategy": "steps", "save_steps": 4}
    whole = mixing_trainer(quick_trainer, mix=mix(), output_dir=str(tmp_path / library), **settings)
    whole.train()
    rest = mixing_trainer(quick_trainer, mix=mix(), output_dir=str(tmp_path / library), **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / library / "checkpoint-4"))
    assert largest_difference(parameters(whole), parameters(rest)) == 0
    assert torch.equal(whole.mask_budget.k, rest.mask_budget.k)


def with_weights(row, *weights, dtype=torch.float32):
    """A collator that gives one sample other weights."""

    def collate(examples):
        labels = torch.tensor([example["labels"] for example in examples], dtype=torch.float64)
        if row < len(examples):
            labels[row] = torch.tensor(weights)
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": labels.to(dtype),
        }

    return collate


NAN = float("nan")
DISTRIBUTION = "must be a distribution over the classes: no weight below 0, and 1 in sum"
ZERO_OR_ONE = "must be 1 for each label that the image has, and 0 for the others"
BAD = {
    "sum": ("soft", with_weights(0, 0.5, 0.3, 0.0, 0.0), rf"{DISTRIBUTION}; training sample 0 has \[0.5, 0.3, 0, 0\]"),
    "negative": (
        "soft",
        with_weights(0, 1.5, -0.5, 0, 0),
        rf"{DISTRIBUTION}; training sample 0 has \[1.5, -0.5, 0, 0\]",
    ),
    "NaN": ("soft", with_weights(0, NAN, 0.5, 0.5, 0), rf"{DISTRIBUTION}; training sample 0 has \[nan, 0.5"),
    "several of a model of one": ("several", with_weights(0, 1, 1, 0, 0), r"has \[1, 1, 0, 0\]. .*problem_type='multi"),
    "above 1": ("several", with_weights(0, 2, 0, 0, 0), rf"{ZERO_OR_ONE}; training sample 0 has \[2, 0, 0, 0\]"),
    "several, NaN": ("several", with_weights(0, NAN, 0, 0, 0), rf"{ZERO_OR_ONE}; training sample 0 has \[nan, 0"),
    "integers": ("soft", with_weights(9, dtype=torch.int64), r"got torch.int64 \(1, 4\): for several labels per image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused_in_one_line(name, quick_trainer):
    """Catches weights that would train something else without an error."""
    kind, collator, message = BAD[name]
    model = build("vit") if "of one" in name else model_of(kind)
    with pytest.raises(ValueError, match=message) as caught:
        quick_trainer(model, Weighted(kind), {"data_collator": collator})
    assert "\n" not in str(caught.value)


def test_labels_of_the_wrong_width_or_kind_are_refused(quick_trainer):
    """Catches weights that are broadcast, hard labels of a model of several, and lists of both kinds."""
    wide = Weighted("one-hot")
    wide.labels = [[*row, 0.0] for row in wide.labels]
    with pytest.raises(ValueError, match="must have 4 weights, one for each class; training sample 0 has 5 weights"):
        quick_trainer("vit", wide)
    with pytest.raises(
        ValueError, match=r"several labels per sample, \(B, classes\) .* got torch.int64 \(1,\): write 1"
    ):
        quick_trainer(several_labels("vit"), TinyImages())
    mixed = Weighted("soft")
    mixed.labels[3] = 1
    with pytest.raises(ValueError, match=r"'labels' must be of one kind.* shapes \(4,\) .*, \(\) \(.*sample 3\)"):
        quick_trainer("vit", mixed).train()


@pytest.mark.parametrize("kind", ["soft", "several"])
def test_bad_weights_of_an_evaluation_are_refused(kind, quick_trainer):
    """Catches an evaluation loss of weights that mean nothing."""
    trainer = quick_trainer(model_of(kind), Weighted(kind))
    trainer.data_collator = with_weights(2, 3.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"labels of the evaluation set must .*, but one is \[3, 0, 0, 0\]"):
        trainer.evaluate(Weighted(kind))


# Transformers says that it would not smooth, and trains.
@pytest.mark.filterwarnings("ignore:Label smoothing is not compatible:UserWarning")
def test_what_mixes_badly_is_refused(quick_trainer):
    """Catches a mix that gives no distribution, and a smoothing that several labels do not have."""
    with pytest.raises(ValueError, match=r"labels that input_pipeline\.mix makes must be a distribution"):
        mixing_trainer(quick_trainer, mix=lambda images, labels: (images, torch.ones(len(labels), CLASSES))).train()
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 is for exclusive classes"):
        quick_trainer(several_labels("vit"), Weighted("several"), label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixup_alpha": -1.0}, "mixup_alpha must be at least 0, got -1.0"),
        ({"erasing_probability": 1.5}, r"erasing_probability must lie in \[0, 1\], got 1.5"),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, "both 0, which mixes nothing"),
    ],
)
def test_mixing_refuses_what_is_out_of_range(fields, message):
    """Catches a field that is taken and then does nothing."""
    with pytest.raises(ValueError, match=message):
        Mixing(4, **fields)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_an_odd_number_one_image_stays_as_it_is(count, multi_label):
    """Catches a last batch that timm does not take, and labels that come in another order than their images."""
    images, hard = torch.arange(float(count))[:, None, None, None].expand(-1, 3, 8, 8).clone(), torch.arange(count) % 4
    labels = torch.eye(4)[hard] if multi_label else hard
    mixed, soft = Mixing(CLASSES, 1.0, 0.0, multi_label=multi_label)(images.clone(), labels)
    assert soft.shape == (count, CLASSES)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(count))
    if count % 2:
        assert torch.equal(mixed[-1], images[-1])
        assert soft[-1].tolist() == torch.eye(4)[hard[-1]].tolist()
    if count > 1:
        # Each value is the number of its image, mixed as its label is.
        own = soft[torch.arange(2), hard[:2]]
        partner = count // 2 * 2 - 1 - torch.arange(2)
        torch.testing.assert_close(mixed[:2, 0, 0, 0], own * torch.arange(2.0) + (1 - own) * partner)


def test_a_loss_of_ones_own_and_the_mixin_take_weights(quick_trainer):
    """Catches soft labels that are cut to hard ones on the way to `compute_loss_func`."""
    seen = []

    def own(outputs, labels, num_items_in_batch=None):
        seen.append(labels.shape)
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    trainer = quick_trainer("vit", Weighted("soft"), {"compute_loss_func": own}, max_steps=1)
    trainer.train()
    assert seen == [torch.Size([8, CLASSES])]
    assert isinstance(trainer, SmootTrainer)
