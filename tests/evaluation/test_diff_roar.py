"""DiffROAR: a map that points at the evidence is told from one that does not, by a judge that is the same for both."""

import pytest
import torch
from conftest import build

from smoot_hf.data.planted_evidence import plant_block
from smoot_hf.evaluation.diff_roar import diff_roar, only


class Looks(torch.nn.Module):
    """A model whose gradient lies on one side of the middle row of every image, whatever it shows."""

    def __init__(self, above):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.above = above

    def forward(self, images):
        half = images.shape[2] // 2
        part = images[:, :, :half] if self.above else images[:, :, half:]
        score = self.weight * part.sum(dim=(1, 2, 3))
        return torch.stack([score, *[-score] * 3], dim=1)


def block_images():
    """Two classes of objects, light and dark, always above the null block."""
    labels = torch.arange(64) % 2
    pixels = (100 + 100 * labels)[:, None, None, None].expand(-1, 1, 6, 6).to(torch.uint8)
    return plant_block(pixels, labels, seed=0, is_fixed=True).pixel_values / 64 - 1, labels


def train_judge(images, labels):
    network = build("cnn", image_size=[12, 6], num_channels=1, num_labels=2).eval()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(pixel_values=images).logits, labels).backward()
        optimizer.step()
    return network


def test_the_sign_says_where_the_map_points():
    """Catches top and bottom mixed up, images that are not cut, and a judge that sees the test set whole."""
    data = block_images()
    right = diff_roar(Looks(above=True), train_judge, data, data, kept=0.5)
    wrong = diff_roar(Looks(above=False), train_judge, data, data, kept=0.5)
    # Half of the positions are one whole block: the object's tells the class, the null block nothing.
    assert (right.top, right.bottom, right.difference) == (100.0, 50.0, 50.0)
    assert (wrong.top, wrong.bottom, wrong.difference) == (50.0, 100.0, -50.0)


def test_what_is_left_is_the_share_that_was_asked_for():
    """Catches the complement, and a share of the channels in place of the positions."""
    images, maps = torch.ones(2, 3, 4, 5), torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    for order, largest in (("most_salient_first", True), ("least_salient_first", False)):
        left = only(images, maps, 0.3, order)
        assert left.sum(dim=(1, 2, 3)).tolist() == [18.0, 18.0]
        chosen = maps.flatten(1).topk(6, largest=largest).indices
        assert (left[:, 0].flatten(1).gather(1, chosen) == 1).all()


def test_a_random_map_is_the_control():
    """Catches a control that is the model's own map."""
    data, seen = block_images(), []

    def judge(images, labels):
        seen.append(images)
        return Looks(above=True)

    diff_roar(Looks(above=True), judge, data, data, kept=0.5, method="random")
    is_left = [(images != 0).any(dim=1) for images in seen]
    # Both blocks keep about half of their 36 positions, and what one training is shown the other is not.
    assert all(10 < count < 26 for count in is_left[0][:, :6].sum(dim=(1, 2)).tolist())
    assert torch.equal(is_left[0], ~is_left[1])


def test_bad_arguments_are_refused():
    """Catches a percentage given for a fraction."""
    data = block_images()
    with pytest.raises(ValueError, match=r"kept must be a fraction in \(0, 1\), got 50"):
        diff_roar(Looks(True), train_judge, data, data, kept=50)
