"""The table of small models of timm: none left out, each of them a model that can be trained."""

import pytest
import timm_families
import torch
from conftest import CHANNELS, CLASSES
from timm_families import FAMILIES, NEWER, build_family
from torch.nn.functional import cross_entropy


def test_every_family_is_listed():
    """Would catch a family of timm that the sweep silently leaves out, and a row of one that timm does not have."""
    installed = set(timm_families.families())
    assert installed <= FAMILIES.keys()
    assert FAMILIES.keys() - installed <= NEWER <= FAMILIES.keys()


def test_a_family_that_is_not_listed_is_named(monkeypatch):
    """Would catch a family of a newer timm that vanishes from the sweep, or fails without its name."""
    monkeypatch.setattr(timm_families, "families", lambda: ["brandnew"])
    ((_, build, _),) = timm_families.rows()
    with pytest.raises(LookupError, match="family 'brandnew'"):
        build()


@pytest.mark.parametrize("name", timm_families.families())
def test_family_can_be_trained(name):
    """Would catch a model in the table on which a check of the sweep is empty: one output for all, or no gradient."""
    model = build_family(name)
    size = FAMILIES[name].size
    images = torch.randn(4, CHANNELS, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model.eval()
    logits = model(images).logits
    assert logits.shape == (4, CLASSES)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    (saliency,) = torch.autograd.grad(logits.sum(), images)
    assert saliency.isfinite().all()
    assert saliency.abs().max() > 1e-6
    model.train()
    cross_entropy(model(images).logits, torch.arange(4)).backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().max() > 1e-6
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
