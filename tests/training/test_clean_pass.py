"""Saliency and loss out of as few passes as possible: the same numbers as the plain formulation, at the stated cost."""

import pytest
import torch
from conftest import TinyImages, build, parameters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import ViTConfig, ViTForImageClassification

from smoot_hf import functional as SF
from smoot_hf.training.clean_pass import compiled_pass, shared_pass
from smoot_hf.training.masked_step import masked_step

SIX = {"kl_gradient": "masked", "saliency_score": "log_prob"}


def batch(k=32):
    data = TinyImages()
    return data.images[:8], torch.tensor(data.labels[:8]), torch.arange(8), torch.full((8,), k), 0


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def model_of(name, **others):
    """With random numbers, batch statistics, and, for `"frozen"`, a layer that does not train."""
    model = build("vit" if name == "frozen" else name, **others).train()
    if name == "frozen":
        model.vit.embeddings.requires_grad_(False)
    return model


def plain_step(model, images, labels, sample_idx, k, epoch, args):
    """Saliency by a backward pass of its own, the clean prediction as a constant teacher: (ce, kl, delta, mask)."""
    leaf = images.clone().requires_grad_()
    state = torch.get_rng_state()
    logits = model(pixel_values=leaf).logits
    (gradient,) = torch.autograd.grad(SF.class_score(logits, labels, "log_prob").sum(), leaf, retain_graph=True)
    mask = SF.least_salient_mask(gradient.mean(1), k)
    noise = SF.counter_uniform(args.seed, epoch, sample_idx, images.shape[1:])
    torch.set_rng_state(state)
    masked_logits = model(pixel_values=torch.where(mask, SF.uniform_fill(images, mask, noise), images)).logits
    delta = SF.probability_shift(logits, masked_logits, args.alpha, args.top_n)
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return ce, SF.kl_divergence(logits.detach(), masked_logits), delta, mask


@pytest.mark.parametrize("name", ["vit", "resnet", "cnn", "frozen"])
@pytest.mark.parametrize("scale", [1.0, 512.0])
def test_the_backward_pass_of_the_loss_gives_the_same_step(name, scale, quick_args):
    """Catches a saliency of the wrong sign, a gradient lost or counted twice, and a loss scale left out."""
    # Ranked by magnitude, a wrong sign would not be seen.
    args, results = quick_args(**SIX, kl_weight=0.7, signed_saliency=True), []
    for is_plain in (True, False):
        torch.manual_seed(0)
        model = model_of(name)
        if is_plain:
            ce, kl, delta, mask = plain_step(model, *batch(), args)
        else:
            _, ce, kl, delta, mask = masked_step(model, *batch(), args, weights=trained(model))
        (scale * (ce.sum() / 8 + 0.7 * kl.mean())).backward()
        results.append(((ce, kl, delta, mask), {n: p.grad for n, p in model.named_parameters()}))
    (plain, expected), (ours, gradients) = results
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6 * scale, msg=key)


def test_samples_weighted_one_by_one_give_nan_and_not_a_wrong_gradient(quick_args):
    """The gradients are known for the sum alone: catches a loss with sample weights that would train unweighted."""
    model = model_of("vit")
    step = masked_step(model, *batch(), quick_args(**SIX), weights=trained(model))
    (step.ce * torch.arange(8.0)).sum().backward()
    assert model.classifier.weight.grad.isnan().all()


@pytest.mark.parametrize(
    "override",
    [
        {"kl_gradient": "both"},
        {"saliency_score": "logit"},
        {"saliency_target": "predicted"},
        {"saliency_pass": "eval"},
        {"label_smoothing_factor": 0.1},
    ],
)
def test_where_the_loss_gives_no_saliency_weights_change_nothing(override, quick_args):
    """Catches the shortcut taken where the gradient of the cross-entropy is not that of the score."""
    steps = []
    for with_weights in (False, True):
        model = model_of("vit")
        args = quick_args(**SIX | override)
        step = masked_step(model, *batch(), args, weights=trained(model) if with_weights else None)
        (step.ce * torch.arange(8.0) + step.kl).sum().backward()
        steps.append((step, model.vit.embeddings.cls_token.grad))
    assert torch.equal(steps[0][0].is_masked, steps[1][0].is_masked)
    assert torch.equal(steps[0][1], steps[1][1])


