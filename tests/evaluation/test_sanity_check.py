"""Sanity check: the correlation equals SciPy's, and random weights do change a map."""

import copy
import math
import warnings

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from smoot_hf.evaluation import sanity_check
from smoot_hf.evaluation.sanity_check import randomized_weights_correlation, rank_correlation, reinitialize


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


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.uint64, torch.int64, torch.float16, torch.bfloat16], ids=str
)
def test_rank_correlation_of_every_dtype(dtype):
    """Fault: a type that torch cannot search or negate, or integers above 2**53 that become one number."""
    high = torch.iinfo(dtype).max if dtype in (torch.uint8, torch.uint64, torch.int64) else 1
    pool = torch.tensor([0, 0 if high == 1 else high - 1, high], dtype=dtype)
    first, second = [0, 1, 2, 2, 1, 0, 2, 0], [0, 1, 2, 2, 0, 2, 2, 1]
    # The same order in small numbers, which SciPy does not round.
    small = [0, 0, 2] if high == 1 else [0, 1, 2]
    expected = spearmanr([small[i] for i in first], [small[i] for i in second]).statistic
    a, b = (pool[torch.tensor(chosen)].reshape(1, 2, 4) for chosen in (first, second))
    assert float(rank_correlation(a, b)) == pytest.approx(expected, abs=1e-12)


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


class Scaled(nn.Linear):
    """A subclass with a further parameter and a further average, of which `reset_parameters` knows nothing."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("average", torch.rand(sizes[1]) + 1)

    def forward(self, x):
        return super().forward(x) * self.scale / self.average


class Bare(nn.Module):
    """Parameters without `reset_parameters`: zeros, one number, a table, complex numbers."""

    def __init__(self, size):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(size))
        self.temperature = nn.Parameter(torch.tensor([0.7]))
        self.table = nn.ParameterList([torch.randn(size), torch.randn(size)])
        self.phase = nn.Parameter(torch.randn(size, dtype=torch.complex64))

    def forward(self, x):
        return (x * self.table[0] + self.table[1] + self.token) * self.temperature + self.phase.real


class Partial(nn.Linear):
    """Its `reset_parameters` writes a part of its weights, and reads what they were."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        nn.init.normal_(self.weight), nn.init.normal_(self.bias)

    def reset_parameters(self):
        with torch.no_grad():
            self.weight[0].normal_()
            self.bias.mul_(0.5)


class Asking(nn.Linear):
    """Its `reset_parameters` takes arguments, and does without."""

    def reset_parameters(self, gain=None, *, seed=None):
        super().reset_parameters()


class Demanding(Bare):
    def reset_parameters(self, gain):
        raise AssertionError("called without what it asks for")


class Fixed(nn.Linear):
    """Its `reset_parameters` writes what it held before."""

    def reset_parameters(self):
        with torch.no_grad():
            self.weight.copy_(torch.arange(self.weight.numel()).reshape(self.weight.shape) / 1000)
            self.bias.copy_(torch.arange(len(self.bias)) / 10)


