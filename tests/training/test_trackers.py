"""What trackers show: read back from the files that they write."""

import io
import json
import re
import time

import numpy as np
import pytest
import torch
from conftest import CHANNELS, SIZE, TinyImages, build, parameters
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from smoot_hf import InputPipeline, MaskBudget
from smoot_hf.models.state import untouched
from smoot_hf.training.trackers import Tracking, histogram_of, saliency_grid

# Large steps of K, so that the histogram has a shape; an evaluation after every second step.
MOVING = {"step_size": 2000.0, "eval_strategy": "steps", "eval_steps": 2}


class KeepBudget(TrainerCallback):
    """K of every sample at each evaluation."""

    def __init__(self):
        self.k = {}

    def on_evaluate(self, args, state, control, **kwargs):
        self.k[state.global_step] = self.trainer.mask_budget.k.numpy()


@pytest.fixture
def tracked(quick_trainer, tmp_path, monkeypatch):
    """A training reported to TensorBoard: the trainer, and K at each evaluation."""
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))

    def make(model="vit", train_dataset=None, trainer_kwargs=None, **overrides):
        keep = KeepBudget()
        others = {"eval_dataset": TinyImages(13), "callbacks": [keep]} | (trainer_kwargs or {})
        settings = MOVING | {"report_to": ["tensorboard"]} | overrides
        trainer = quick_trainer(model, train_dataset, trainer_kwargs=others, **settings)
        keep.trainer = trainer
        trainer.train()
        return trainer, keep.k

    return make


@pytest.fixture
def events(tmp_path):
    """What TensorBoard reads from the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read():
        accumulator = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0, "histograms": 0})
        return accumulator.Reload()

    return read


def picture_of(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def grid_of(trainer, rows):
    """The saliency grid of some rows of the evaluation set, by autograd alone."""
    batch = [trainer.eval_dataset[row] for row in rows]
    images = torch.stack([sample["pixel_values"] for sample in batch]).requires_grad_()
    labels = torch.tensor([sample["labels"] for sample in batch])
    with untouched(trainer.model):
        trainer.model(pixel_values=images).logits.gather(1, labels[:, None]).sum().backward()
    low, high = (getattr(images.detach(), name)(dim=(1, 2, 3), keepdim=True) for name in ("amin", "amax"))
    return saliency_grid((images.detach() - low) / (high - low), images.grad.abs().mean(dim=1))


def test_tensorboard_shows_k_and_saliency_once_per_evaluation(tracked, events):
    """Fault: a histogram of another moment or with values between two K, and saliency of other images or weights."""
    trainer, k_at = tracked()
    read = events()
    assert {"train/k_min", "train/k_median", "train/k_max"} <= set(read.Tags()["scalars"])
    histograms = read.Histograms("train/k")
    assert [event.step for event in histograms] == [2, 4, 6] == list(k_at)
    for event in histograms:
        value, k = event.histogram_value, k_at[event.step]
        lowest, highest = k.min(), k.max()
        assert value.bucket_limit == [edge - 0.5 for edge in range(lowest, highest + 2)]
        assert value.bucket == [0, *np.bincount(k - lowest)]
        assert (value.num, value.sum, value.sum_squares) == (len(k), k.sum(), (k.astype(int) ** 2).sum())
        assert (value.min, value.max) == (lowest - 0.5, highest + 0.5)
    assert len(set(k_at[6])) > 3
    scalars = {name: read.Scalars(f"train/{name}")[-1].value for name in ("k_min", "k_median", "k_max")}
    assert scalars == {"k_min": k_at[6].min(), "k_median": np.median(k_at[6]), "k_max": k_at[6].max()}

    images = read.Images("eval/saliency")
    assert [event.step for event in images] == [2, 4, 6]
    # Eight rows spread over thirteen; the weights have not changed since the last evaluation.
    expected = grid_of(trainer, [0, 1, 3, 4, 6, 8, 9, 11]).permute(1, 2, 0).numpy()
    shown = picture_of(images[-1])
    assert shown.shape == expected.shape == (2 * 66 + 2, 8 * 66 + 2, 3)
    # Two orders of the same sums may round to neighbouring grey values.
    assert np.abs(shown.astype(int) - expected.astype(int)).max() <= 1
    assert not np.array_equal(picture_of(images[0])[68:], shown[68:])
    assert np.array_equal(picture_of(images[0])[:66], shown[:66])


class Augmented(TinyImages):
    """Draws from every global generator for each row, as transforms do."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        noise = torch.randn(()) + np.random.rand()  # noqa: NPY002
        return {**sample, "pixel_values": sample["pixel_values"] + 0.1 * noise}


