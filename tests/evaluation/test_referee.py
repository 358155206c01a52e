"""The referee matrix: whose map ranks and who is asked are not mixed up, and the diagonal is the plain measurement."""

import pytest
import torch
from test_faithfulness import rows, small_model
from torch import nn

from smoot_hf.evaluation import RefereeMatrix, compare_faithfulness, evaluate_faithfulness, referee_matrix
from smoot_hf.evaluation.attributions import attribute
from smoot_hf.models.logits import LogitsModel


class Half(nn.Module):
    """Class 0 where the left (or the right) half of the image is bright, else class 1."""

    def __init__(self, is_left):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.columns = slice(0, 3) if is_left else slice(3, 6)

    def forward(self, images):
        total = self.weight * images[:, :, :, self.columns].sum(dim=(1, 2, 3))
        return torch.stack([total, -total], dim=1)


def bright(n=8):
    images = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    images[:, :, 0, 0] = -0.5  # the fill
    return [{"pixel_values": image, "labels": 0} for image in images]


def other_model():
    model = small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_the_diagonal_is_the_plain_measurement():
    """Catches another convention, seed or set of images than `evaluate_faithfulness` takes: equal to the last bit."""
    models = {"a": small_model(), "b": other_model()}
    matrix = referee_matrix(models, rows(), convention="paper", seed=3)
    for i, (name, model) in enumerate(models.items()):
        alone = evaluate_faithfulness(model, rows(), convention="paper", seed=3)
        judged = matrix.measured[name][name]
        assert torch.equal(judged.deletion.sample_auc, alone.deletion.sample_auc)
        assert torch.equal(judged.least_salient_first.sample_auc, alone.least_salient_first.sample_auc)
        assert matrix.deletion_auc[i, i] == alone.deletion_auc
        assert matrix.gap[i, i] == alone.gap


@pytest.mark.parametrize("attribution", ["gradient", "input_x_gradient"])
def test_the_others_rank_by_one_model_and_ask_another(attribution):
    """Catches maps of the referee; the same maps are handed over as an attribution of the caller's own."""
    asked, of = small_model(), other_model()
    found = evaluate_faithfulness(asked, rows(), attribution, ranked_by=of)

    def maps(_, images, target):
        of.eval()
        return attribute(LogitsModel(of), images, target, torch.arange(len(images)), method=attribution)

    expected = evaluate_faithfulness(asked, rows(), maps)
    assert torch.equal(found.deletion.sample_auc, expected.deletion.sample_auc)
    assert found.accuracy == expected.accuracy
    assert not torch.equal(
        found.deletion.sample_auc, evaluate_faithfulness(asked, rows(), attribution).deletion.sample_auc
    )


def test_rows_are_maps_and_columns_are_referees():
    """Catches a matrix that is turned. Of two models of one half each, neither minds the loss of the other's half."""
    matrix = referee_matrix({"left": Half(True), "right": Half(False), "left too": Half(True)}, bright())
    assert matrix.names == ("left", "right", "left too")
    for of, of_half in enumerate((0, 1, 0)):
        for asked, asked_half in enumerate((0, 1, 0)):
            assert (matrix.gap[of, asked] > 0) == (of_half == asked_half)
    skewed = RefereeMatrix(("a", "b"), {"a": matrix.measured["left"], "b": {}})
    with pytest.raises(KeyError):
        _ = skewed.gap


def test_the_model_that_ranks_is_left_as_it_was():
    """Catches a ranker left in eval mode, or one that ranks with its dropout on."""
    of = other_model().train()
    first, second = (evaluate_faithfulness(small_model(), rows(), ranked_by=of) for _ in range(2))
    assert torch.equal(first.deletion.sample_auc, second.deletion.sample_auc)
    assert all(module.training for module in of.modules())
    assert all(parameter.grad is None for parameter in of.parameters())


def test_nothing_to_compare_is_one_clear_error():
    """Catches an empty matrix, and a model of fewer classes that fails deep inside torch when it ranks."""
    with pytest.raises(ValueError, match="models must hold at least one model"):
        referee_matrix({}, rows())
    with pytest.raises(ValueError, match="labels must be classes of the model, 0 to 1, got 0 to 3"):
        referee_matrix({"few": Half(True), "all": small_model()}, rows())


def test_gaps_are_compared_image_by_image():
    """Catches the wrong sign, and bounds that a gap of -100 to 100 each breaks."""
    a, b = (evaluate_faithfulness(model, bright()) for model in (Half(True), Half(False)))
    paired = compare_faithfulness(a, b, "gap")
    assert paired.difference == pytest.approx(a.gap - b.gap)
    without = evaluate_faithfulness(Half(True), bright(), curves=())
    with pytest.raises(ValueError, match=r"b holds no curve 'gap' \(of least salient first\)"):
        compare_faithfulness(a, without, "gap")
