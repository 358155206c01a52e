"""The matrix of training features holds, and what is found for one cell alone."""

import gc
from itertools import pairwise

import datasets
import pytest
import torch
from conftest import TinyImages, build, largest_difference

pytest.register_assert_rewrite("matrix", "matrix_row", "plain_training")

from matrix import FEATURES, Note, markdown, search_two  # noqa: E402
from matrix_row import MODELS, Row  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from smoot_hf import SmootTrainer  # noqa: E402

NO_ATTENTION = {"ConvNeXt", "ResNet", "MobileNetV2", "paper's CNN"}
NO_CHECKPOINTING = NO_ATTENTION
# The cells that are no plain yes. Nothing else may be left out.
NOTED = {
    **{("SDPA = eager attention", name): "–" for name in NO_ATTENTION},
    **{("gradient checkpointing", name): "–" for name in NO_CHECKPOINTING},
    ("LoRA (PEFT), saved and resumed", "MobileNetV2"): "✓",
    **({} if torch.cuda.is_available() else {("fp16", name): "GPU" for name in MODELS}),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    # peft 0.21 asks transformers 5.24 by the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    # Trials and attempts collect garbage: what the libraries made on import need not be looked at every time.
    gc.collect()
    gc.freeze()
    yield {name: Row(name, tmp_path_factory.mktemp("row")) for name in MODELS}
    gc.unfreeze()


COMPILED_QUICKLY = {"ViT", "paper's CNN"}
CELLS = [
    pytest.param(
        name,
        feature,
        marks=[pytest.mark.slow] if feature == "`torch_compile`" and name not in COMPILED_QUICKLY else [],
    )
    for name in MODELS
    for feature in FEATURES
]


@pytest.mark.parametrize(("name", "feature"), CELLS)
def test_cell(name, feature, rows):
    """Catches a feature that trains something else with SMOOT; each cell says what it is compared with."""
    note = FEATURES[feature](rows[name])
    assert (note.mark if note else None) == NOTED.get((feature, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_inductor_trains_the_eager_weights(name, rows, monkeypatch):
    """Catches a kernel fused wrongly, and dropout drawn by another generator: the model has none here."""
    monkeypatch.setattr("matrix.BACKEND", "inductor")
    monkeypatch.setitem(MODELS, name, {"ViT": lambda: build("vit"), "ResNet": MODELS["ResNet"]}[name])
    FEATURES["`torch_compile`"](Row(name, rows[name].folder))


def test_a_cell_that_does_not_hold_fails(rows, monkeypatch):
    """The cells can fail: by weights that differ in the last digits, by a K, by a step that is not the equations'."""
    row = rows["ViT"]
    other = row.run(kl_weight=0.9)
    with pytest.raises(AssertionError):
        other.require_same(row.baseline, tolerance=1e-5)
    with pytest.raises(AssertionError):
        other.require_same(row.baseline)
    other.trainer.args.kl_weight = 1.0
    with pytest.raises(AssertionError):
        other.require_plain(row.model())
    still = row.run(step_size=0)
    with pytest.raises(AssertionError):
        still.require_sound()
    assert largest_difference(other.weights, row.baseline.weights) < 0.1


class ScaledTrainer(SmootTrainer):
    """With the loss scaler of fp16, on a CPU, as each accelerator of a search has one; the first gradients overflow."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-16)


def test_k_stays_where_the_scaler_of_a_trial_skips_the_step(rows):
    """Catches the scaler of the accelerator that a search has left behind: K would move by steps never taken."""
    trainer = rows["ViT"].trainer(
        trainer_class=ScaledTrainer,
        trainer_kwargs={"model_init": lambda: build("vit"), "eval_dataset": TinyImages(8)},
        max_steps=12,
        step_size=1e4,
        rounding="floor",
        mask_ratio_min=0.0,
        mask_ratio_max=1.0,
    )
    states = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            states.append((trainer.model.classifier.weight.detach().clone(), trainer.mask_budget.k))

    trainer.add_callback(Watch())
    search_two(trainer, "seed", [1, 2])
    for trial in (states[:12], states[12:]):
        pairs = list(pairwise(trial))
        stepped = [not torch.equal(one[0], other[0]) for one, other in pairs]
        assert [not torch.equal(one[1], other[1]) for one, other in pairs] == stepped
        assert True in stepped
        assert False in stepped


def test_a_search_over_the_method_gives_each_trial_its_own_k(rows):
    """Catches K of a smoot trial logged, and saved, with one of standard training; and K that a smoot trial lacks."""
    trainer = rows["ViT"].trainer(trainer_kwargs={"model_init": lambda: build("vit"), "eval_dataset": TinyImages(8)})
    seen = []

    class Watch(TrainerCallback):
        def on_train_end(self, args, *_, **__):
            seen.append((args.method, trainer.mask_budget))

    trainer.add_callback(Watch())
    search_two(trainer, "method", ["smoot", "standard"])
    search_two(trainer, "method", ["sgt", "standard"])
    assert sorted(method for method, _ in seen) == ["sgt", "smoot", "standard", "standard"]
    for method, budget in seen:
        assert (budget is None) == (method == "standard")
        if budget is not None:
            assert (budget.k_min < budget.k_max) == (method == "smoot")


@pytest.mark.parametrize("through_init", [False, True])
def test_k_goes_on_with_the_weights_into_a_smaller_batch(through_init, rows):
    """A `model_init` is not called again for the second attempt: catches a K afresh beside weights that are not."""
    row, made = rows["ViT"], []

    def init():
        made.append(row.model())
        passes = []

        def run_out_of_memory(*_):
            passes.append(1)
            if len(passes) == 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

        made[-1].register_forward_pre_hook(run_out_of_memory)
        return made[-1]

    if through_init:
        run = row.run(trainer_kwargs={"model_init": init}, auto_find_batch_size=True)
        assert len(made) == 2
    else:
        run = row.run(init(), auto_find_batch_size=True)
    assert len(run.calls[0]["sample_idx"].tolist()) == 8
    run.require_plain(row.model(), breaks=(1,))


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance", "sequential"])
def test_sampling_strategies_of_the_trainer(strategy, rows):
    """Catches K of another row under a sampler, or a batch sampler, of the Trainer's own; and a length column lost."""
    data = TinyImages()
    lengths = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist()
    columns = {"pixel_values": [image.tolist() for image in data.images], "labels": data.labels, "length": lengths}
    table = datasets.Dataset.from_dict(columns).with_format("torch")
    row = rows["ViT"]
    run = row.run(trainer_kwargs={"train_dataset": table}, train_sampling_strategy=strategy).require_sound()
    for call in run.calls:
        torch.testing.assert_close(call["images"], data.images[call["sample_idx"]])
    visited = torch.cat([call["sample_idx"] for call in run.calls[:3]]).tolist()
    assert sorted(visited) == list(range(24))
    if strategy == "sequential":
        assert visited == list(range(24))
    if strategy == "group_by_length":
        assert all(lengths[a] >= lengths[b] for a, b in pairwise(visited[9:16]))
    run.trainer.train_dataset = data
    run.require_plain(row.model())


def test_the_table_has_every_cell_and_every_reason_once():
    """Catches a cell without a mark, and a footnote that belongs to another."""
    marks = dict.fromkeys((feature, name) for feature in FEATURES for name in MODELS)
    marks["bf16", "ViT"], marks["fp16", "ViT"], marks["bf16", "DeiT"] = Note("–", "a"), Note("GPU", "b"), Note("–", "a")
    table, notes = markdown(marks).split("\n\n")
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert {len(line) for line in lines[2:]} == {len(MODELS) + 1}
    assert len(lines) == len(FEATURES) + 2
    assert lines[3][1:3] == ["– [1]", "– [1]"]
    assert lines[4][1] == "GPU [2]"
    assert notes == "1. a.\n2. b."