def test_tracking_changes_nothing(tracked):
    """Fault: a batch norm or dropout left in eval mode, gradients left behind, random numbers used up."""
    ends = []
    for reports in ([], ["tensorboard"]):
        model, kwargs = build("vit", dropout=0.3), {"eval_dataset": Augmented(13)}
        trainer, k_at = tracked(model, Augmented(), trainer_kwargs=kwargs, report_to=reports)
        assert any(isinstance(c, Tracking) for c in trainer.callback_handler.callbacks) == bool(reports)
        ends.append((parameters(trainer), k_at[6]))
    (plain, plain_k), (tracked_, tracked_k) = ends
    assert all(torch.equal(plain[name], tracked_[name]) for name in plain)
    assert np.array_equal(plain_k, tracked_k)


class Unlabelled(TinyImages):
    """Images to predict, not to evaluate."""

    def __getitem__(self, i):
        return {"pixel_values": super().__getitem__(i)["pixel_values"]}


def test_a_grid_that_cannot_be_drawn_is_a_warning(tracked, events, monkeypatch):
    """Fault: a training that ends at its first evaluation, because its evaluation set has no labels to explain."""
    said = []
    monkeypatch.setattr("smoot_hf.training.trackers.logger.warning_once", said.append)
    tracked(trainer_kwargs={"eval_dataset": Unlabelled(13)})
    assert set(said) == {"no saliency grid for the tracker: 'labels'"}
    assert len(events().Histograms("train/k")) == 3
    assert events().Tags()["images"] == []


def test_modes_and_gradients_are_left_as_they_were(tracked, events):
    """Fault: the statistics of a frozen batch norm move after the first evaluation."""
    trainer, _ = tracked("resnet", method="standard", trainer_kwargs={"callbacks": []})
    assert "train/k" not in events().Tags()["histograms"]
    assert len(events().Images("eval/saliency")) == 3
    model = trainer.model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = torch.random.get_rng_state()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Tracking))
    callback._grid(trainer.get_eval_dataloader())
    assert model.training
    assert not frozen.training
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_pixels_of_an_input_pipeline_are_shown_as_they_are(tracked, events):
    """Fault: normalised pixels in the picture, or resized ones."""
    data = TinyImages(24)
    data.images = (data.images * 60 + 128).clamp(0, 255).to(torch.uint8)
    pipeline = InputPipeline(mean=(0.5,) * CHANNELS, std=(0.2,) * CHANNELS, size=(SIZE, SIZE))
    tracked(train_dataset=data, trainer_kwargs={"eval_dataset": data, "input_pipeline": pipeline})
    shown = picture_of(events().Images("eval/saliency")[0])
    times = 64 // SIZE
    assert np.array_equal(shown[2:66:times, 2:66:times], data.images[0].permute(1, 2, 0).numpy())
    assert np.array_equal(shown[2:66:times, 68:132:times], data.images[3].permute(1, 2, 0).numpy())


def test_several_evaluation_sets_have_a_grid_each(tracked, events):
    """Fault: one grid under the name of another set."""
    tracked(trainer_kwargs={"eval_dataset": {"a": TinyImages(5), "b": TinyImages(3)}})
    read = events()
    assert {"eval/a_saliency", "eval/b_saliency"} <= set(read.Tags()["images"])
    widths = {name: picture_of(read.Images(f"eval/{name}_saliency")[0]).shape[1] for name in "ab"}
    assert widths == {"a": 5 * 66 + 2, "b": 3 * 66 + 2}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([TinyImages()[row] for row in range(8)])


def test_a_stream_has_a_histogram_and_no_grid(tracked, events):
    """Fault: an evaluation that cannot be shown ends the training."""
    tracked(trainer_kwargs={"eval_dataset": Stream()})
    assert events().Tags()["images"] == []
    assert len(events().Histograms("train/k")) == 3


def test_the_main_process_alone_reports(tracked, tmp_path):
    """Fault: every process writes, or works in vain."""
    trainer, _ = tracked()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Tracking))
    callback.trainer = None
    trainer.state.is_world_process_zero = False
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, {}, trainer.get_eval_dataloader())


