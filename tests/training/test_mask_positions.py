"""Which positions are masked: the method's choice and its controls, equal to a slow loop."""

import pytest
import reference
import torch
from conftest import TinyImages, build
from hypothesis import given
from hypothesis import strategies as st

from smoot_hf import functional as SF
from smoot_hf.training.masked_step import mask_images, masked_step

POSITIONS = ["least_salient", "random", "most_salient", "alternating"]
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7))


def slow_mask(saliency, k, positions, epoch, noise):
    """One image: positions in order of their turn, the first k of them."""
    turn = {
        "least_salient": saliency,
        "most_salient": [[-value for value in row] for row in saliency],
        "random": noise,
    }
    if positions == "alternating":
        positions = "most_salient" if epoch % 2 else "least_salient"
    return reference.least_salient_mask(turn[positions], k)


@given(SIZES, st.integers(0, 2**31 - 1), st.sampled_from(POSITIONS), st.integers(0, 3), st.booleans())
def test_masks_equal_the_slow_loop(size, seed, positions, epoch, with_nan):
    """Catches the wrong end of the ranking, the wrong epoch, and a tie or a NaN that goes another way."""
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.randint(-3, 4, size, generator=generator).double()
    if with_nan:
        saliency[torch.rand(size, generator=generator) < 0.2] = torch.nan
    noise = torch.rand(size, generator=generator)
    k = torch.randint(0, size[1] * size[2] + 1, size[:1], generator=generator)
    found = SF.masked_positions(saliency, k, positions, epoch, noise)
    assert found.shape == (size[0], 1, *size[1:])
    for image in range(size[0]):
        expected = slow_mask(saliency[image].tolist(), k[image].item(), positions, epoch, noise[image].tolist())
        assert found[image, 0].tolist() == expected


@given(SIZES, st.integers(0, 2**31 - 1))
def test_the_default_is_the_method(size, seed):
    """Catches a control that changes the method itself."""
    saliency = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    k = torch.randint(0, size[1] * size[2] + 1, size[:1])
    assert torch.equal(SF.masked_positions(saliency, k, "least_salient"), SF.least_salient_mask(saliency, k))


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("signed", [True, False])
def test_a_step_masks_the_positions_that_are_asked_for(positions, epoch, signed, quick_args):
    """Catches an argument that is parsed and then forgotten; K and the fill stay those of the method."""
    args = quick_args(mask_positions=positions, signed_saliency=signed).settings
    data, rows, k = TinyImages(), torch.tensor([5, 0, 3, 9, 1, 2]), torch.tensor([0, 13, 32, 33, 63, 64])
    images, labels, model = data.images[:6], torch.tensor(data.labels[:6]), build("vit").train()
    step = masked_step(model, images, labels, rows, k, epoch, args)
    leaf = images.clone().requires_grad_()
    score = SF.class_score(model(pixel_values=leaf).logits, labels)
    saliency = SF.input_saliency(score, leaf, signed)
    is_even = positions == "least_salient" or (positions == "alternating" and epoch == 0)
    if positions == "random":
        assert step.is_masked.flatten(1).sum(1).tolist() == k.tolist()
        for other in (saliency, -saliency):
            assert not torch.equal(step.is_masked, SF.least_salient_mask(other, k))
    else:
        assert torch.equal(step.is_masked, SF.least_salient_mask(saliency if is_even else -saliency, k))
    noise = SF.counter_uniform(args.seed, epoch, rows, tuple(images.shape[1:]))
    masked, _ = mask_images(images, torch.autograd.grad(score.sum(), leaf)[0], rows, k, epoch, args)
    assert torch.equal(masked, torch.where(step.is_masked, SF.uniform_fill(images, step.is_masked, noise), images))


def test_random_positions_are_drawn_per_sample_and_epoch(quick_args):
    """Catches one random mask for all images or epochs, which a model could learn, and one tied to the fill's noise."""
    args, data = quick_args(mask_positions="random").settings, TinyImages()
    images, rows, k = data.images[:6], torch.arange(6), torch.full((6,), 32)
    masks = [mask_images(images, images, rows, k, epoch, args)[1].flatten(1) for epoch in (0, 1, 0)]
    assert torch.equal(masks[0], masks[2])
    assert len(torch.cat(masks[:2]).unique(dim=0)) == 12
    fill = SF.counter_uniform(args.seed, 0, rows, tuple(images.shape[1:]))
    for channel in range(3):
        assert not torch.equal(masks[0], SF.least_salient_mask(fill[:, channel], k).flatten(1))


def test_bad_choices_are_one_clear_error(quick_args):
    """Catches a misspelt control that trains the method in its place."""
    with pytest.raises(ValueError, match=r"positions must be one of 'least_salient'.*got 'salient'"):
        SF.masked_positions(torch.zeros(1, 2, 2), torch.zeros(1), "salient")
    with pytest.raises(ValueError, match="needs noise"):
        SF.masked_positions(torch.zeros(1, 2, 2), torch.zeros(1), "random")
    with pytest.raises(ValueError, match=r"mask_positions must be one of.*got 'salient'"):
        quick_args(mask_positions="salient")