class Pixels(nn.Module):
    """A buffer that no checkpoint keeps, and one of integers: nothing is learned in them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((16,), 0.25), persistent=False)
        self.register_buffer("order", torch.arange(16))
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, x):
        return (x - self.mean)[:, self.order] * self.weight


def with_old_norm(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(nn.Linear(16, 16))


# After a training, in which every value has moved. Some layers cannot do without others before them.
LAYERS = {
    "linear": lambda: nn.Linear(16, 16),
    "subclass with further parameters": lambda: Scaled(16, 16),
    "bare parameters": lambda: Bare(16),
    "reset_parameters writes a part": lambda: Partial(16, 16),
    "reset_parameters with options": lambda: Asking(16, 16),
    "reset_parameters asks for arguments": lambda: Demanding(16),
    "reset_parameters writes what was there": lambda: Fixed(16, 16),
    "old weight norm": lambda: with_old_norm(nn.utils.weight_norm),
    "new weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
    "old spectral norm": lambda: with_old_norm(nn.utils.spectral_norm),
    "new spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)),
    "batch norm": lambda: nn.BatchNorm1d(16),
    "batch norm without weights": lambda: nn.BatchNorm1d(16, affine=False),
    "frozen batch norm": lambda: nn.Sequential(
        nn.Unflatten(1, (16, 1, 1)), torchvision.ops.FrozenBatchNorm2d(16), nn.Flatten()
    ),
    "layer norm": lambda: nn.LayerNorm(16),
    "PReLU": lambda: nn.PReLU(),
    "fixed buffers": lambda: Pixels(),
}


def trained(layer):
    """A classifier with the layer in its middle, every learned value moved from where it started."""
    torch.manual_seed(0)
    judged = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), LAYERS[layer](), nn.Linear(16, 3)).train()
    optimizer = torch.optim.SGD(judged.parameters(), lr=0.3)
    for _ in range(3):
        loss = nn.functional.cross_entropy(judged(torch.randn(8, 1, 8, 8)), torch.arange(8) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in judged.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.running_var.uniform_(0.5, 2), module.running_mean.normal_(), module.weight.normal_()
            module.bias.normal_()
    if layer == "reset_parameters writes what was there":
        judged[3].reset_parameters()
    return judged


def randomized_by(judged, monkeypatch, **options):
    """The copy of the model that the check has replaced the weights of, with what it found."""
    copies, copied = [], sanity_check._copied

    def watched(model):
        copies.append(copied(model))
        return copies[-1]

    monkeypatch.setattr(sanity_check, "_copied", watched)
    found = randomized_weights_correlation(judged, rows(), **options)
    return copies[0], found


@pytest.mark.parametrize("randomization", ["full", "cascading"])
@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_learned_is_left_after_all_weights_are_random(layer, randomization, monkeypatch):
    """Fault: what a module's `reset_parameters` does not know keeps its trained values, and a method that shows what
    was learned fails the check.
    """
    judged = trained(layer)
    before = {name: value.clone() for name, value in judged.state_dict().items()}
    new, found = randomized_by(judged, monkeypatch, randomization=randomization)
    same = [n for n, value in new.state_dict().items() if value.is_floating_point() and torch.equal(value, before[n])]
    assert same == []
    assert all(bool(value.isfinite().all()) for value in new.state_dict().values())
    assert all(torch.equal(value, before[name]) for name, value in judged.state_dict().items())
    assert int(found.undefined[-1]) == 0
    assert all(bool((value >= 0).all()) for name, value in new.state_dict().items() if name.endswith("running_var"))
    if layer == "fixed buffers":
        assert torch.equal(new[3].mean, judged[3].mean)
        assert torch.equal(new[3].order, judged[3].order)


def test_batch_norms_statistics_start_anew(monkeypatch):
    """Fault: running statistics, learned from the data as weights are, survive; or noise takes the place of the 0 and 1
    that an untrained batch norm has.
    """
    new, _ = randomized_by(trained("batch norm"), monkeypatch)
    assert torch.equal(new[3].running_mean, torch.zeros(16))
    assert torch.equal(new[3].running_var, torch.ones(16))
    assert int(new[3].num_batches_tracked) == 0
    assert torch.equal(new[3].weight, torch.ones(16))


class Guarded(nn.Module):
    """Writes the trained weights of the layer before it back."""

    def __init__(self, layer):
        super().__init__()
        self.layers = [layer, layer.weight.detach().clone()]
        self.weight = nn.Parameter(torch.ones(3))

    def reset_parameters(self):
        with torch.no_grad():
            self.weight.normal_()
            self.layers[0].weight.copy_(self.layers[1])

    def forward(self, x):
        return x * self.weight


def test_what_comes_back_as_it_was_or_cannot_be_drawn_is_named():
    """Fault: a correlation with "random" weights that are the trained ones, without a word."""
    layer = nn.Linear(64, 3)
    with pytest.raises(ValueError, match=r"1\.weight of a Linear is as it was after all weights were replaced"):
        randomized_weights_correlation(nn.Sequential(nn.Flatten(), layer, Guarded(layer)), rows())
    quantised = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    quantised[1].codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Linear\.codes is of torch\.uint8: such weights cannot be drawn anew"):
        randomized_weights_correlation(quantised, rows())


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