def test_many_k_share_bins_and_none_is_lost():
    """Fault: the last bin cut off where the number of K is no multiple of its width; more bins than wandb takes."""
    budget = MaskBudget(2000, (40, 40), 0.5, 0.0, 1.0)
    delta = torch.linspace(-1, 1, 2000)
    budget.update(torch.arange(2000), delta, 701)
    counts, edges = histogram_of(budget)
    k = budget.k.numpy()
    assert len(counts) <= 512
    assert counts.sum() == 2000
    assert np.array_equal(counts, np.histogram(k, edges)[0])
    assert set(np.diff(edges)) == {3}
    assert np.all(edges % 1 == 0.5)


@pytest.mark.parametrize(
    ("shape", "side"), [((1, 8, 8), (64, 64)), ((5, 20, 40), (40, 80)), ((3, 256, 192), (128, 96))]
)
def test_grids_of_any_images_are_neither_tiny_nor_huge(shape, side):
    """Fault: channels that no picture has, a map of zeros that divides by zero, megabytes per evaluation."""
    grid = saliency_grid(torch.rand(2, *shape), torch.zeros(2, *shape[1:]))
    assert grid.dtype == torch.uint8
    assert tuple(grid.shape) == (3, 2 * (side[0] + 2) + 2, 2 * (side[1] + 2) + 2)
    assert grid[:, side[0] + 4 : -2, 2 : 2 + side[1]].amax() <= 4


def test_saliency_is_dark_where_low_and_bright_where_high():
    """Fault: an inverted or channel-swapped colour map."""
    saliency = torch.tensor([[[0.0, 1.0], [2.0, 4.0]]])
    grid = saliency_grid(torch.zeros(1, 3, 2, 2), saliency)
    cells = grid[:, 68:132:32, 2:66:32].permute(1, 2, 0)
    assert cells.tolist() == [[[0, 0, 4], [81, 18, 124]], [[183, 55, 121], [252, 253, 191]]]


def one_training(quick_trainer, tracker):
    keep = KeepBudget()
    kwargs = {"eval_dataset": TinyImages(13), "callbacks": [keep]}
    trainer = quick_trainer(trainer_kwargs=kwargs, **MOVING, report_to=[tracker], run_name="a run")
    keep.trainer = trainer
    trainer.train()
    return trainer, keep.k


@pytest.mark.filterwarnings("ignore")
def test_wandb_shows_the_same(quick_trainer, tmp_path, monkeypatch):
    """Fault: a histogram or picture in a form that wandb refuses; read back from its offline files."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    _, k_at = one_training(quick_trainer, "wandb")
    wandb.finish()
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/eval/saliency_*.png"))
    assert [Image.open(path).size for path in pictures] == [(8 * 66 + 2, 2 * 66 + 2)] * 3
    counts = json.dumps(np.bincount(k_at[6] - k_at[6].min()).tolist(), separators=(",", ":"))
    # A record of protocol buffers: name, key, then the value as JSON after its length. A process of wandb's own writes
    # it, now and then after finish() has returned.
    record = re.compile(rb"train/k.{2}values.{2,4}" + re.escape(counts.encode()), re.DOTALL)
    file = next(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    deadline = time.monotonic() + 30
    while not record.search(file.read_bytes()):
        assert time.monotonic() < deadline, counts
        time.sleep(0.2)


@pytest.mark.filterwarnings("ignore")
def test_trackio_shows_the_same(quick_trainer, tmp_path, monkeypatch):
    """Fault: a histogram or picture in a form that trackio refuses; read back from its database."""
    # Read once, when trackio is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    trainer, k_at = one_training(quick_trainer, "trackio")
    logs = [log for log in SQLiteStorage.get_logs(trainer.args.project, "a run") if "train/k" in log]
    assert [log["train/global_step"] for log in logs] == [2, 4, 6]
    assert logs[-1]["train/k"]["values"] == np.bincount(k_at[6] - k_at[6].min()).tolist()
    assert logs[-1]["eval/saliency"]["_type"] == "trackio.image"
    pictures = sorted((tmp_path / "trackio").rglob("*.png"))
    assert [Image.open(path).size for path in pictures] == [(8 * 66 + 2, 2 * 66 + 2)] * 3
