"""The benchmarks measure what they say they do. No test looks at a time."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from conftest import TinyImages, build
from PIL import Image
from torch.nn import functional as F

from smoot_hf import MaskBudget
from smoot_hf import functional as SF
from smoot_hf.models.logits import LogitsModel

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Makes the benchmarks importable, as they import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_the_published_step_masks_the_lowest_positions_of_the_eval_gradient(benchmarks):
    """Catches another ranking, another number of pixels, or noise outside an image's range: another contender."""
    from published_sgt import masked_images

    data = TinyImages()
    images, labels = data.images[:4], torch.tensor(data.labels[:4])
    model = LogitsModel(build("cnn")).eval()
    masked = masked_images(model, images.clone().requires_grad_(), labels, 20)
    saliency = Saliency(model).attribute(images.clone().requires_grad_(), labels, abs=False).mean(1)
    changed = (masked != images).flatten(2)
    for row in range(4):
        lowest = saliency[row].flatten().topk(20, largest=False).indices
        assert changed[row].all(dim=0).nonzero().flatten().tolist() == sorted(lowest.tolist())
        assert changed[row].any(dim=0).sum() == 20
        assert images[row].min() <= masked[row].min()
        assert masked[row].max() <= images[row].max()


def test_the_published_loss_is_cross_entropy_and_kl(benchmarks, monkeypatch):
    """Catches a contender that does less than the published one: both views in train mode, KL(clean, masked)."""
    import published_sgt

    data = TinyImages()
    images, labels = data.images[:4], torch.tensor(data.labels[:4])
    model = build("resnet").train()
    monkeypatch.setattr(published_sgt, "masked_images", lambda model, images, *_: images.detach() + 1)
    loss, _ = published_sgt.published_sgt_loss(model, images, labels, 0.5)
    clean, masked = (model(pixel_values=x).logits for x in (images, images + 1))
    kl = (clean.softmax(1) * (clean.log_softmax(1) - masked.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(loss(), F.cross_entropy(clean, labels) + kl)
    assert model.training


def test_peak_memory_counts_what_is_alive_at_once(benchmarks):
    """Catches views and in-place results counted as new, and tensors counted after they are gone."""
    from live_memory import peak_bytes

    outside = torch.zeros(1000)

    def run():
        kept = torch.ones(1000)  # 4,000 bytes
        for _ in range(5):
            kept.view(10, 100).add_(outside.view(10, 100))
            torch.zeros(500)  # 2,000 bytes, gone at once
        outside.mul_(2)

    assert peak_bytes(run, torch.device("cpu")) == 6000


def test_every_way_of_a_step_runs_and_is_written_down(benchmarks, monkeypatch, tmp_path, capsys):
    """Catches a benchmark that no longer runs, and a line that is missing from its table or its JSON."""
    import training_step

    output = tmp_path / "step.json"
    arguments = ["--models", "cnn", "--batch", "2", "--steps", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["training_step.py", *arguments])
    training_step.main()
    ways = json.loads(output.read_text())["models"]["cnn"]["ways"]
    assert list(ways) == ["standard", "naive", "published", "sgt", "smoot", "masked", "share", "masking"]
    assert ways["standard"]["ratio"] == 1
    printed = capsys.readouterr().out
    assert all(f"\n  {way} " in printed for way in ways)


def test_the_parts_of_a_step_are_all_measured(benchmarks, monkeypatch, tmp_path, capsys):
    """Catches a part that is missing from the table or the JSON, and a step that is no longer `masked_step`."""
    import step_parts

    output = tmp_path / "parts.json"
    monkeypatch.setattr(sys, "argv", ["step_parts.py", "--batch", "2", "--steps", "1", "--output", str(output)])
    step_parts.main()
    results = json.loads(output.read_text())["results"]
    assert list(results["standard"]) == ["forward", "backward", "optimizer", "sum"]
    masking = ["ranking", "noise", "fill"]
    ends = ["masked forward", "backward", "optimizer", "sum"]
    assert list(results["smoot"]) == ["clean forward", "saliency", *masking, *ends]
    printed = capsys.readouterr().out
    assert all(f"\n  {part} " in printed for parts in results.values() for part in parts)
    another = SimpleNamespace(ce=torch.ones(1), kl=torch.ones(1))
    monkeypatch.setattr(step_parts, "masked_step", lambda *_, **__: another)
    with pytest.raises(AssertionError, match="masked_step"):
        step_parts.make_losses("cnn", 1, torch.device("cpu"), False)


def test_ranking_by_cells_runs_beside_pixels(benchmarks, monkeypatch, tmp_path, capsys):
    """Catches a comparison in which one of the two masks nothing, or is missing from the table or the JSON."""
    import ranking

    monkeypatch.setattr(ranking, "SIZES", {ranking.LARGEST: (2, 9, 7)})
    output = tmp_path / "ranking.json"
    monkeypatch.setattr(sys, "argv", ["ranking.py", "--cell", "4", "--turns", "1", "--output", str(output)])
    ranking.main()
    results = json.loads(output.read_text())["results"]
    assert {name.split(", ")[-1] for name in results} == {"mask", "masking"}
    assert all(list(ways) == ["pixels", "cells of 4"] for ways in results.values())
    assert "\ncells of 4 " in capsys.readouterr().out
    saliency, k = torch.randn(2, 9, 7), torch.tensor([21, 42])
    way = ranking.ways_with_cells(saliency, 4)["mask"]["cells of 4"]
    # A third and two thirds of the six cells.
    assert [len(found) for found in (SF.cell_sum(way(saliency, k)[row], 4).nonzero() for row in (0, 1))] == [2, 4]


def test_the_planted_photographs_say_where_their_evidence_is(benchmarks, monkeypatch, tmp_path):
    """Fault: a mask of another image, or beside the object: every model would be misjudged."""
    import photographs

    discs = {place for place, *_ in photographs.DISCS.values()}
    monkeypatch.setattr(photographs, "COUNTS", {"crops": {}, "planted": {"train": 1, "test": 4}})
    monkeypatch.setattr(photographs, "CROPS", {"train": {}, "test": {}})
    monkeypatch.setattr(
        photographs, "photograph", lambda place: Image.new("RGB", (500, 400), "white" if place in discs else "black")
    )
    photographs.make(tmp_path)
    images = photographs.test_images(tmp_path)
    batch = images.__getitems__(range(len(images)))
    assert batch["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.label_names == ["cat", "coffee", "flower"]
    is_object = batch["pixel_values"].float().mean(dim=1) > 127
    evidence = batch["evidence"]
    # The edge of a disc is blended with what is behind it: it is evidence, and may be dark.
    assert not (is_object & ~evidence).any()
    assert ((evidence & ~is_object).flatten(1).sum(1) < 0.1 * evidence.flatten(1).sum(1)).all()
    # No two of them at one place.
    assert len({tuple(mask.flatten().nonzero()[0].tolist()) for mask in evidence}) == 12
    margins = np.pad(np.zeros((192, 192), dtype=bool), photographs.MARGIN, constant_values=True)
    assert not evidence[:, torch.from_numpy(margins)].any()


def test_the_agreement_of_budgets_is_the_rank_correlation_of_k(benchmarks, tmp_path, saved_run, capsys):
    """Catches runs of other images, of one K, and a correlation of something else than K."""
    from budget_agreement import correlations, main

    def budget(values, num_samples=6):
        made = MaskBudget(num_samples, (8, 8), 0.5, 0.0, 1.0, dataset_fingerprint="same")
        made.update(torch.arange(num_samples), torch.tensor(values) / 10, 10)
        return made

    rising, falling = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    assert correlations([budget(rising), budget(rising), budget(falling)]) == pytest.approx([1.0, -1.0, -1.0])
    with pytest.raises(ValueError, match="trained on other images"):
        correlations([budget(rising), budget(rising[:5], 5)])
    with pytest.raises(ValueError, match="one K for all images"):
        correlations([budget(rising), budget([0.0] * 6)])
    with pytest.raises(SystemExit):
        main([str(saved_run)])
    assert "name at least two runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(saved_run)])
    assert "holds no checkpoint with mask_budget.safetensors" in capsys.readouterr().err
