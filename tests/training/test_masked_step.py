"""One step of Algorithm 2 does what the equations say."""

import architectures
import numpy as np
import pytest
import reference
import torch
from conftest import TinyImages, build

from smoot_hf import MaskBudget
from smoot_hf import functional as SF
from smoot_hf.models.state import untouched
from smoot_hf.training.masked_step import masked_step
from smoot_hf.training.trackers import LogWindow


def slow_step(model, images, labels, sample_idx, k, epoch, args):
    """Algorithm 2 for a model without dropout, sample by sample, through tests/reference.py."""
    ce, kl, delta, masks = [], [], [], []
    for image, label, index, budget in zip(images, labels.tolist(), sample_idx.tolist(), k.tolist(), strict=True):
        leaf = image[None].clone().requires_grad_()
        logits = model(pixel_values=leaf).logits[0]
        gradient = torch.autograd.grad(logits[label], leaf)[0][0]
        mask = reference.least_salient_mask(gradient.abs().mean(0).tolist(), budget)
        channels = len(image)
        noise = torch.tensor(reference.counter_uniform(args.seed, epoch, index, image.numel())).reshape(image.shape)
        fill = torch.tensor(
            [reference.uniform_fill(image[c].tolist(), mask, noise[c].tolist()) for c in range(channels)]
        )
        masked = torch.where(torch.tensor(mask), fill.to(image.dtype), image)
        masked_logits = model(pixel_values=masked[None]).logits[0].tolist()
        logits = logits.tolist()
        ce.append(reference.cross_entropy(logits, label))
        kl.append(reference.kl_divergence(logits, masked_logits))
        delta.append(reference.probability_shift(logits, masked_logits, args.alpha, args.top_n))
        masks.append(mask)
    return ce, kl, delta, masks


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_a_step_equals_the_algorithm_done_slowly(name, quick_args):
    """Catches any seam between the parts: a mask of the wrong sample, a fill of another epoch, a swapped KL."""
    model = build(name).double().eval().train(name == "vit")  # the CNN without its dropout
    data = TinyImages()
    images, labels = data.images[:6].double(), torch.tensor(data.labels[:6])
    sample_idx, k = torch.tensor([5, 0, 3, 9, 1, 2]), torch.tensor([0, 13, 32, 33, 63, 64])
    args = quick_args(alpha=0.7, top_n=3)
    step = masked_step(model, images, labels, sample_idx, k, 2, args)
    ce, kl, delta, masks = slow_step(model, images, labels, sample_idx, k, 2, args)
    assert step.is_masked[:, 0].tolist() == masks
    np.testing.assert_allclose(step.ce.detach(), ce, rtol=1e-7)
    np.testing.assert_allclose(step.kl.detach(), kl, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(step.delta, delta, rtol=1e-5, atol=1e-12)


def test_the_gradients_are_those_of_the_plain_formulation(quick_args):
    """Catches gradients that leak through the saliency, the fill or the mask."""
    data, args = TinyImages(), quick_args(kl_weight=0.7)
    images, labels, sample_idx = data.images[:8], torch.tensor(data.labels[:8]), torch.arange(8)
    ours, plain = build("vit").train(), build("vit").train()
    step = masked_step(ours, images, labels, sample_idx, torch.full((8,), 32), 0, args)
    (step.ce + 0.7 * step.kl).mean().backward()

    noise = SF.counter_uniform(args.seed, 0, sample_idx, images.shape[1:])
    masked = torch.where(step.is_masked, SF.uniform_fill(images, step.is_masked, noise), images)
    log_p, log_q = (plain(pixel_values=view).logits.log_softmax(1) for view in (images, masked))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (torch.nn.functional.nll_loss(log_p, labels) + 0.7 * kl).backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_kl_gradient_masked_makes_the_clean_prediction_a_constant(quick_args):
    """Catches an option that does nothing, and one that detaches the masked prediction in its place."""
    data, sample_idx = TinyImages(), torch.arange(8)
    images, labels, args = data.images[:8], torch.tensor(data.labels[:8]), quick_args(kl_gradient="masked")
    ours, plain = build("vit").train(), build("vit").train()
    step = masked_step(ours, images, labels, sample_idx, torch.full((8,), 32), 0, args)
    (gradient,) = torch.autograd.grad(step.kl.mean(), ours.classifier.weight)

    noise = SF.counter_uniform(args.seed, 0, sample_idx, images.shape[1:])
    masked = torch.where(step.is_masked, SF.uniform_fill(images, step.is_masked, noise), images)
    log_p, log_q = (plain(pixel_values=view).logits.log_softmax(1) for view in (images, masked))
    kl = torch.nn.functional.kl_div(log_q, log_p.detach(), log_target=True, reduction="batchmean")
    (expected,) = torch.autograd.grad(kl, plain.classifier.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "override",
    [
        {"saliency_score": "log_prob"},
        {"signed_saliency": True},
        {"saliency_target": "predicted"},
        {"mask_positions": "random"},
        {"mask_fill": "mean"},
        {"mask_fill": "other_image"},
        {"mask_fill": "adversarial"},
    ],
)
def test_every_reading_of_the_saliency_changes_the_step(override, quick_args):
    """Catches an argument that is parsed and then forgotten."""
    data = TinyImages()
    batch = data.images[:8], torch.tensor(data.labels[:8]), torch.arange(8), torch.full((8,), 32), 0
    one = masked_step(build("vit").train(), *batch, quick_args())
    other = masked_step(build("vit").train(), *batch, quick_args(**override))
    assert torch.equal(one.ce, other.ce)
    assert not torch.equal(one.kl, other.kl)


@pytest.mark.parametrize("name", ["vit", "cnn", "resnet"])
def test_masking_nothing_changes_nothing_exactly(name, quick_args):
    """Catches two dropout draws: delta would measure dropout and not the mask."""
    model = build("vit", dropout=0.3) if name == "vit" else build(name)
    data = TinyImages()
    step = masked_step(
        model.train(), data.images, torch.tensor(data.labels), torch.arange(24), torch.zeros(24).int(), 0, quick_args()
    )
    assert step.kl.tolist() == [0.0] * 24
    assert step.delta.tolist() == [0.0] * 24
    assert not step.is_masked.any()


def test_the_masked_view_is_no_part_of_the_running_statistics(quick_args):
    """Catches evaluations normalised by masked images: the buffers are those of one forward pass of the clean ones."""
    data = TinyImages()
    batch = data.images, torch.tensor(data.labels), torch.arange(24), torch.full((24,), 32), 0
    for momentum in (0.1, None):  # None: a cumulative mean, which counts the batches
        ours, plain = build("resnet").train(), build("resnet").train()
        for model in (ours, plain):
            for layer in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
                layer.momentum = momentum
        for _ in range(2):
            masked_step(ours, *batch, quick_args().settings)
            plain(pixel_values=data.images)
        assert len(dict(plain.named_buffers())) > 3
        for (name, expected), found in zip(plain.named_buffers(), ours.buffers(), strict=True):
            assert torch.equal(found, expected), name
        assert {m.momentum for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {momentum}


def test_without_the_shared_draw_dropout_shows_in_delta(quick_args):
    """The test above can fail."""
    data, args = TinyImages(), quick_args(shared_dropout=False)
    batch = data.images, torch.tensor(data.labels), torch.arange(24), torch.zeros(24).int(), 0
    assert masked_step(build("cnn").train(), *batch, args).delta.abs().max() > 1e-4


def test_the_eval_pass_sees_no_dropout_and_leaves_batch_statistics_and_modes(quick_args):
    """Catches an eval pass in train mode, and a frozen module that comes back in training."""
    data = TinyImages()
    batch = data.images, torch.tensor(data.labels), torch.arange(24), torch.full((24,), 32), 0
    cnn = build("cnn").train()
    eval_cnn = build("cnn").eval()
    leaf = data.images.clone().requires_grad_()
    score = SF.class_score(eval_cnn(pixel_values=leaf).logits, batch[1])
    expected = SF.least_salient_mask(SF.input_saliency(score, leaf, signed=False), batch[3])
    assert torch.equal(masked_step(cnn, *batch, quick_args(saliency_pass="eval")).is_masked, expected)

    shared, own = build("resnet").train(), build("resnet").train()
    for model in (shared, own):
        next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    modes = [m.training for m in own.modules()]
    masked_step(own, *batch, quick_args(saliency_pass="eval"))
    assert [m.training for m in own.modules()] == modes
    tracked = [b for n, b in own.named_buffers() if n.endswith("num_batches_tracked")]
    assert sorted({int(b) for b in tracked}) == [0, 1]  # the frozen one; the clean view alone


@pytest.mark.parametrize("override", [{}, {"saliency_pass": "eval"}, {"saliency_target": "predicted"}])
def test_nothing_in_a_step_waits_for_the_device(override, quick_args):
    """Tensors on the meta device have no values: whatever reads one back to the host raises."""
    args, sample_idx = quick_args(**override), torch.empty(8, dtype=torch.int64, device="meta")
    budget = MaskBudget(24, (8, 8), device="meta")
    images, labels = torch.empty(8, 3, 8, 8, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    model = build("vit").to("meta").train()
    step = masked_step(model, images, labels, sample_idx, budget.read(sample_idx), 0, args)
    budget.update(sample_idx, step.delta, args.step_size)
    LogWindow().add(ce_loss=step.ce, kl_loss=step.kl)
    (step.ce + step.kl).mean().backward()
    with pytest.raises(RuntimeError, match="meta"):
        step.ce.sum().item()


@pytest.mark.parametrize("kind", ["a step", "an evaluation"])
def test_what_a_module_keeps_of_eval_mode_is_gone_afterwards(kind, quick_args):
    """LeViT keeps its attention biases until `train`; catches an evaluation with those of an earlier step."""
    model, other = (architectures.build("levit", "LevitForImageClassification").train() for _ in range(2))
    images, labels = torch.randn(3, 3, 32, 32), torch.arange(3)
    if kind == "a step":
        masked_step(model, images, labels, labels, torch.full((3,), 99), 0, quick_args(saliency_pass="eval"))
    else:
        with untouched(model):
            model(pixel_values=images)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1
    other.load_state_dict(model.state_dict())
    assert model.training
    assert torch.equal(model.eval()(pixel_values=images).logits, other.eval()(pixel_values=images).logits)
