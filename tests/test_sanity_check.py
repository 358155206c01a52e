"""Sanity check: the correlation equals SciPy's, and random weights do change a map."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from smoot_hf.sanity_check import randomized_weights_correlation, rank_correlation, reinitialize


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


def rows(n=12, channels=1):
    images = torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": images[i], "labels": i % 2} for i in range(n)]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_rank_correlation_equals_scipys(height, width, seed, levels):
    """Catches ties that are broken by position, which makes maps with untouched background look alike."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(0, levels, (2, 3, height, width), generator=generator).float()
    found = rank_correlation(a, b)
    for i in range(3):
        if len(a[i].unique()) == 1 or len(b[i].unique()) == 1:
            assert math.isnan(found[i])
        else:
            assert float(found[i]) == pytest.approx(spearmanr(a[i].flatten(), b[i].flatten()).statistic, abs=1e-12)


def test_rank_correlation_at_its_ends():
    """Catches values that go in where ranks should, and a NaN that gets a rank."""
    a = torch.arange(1.0, 17.0).reshape(1, 4, 4)
    assert float(rank_correlation(a, a.exp())) == pytest.approx(1)
    assert float(rank_correlation(a, -(a**3))) == pytest.approx(-1)
    broken = a.clone()
    broken[0, 0, 0] = math.nan
    assert rank_correlation(a, broken).isnan().all()


def test_full_randomisation_changes_the_map():
    """Catches weights that are kept, or drawn as the model's own seed drew them, and a judged model that is changed."""
    judged = model().train()
    before = copy.deepcopy(judged.state_dict())
    found = randomized_weights_correlation(judged, rows(), signed=True)
    assert found.layers == ("all",)
    assert found.correlation.shape == (1, 12)
    assert float(found.mean[0].abs()) < 0.5
    assert all(torch.equal(value, before[name]) for name, value in judged.state_dict().items())
    assert judged.training
    again = randomized_weights_correlation(judged, rows(), signed=True, batch_size=5)
    torch.testing.assert_close(again.correlation, found.correlation)


def test_cascading_starts_at_the_output_and_adds_up():
    """Catches an order from the input, and layers that are randomised one at a time instead of on top of each other."""
    found = randomized_weights_correlation(model(), rows(), randomization="cascading", signed=True)
    assert found.layers == ("5", "3", "0")
    assert found.correlation.shape == (3, 12)
    assert found.n == 12
    assert float(found.mean[-1].abs()) < 0.5
    assert len({tuple(step.tolist()) for step in found.correlation}) == 3


def test_input_alone_does_not_change():
    """Catches a check that reports low correlations whatever it is given: a random ranking ignores the weights."""
    found = randomized_weights_correlation(model(), rows(), "random")
    assert found.mean.tolist() == [1.0]
    assert found.undefined.tolist() == [0]


def test_every_parameter_of_a_transformer_is_replaced():
    """Catches tokens and position embeddings, which have no `reset_parameters`, keeping their trained values."""
    judged = vit()
    nn.init.normal_(judged.vit.embeddings.cls_token)
    before = copy.deepcopy(judged.state_dict())
    torch.manual_seed(1)
    for module in judged.modules():
        reinitialize(module)
    same = [name for name, value in judged.named_parameters() if torch.equal(value, before[name])]
    # Normalisation layers start from ones and zeros, where this model still is; linear layers and tokens are random.
    assert all("layernorm" in name for name in same)
    found = randomized_weights_correlation(vit(), rows(channels=3))
    assert float(found.mean[0]) < 0.9


def test_maps_of_nan_logits_are_counted_as_undefined():
    """Catches a NaN map that is ranked, and so agrees or disagrees with one that is whole."""

    class Standardising(nn.Sequential):
        def forward(self, images):
            return super().forward(images / images.std(dim=(1, 2, 3), keepdim=True))

    data = rows(4)
    data[2] = {"pixel_values": torch.zeros(1, 8, 8), "labels": 0}
    found = randomized_weights_correlation(Standardising(*model()), data)
    assert found.correlation.isnan().tolist() == [[False, False, True, False]]
    assert (found.undefined.tolist(), bool(found.mean.isfinite().all())) == ([1], True)


def test_bad_arguments():
    """Catches an unknown mode and a model that has nothing to randomise."""
    with pytest.raises(ValueError, match="randomization must be one of"):
        randomized_weights_correlation(model(), rows(), randomization="independent")
    with pytest.raises(ValueError, match="has no weights"):
        randomized_weights_correlation(nn.Flatten(), [{"pixel_values": torch.ones(1, 2, 2), "labels": 0}], "random")