@pytest.mark.parametrize("name", ["vit", "resnet", "cnn", "frozen"])
@pytest.mark.parametrize("scale", [1.0, 512.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_leaving_out_the_images_gradient_leaves_the_others(name, scale, autocast, quick_args):
    """Catches a gradient of the clean view that is lost, counted twice, or without the factor of the loss."""
    results = []
    for leaves_out in (False, True):
        torch.manual_seed(0)
        model = model_of(name)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            step = masked_step(model, *batch(), quick_args(), weights=trained(model) if leaves_out else None)
        (scale * (step.ce * torch.arange(8.0) + 0.7 * step.kl).mean()).backward()
        results.append((step, {n: p.grad for n, p in model.named_parameters()}))
    (plain, expected), (ours, gradients) = results
    assert torch.equal(ours.is_masked, plain.is_masked)
    for key, gradient in gradients.items():
        # Under autocast the gradients of the two views are otherwise added in bfloat16.
        tolerance = 2**-7 * gradient.abs().max().item() if autocast and gradient is not None else 1e-7 * scale
        torch.testing.assert_close(gradient, expected[key], rtol=1e-6, atol=tolerance, msg=key)


@pytest.mark.parametrize("override", [{}, SIX])
def test_a_hook_on_a_weight_sees_the_whole_gradient_once(override, quick_args):
    """Catches a hook that halves a gradient and quarters the clean view's, whose passes were cut in two."""
    results = []
    for with_weights in (False, True):
        model, seen = model_of("vit"), []
        model.classifier.weight.register_hook(lambda gradient, seen=seen: (seen.append(gradient), gradient / 2)[1])
        step = masked_step(model, *batch(), quick_args(**override), weights=trained(model) if with_weights else None)
        (step.ce.mean() + 0.7 * step.kl.mean()).backward()
        assert len(seen) == 1
        results.append({n: p.grad for n, p in model.named_parameters()})
        assert torch.equal(model.classifier.weight.grad, seen[0] / 2)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


class ImageGradients(TorchDispatchMode):
    """Counts how often the gradient of the first convolution's input is computed."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.total += args[10][0] and args[1].shape[1] == 3
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("override", "count"), [({}, 1), (SIX, 1), ({"saliency_pass": "eval"}, 1)])
@pytest.mark.parametrize("name", ["vit", "resnet", "cnn"])
def test_the_gradient_of_the_images_is_computed_once(name, override, count, quick_args):
    """Catches it in the final backward pass, where nobody wants it: a twentieth of a standard step of the CNN."""
    model = model_of(name)
    with ImageGradients() as counter:
        step = masked_step(model, *batch(), quick_args(**override), weights=trained(model))
        (step.ce.mean() + step.kl.mean()).backward()
    assert counter.total == count


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}, {"bf16": True}])
@pytest.mark.parametrize("override", [{}, SIX])
def test_the_trainer_trains_the_same_either_way(
    accumulation, settings, override, quick_args, quick_trainer, monkeypatch
):
    """With accumulation, clipping, recomputed activations, bf16; catches gradients that one of them loses."""

    name = "activation_checkpointing" if hasattr(quick_args(), "activation_checkpointing") else "gradient_checkpointing"

    def weights(shortcut):
        torch.manual_seed(0)
        trainer = quick_trainer(
            # With the floor of Equation 4 the sign of a delta in the last bits would move K.
            build("vit", dropout=0.1), **override, rounding="trunc", step_size=500.0, max_steps=4,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation, max_grad_norm=0.1, optim="sgd", learning_rate=0.1,
            **{name if key == "checkpointing" else key: value for key, value in settings.items()},
        )  # fmt: skip
        if not shortcut:
            monkeypatch.setattr(trainer, "_loss_weights", lambda _: None)
        trainer.train()
        return parameters(trainer), trainer.mask_budget.k

    (ours, k), (plain, expected_k) = weights(True), weights(False)
    assert torch.equal(k, expected_k)
    start = dict(build("vit", dropout=0.1).named_parameters())
    moved = max((plain[name] - value).abs().max().item() for name, value in start.items())
    # In bfloat16 the last bits of a gradient depend on the order of sums.
    tolerance = 2**-6 * moved if "bf16" in settings else 1e-6
    for name, value in ours.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=tolerance, msg=name)


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of what runs under it, in eager and in compiled graphs."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def flops(run):
    with Flops() as counter:
        run()
    return counter.total


@pytest.mark.parametrize(
    ("override", "ratio"),
    [({}, 7 / 3), (SIX, 6 / 3), ({"kl_gradient": "masked"}, 7 / 3), ({"saliency_pass": "eval"}, 8 / 3)],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_does_the_arithmetic_of_the_cost_model_and_no_more(override, ratio, compiled, quick_args):
    """Counted in floating-point operations. Catches a forward pass too many, and weight gradients in the saliency.

    Compiled by AOTAutograd alone, the backward pass of a model computes every gradient though one is asked for.
    """
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    config = ViTConfig(image_size=8, patch_size=2, num_labels=5, **sizes, attn_implementation="eager")
    model = ViTForImageClassification(config).train()
    images, labels, *others = batch()
    one_pass = flops(lambda: model(pixel_values=images))
    args = quick_args(**override)
    network, clean_pass = model, shared_pass
    if compiled:
        network = torch.compile(model, backend="aot_eager")
        clean_pass = compiled_pass(backend="aot_eager")

    def step():
        step = masked_step(
            network, images, labels, *others, args, saliency_model=model, weights=trained(model), clean_pass=clean_pass
        )
        (step.ce.mean() + step.kl.mean()).backward()

    step()  # compiles
    # The patches' own gradient, which the last backward pass could do without, is 2 % of this model.
    assert flops(step) / (3 * one_pass) == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("name", ["vit", "resnet", "cnn"])
def test_the_compiled_step_is_the_eager_one(name, quick_args):
    """Catches buffers, dropout draws or gradients that compilation changes."""
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = model_of(name)
        network = torch.compile(model, backend="aot_eager") if compiled else model
        clean_pass = compiled_pass(backend="aot_eager") if compiled else shared_pass
        step = masked_step(network, *batch(), quick_args(), saliency_model=model, clean_pass=clean_pass)
        (step.ce + step.kl).mean().backward()
        results.append((step, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    (plain, expected, buffers), (ours, gradients, our_buffers) = results
    assert torch.equal(ours.is_masked, plain.is_masked)
    torch.testing.assert_close(ours.kl, plain.kl, rtol=1e-5, atol=1e-7)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)
    for key, value in our_buffers.items():
        torch.testing.assert_close(value, buffers[key], msg=key)


@pytest.mark.parametrize("override", [{}, SIX])
def test_a_training_with_torch_compile_is_the_eager_one(override, quick_trainer, monkeypatch):
    """By the flag, as a user has it. Catches a model that is compiled twice over, or trained where it is not."""
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        # The arguments leave the flag in the environment, for accelerate.
        for name in ("BACKEND", "MODE"):
            monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no" if name == "BACKEND" else "default")
        flags = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = quick_trainer("vit", **override, max_steps=3, step_size=300, optim="sgd", **flags)
        trainer.train()
        results.append((parameters(trainer), trainer.mask_budget.k))
    (expected, expected_k), (ours, k) = results
    assert torch.equal(k, expected_k)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
