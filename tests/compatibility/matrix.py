"""The matrix of training features: every kind of model with every feature, each cell a comparison that can fail.

    PYTHONPATH=tests python tests/compatibility/matrix.py --output docs/features.md
        the table as Markdown, in about two minutes on one core

A cell is a function of a `Row` (one kind of model). It raises where the feature does not hold, returns `None` where it
does, and a `Note` where the model cannot have it: the note is only returned once the stated refusal has been seen.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import optuna
import peft
import pytest
import timm
import torch
import transformers
from conftest import CLASSES, StepRecorder, largest_difference
from matrix_row import IN_FLOAT64, MODELS, RATES, Row
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import Subset, WeightedRandomSampler
from torchvision.transforms import v2
from transformers.trainer_pt_utils import LengthGroupedSampler

from smoot_hf import SmootTrainer

HEADS = {"classifier", "cls_classifier", "distillation_classifier", "head"}
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(transformers.TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)


class Note(NamedTuple):
    """Why a cell is no plain yes: `mark` stands in the table, `reason` below it."""

    mark: str
    reason: str


def plain_formulation(row):
    """Weights, K and losses are those of Equations 1 to 6, written down without a Trainer."""
    row.baseline.require_plain(row.model())


def require_close_in_half(row, precision, **overrides):
    """Losses within 3 % of fp32, 10 % behind batch statistics; the weights stay fp32."""
    if row.name in IN_FLOAT64:
        overrides["learning_rate"] = 1e-5  # as good as none: of this model the steps themselves would part
    single = {"train_dataset": row.data(torch.float32)}
    full, half = (
        row.run(row.model(torch.float32), trainer_kwargs=single, **{precision: on}, **overrides).require_sound()
        for on in (False, True)
    )
    assert half.losses == pytest.approx(full.losses, rel=0.1 if row.name in RATES else 0.03)
    assert half.losses != full.losses
    assert {weight.dtype for weight in half.weights.values()} == {torch.float32}


def bf16(row):
    """Losses near those of fp32, K within its bounds."""
    require_close_in_half(row, "bf16")


def fp16(row):
    """The same on a GPU; refused on a CPU."""
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="fp16=True is refused on a CPU"):
            row.trainer(fp16=True)
        return Note("GPU", "refused on a CPU, of which this table is: accelerate would train in float32 instead")
    require_close_in_half(row, "fp16", use_cpu=False)
    return None


def count_passes(model):
    """A list that grows by every forward pass of every module."""
    passes = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: passes.append(1))
    return passes


def checkpointing(row):
    """The gradients, hence the weights, are bit for bit those without; activations were computed again."""
    plain, recomputing = row.model(), row.model()
    if not recomputing.supports_gradient_checkpointing:
        with pytest.raises(ValueError, match=r"does not support (activation|gradient) checkpointing"):
            row.run(recomputing, **{CHECKPOINTING: True})
        return Note("–", "transformers: the architecture does not support activation checkpointing")
    once, again = count_passes(plain), count_passes(recomputing)
    row.run(recomputing, **{CHECKPOINTING: True}).require_same(row.run(plain))
    assert len(again) > len(once)
    return None


def compiled(row):
    """Compiled by AOTAutograd, the weights are those of the eager run to 1e-4 of the largest."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run = row.run(torch_compile=True, torch_compile_backend=BACKEND).require_sound()
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    run.require_same(row.baseline, tolerance=1e-4)


BACKEND = "aot_eager"


def attention(row):
    """SDPA gives the weights of eager attention to 1e-5 of the largest."""
    if row.name == "timm ViT":
        runs = []
        for fused in (True, False):
            timm.layers.set_fused_attn(fused)
            model = row.model()
            assert model.timm_model.blocks[0].attn.fused_attn is fused
            runs.append(row.run(model))
        timm.layers.set_fused_attn(True)
    else:
        if not row.model()._supports_sdpa:
            with pytest.raises(ValueError, match="does not support an attention implementation through"):
                type(row.model())._from_config(row.model().config, attn_implementation="sdpa")
            return Note("–", "no attention: transformers refuses attn_implementation='sdpa'")
        runs = []
        for name in ("sdpa", "eager"):
            model = row.model()
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            runs.append(row.run(model))
    runs[0].require_same(runs[1], tolerance=1e-5)
    return None


def label_smoothing(row):
    """Loss, weights and K are those of the equations with a smoothed cross-entropy."""
    run = row.run(label_smoothing_factor=0.2).require_sound()
    run.require_plain(row.model())
    assert largest_difference(run.weights, row.baseline.weights) > 1e-4


def require_frozen(row, is_trained):
    """What is frozen stays to the bit; the rest is as by the equations, which need a saliency for every image."""
    models = [row.model(), row.model()]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(name))
    run = row.run(models[0]).require_sound()
    changed = [name for name, start in models[1].named_parameters() if not torch.equal(run.weights[name], start)]
    assert changed
    assert all(map(is_trained, changed))
    assert len(changed) < len(run.weights)
    run.require_plain(models[1])


def first_layers_frozen(row):
    """The first half of the parameters is frozen: no gradient reaches the first layers but that of the saliency."""
    names = [name for name, _ in row.model().named_parameters()]
    require_frozen(row, lambda name: name in names[len(names) // 2 :])


def every_other_frozen(row):
    """Layers that train alternate with layers that do not."""
    names = [name for name, _ in row.model().named_parameters()]
    require_frozen(row, lambda name: name in names[::2] or is_head(name))


def is_head(name):
    return not HEADS.isdisjoint(name.split("."))


def head_alone(row):
    """Everything but the head is frozen."""
    require_frozen(row, is_head)


def lora(row):
    """Adapters and head change as by the equations; the adapter alone is saved, and resumed from to the bit."""

    def adapted(**config):
        model = row.model()
        if config:
            torch.manual_seed(0)
            model = type(model)(type(model.config).from_dict(model.config.to_dict() | config)).to(row.dtype)
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1
        }
        heads = [name for name in layers if is_head(name)]
        targets = [name for name in layers if not is_head(name)]
        return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=targets, modules_to_save=heads))

    note, config = None, {}
    if row.name == "MobileNetV2":
        with pytest.raises(AttributeError, match="no attribute 'stride'"):
            row.run(adapted())
        config = {"tf_padding": False}
        note = Note(
            "✓",
            "with `tf_padding=False`: that padding of MobileNetV2 asks a convolution for its stride, which PEFT hides",
        )
    saves = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(row.folder / "lora")}
    run = row.run(adapted(**config), **saves).require_sound()
    run.require_plain(adapted(**config))
    changed = [
        name for name, start in adapted(**config).named_parameters() if not torch.equal(run.weights[name], start)
    ]
    assert any("lora_A" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    checkpoint = row.folder / "lora" / "checkpoint-2"
    assert [path.name for path in checkpoint.glob("*.safetensors") if "model" in path.name] == [
        "adapter_model.safetensors"
    ]
    resumed = row.run(adapted(**config), resume=str(checkpoint), **saves)
    resumed.require_same(run)
    return note


def model_init(row):
    """A second `train` is the first again, K included, and both are those of the equations."""
    trainer = row.trainer(trainer_kwargs={"model_init": lambda: row.model()})
    first, second = row.train(trainer).require_sound(), row.train(trainer)
    second.require_same(first)
    first.require_plain(row.model())


def search_two(trainer, argument, values):
    """A search over two values of one argument, in an order of its own."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return trainer.hyperparameter_search(
        lambda trial: {argument: trial.suggest_categorical(argument, values)},
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({argument: values}),
    )


def search(row):
    """Both trials of a search by optuna read, step by step, the K of a training of their own."""
    ratios, parts = [0.25, 0.75], {"model_init": lambda: row.model(), "eval_dataset": Subset(row.data(), range(8))}
    trainer = row.trainer(trainer_kwargs=parts)
    with pytest.MonkeyPatch.context() as patch:
        recorder = StepRecorder(patch)
        best = search_two(trainer, "mask_ratio", ratios)
    trials = [recorder.calls[:4], recorder.calls[4:]]
    started = [calls[0]["k"][0].item() / row.data().images[0, 0].numel() for calls in trials]
    assert sorted(started) == ratios
    assert best.hyperparameters["mask_ratio"] in ratios
    for ratio, calls in zip(started, trials, strict=True):
        alone = row.run(trainer_kwargs=parts, mask_ratio=ratio).require_sound()
        assert len(calls) == len(alone.calls)
        for call, expected in zip(calls, alone.calls, strict=True):
            assert torch.equal(call["sample_idx"], expected["sample_idx"])
            assert torch.equal(call["k"], expected["k"])


def auto_find_batch_size(row):
    """After an attempt that ran out of memory in its second step, weights and K go on from its first, both alike."""
    model, passes = row.model(), []

    def run_out_of_memory(*_):
        passes.append(1)
        if len(passes) == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(run_out_of_memory)
    run = row.run(model, auto_find_batch_size=True).require_sound()
    assert [len(call["sample_idx"]) for call in run.calls] == [8, 7, 7, 7, 3]
    run.require_plain(row.model(), breaks=(1,))


class WeightedTrainer(SmootTrainer):
    """Draws with replacement, some samples far more often than others."""

    def _get_train_sampler(self, train_dataset=None):
        return WeightedRandomSampler([9.0] * 6 + [1.0] * 18, 24)


def weighted_sampler(row):
    """A sample that an epoch visits several times, also within a batch, moves its K once."""
    run = row.run(trainer_class=WeightedTrainer).require_sound()
    batches = [call["sample_idx"].tolist() for call in run.calls]
    assert len(set(batches[0])) < 8
    assert set(batches[0]) & set(batches[1])
    run.require_plain(row.model())


class GroupedTrainer(SmootTrainer):
    """Puts samples of similar length into one batch."""

    lengths = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()

    def _get_train_sampler(self, train_dataset=None):
        return LengthGroupedSampler(self.args.train_batch_size, lengths=self.lengths)


def grouped_sampler(row):
    """K follows the sample, not its place in the order."""
    run = row.run(trainer_class=GroupedTrainer).require_sound()
    for call in run.calls:
        lengths = [GroupedTrainer.lengths[index] for index in call["sample_idx"].tolist()]
        assert lengths[1:] == sorted(lengths[1:], reverse=True)
    run.require_plain(row.model())


def workers(row):
    """Batches from two worker processes train to the bit as those from none."""
    row.run(dataloader_num_workers=2).require_same(row.baseline)


def persistent_workers(row):
    """Batches of workers that live on into the second epoch are those of the equations."""
    run = row.run(dataloader_num_workers=2, dataloader_persistent_workers=True).require_sound()
    loader = run.trainer.callback_handler.train_dataloader
    assert loader._iterator._persistent_workers
    # In good order; where the garbage collector ends the workers, torch waits five seconds for each.
    loader._iterator._shutdown_workers()
    assert run.calls[-1]["epoch"] == 1
    # Not compared with the baseline: torch draws a seed from the random state, hence another dropout, for new workers.
    run.require_plain(row.model())


def soft_labels(row):
    """Mixup by a data collator: weights, K and losses are those of the equations on the mixed images."""
    mixup = v2.MixUp(num_classes=CLASSES)

    def collate(examples):
        images = torch.stack([example["pixel_values"] for example in examples])
        images, labels = mixup(images, torch.tensor([example["labels"] for example in examples]))
        return {"pixel_values": images, "labels": labels.to(images.dtype)}

    run = row.run(trainer_kwargs={"data_collator": collate}).require_sound()
    assert all(call["labels"].shape[1] == CLASSES for call in run.calls)
    run.require_plain(row.model(), is_mixed=True)


def several_labels(row):
    """Some images of no label, of one and of two: the same for `problem_type="multi_label_classification"`."""

    def model():
        built = row.model()
        built.config.problem_type = "multi_label_classification"
        return built

    data = row.data()
    data.labels = [[float(i % 3 == j or i % 4 == j) * (i % 5 > 0) for j in range(CLASSES)] for i in range(len(data))]

    def collate(examples):
        labels = torch.tensor([example["labels"] for example in examples]).to(row.dtype)
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples]), "labels": labels}

    run = row.run(model(), trainer_kwargs={"data_collator": collate, "train_dataset": data}).require_sound()
    run.require_plain(model())


FEATURES: dict[str, Callable[[Row], Note | None]] = {
    "fp32: the equations": plain_formulation,
    "bf16": bf16,
    "fp16": fp16,
    "gradient checkpointing": checkpointing,
    "`torch_compile`": compiled,
    "SDPA = eager attention": attention,
    "label smoothing": label_smoothing,
    "first layers frozen": first_layers_frozen,
    "every other parameter frozen": every_other_frozen,
    "all but the head frozen": head_alone,
    "LoRA (PEFT), saved and resumed": lora,
    "`model_init`": model_init,
    "`hyperparameter_search` (optuna)": search,
    "`auto_find_batch_size`": auto_find_batch_size,
    "weighted sampler, with replacement": weighted_sampler,
    "grouping sampler": grouped_sampler,
    "`dataloader_num_workers=2`": workers,
    "`persistent_workers`": persistent_workers,
    "mixup with soft labels": soft_labels,
    "several labels an image": several_labels,
}


def markdown(marks):
    """The table of (feature, model) -> `Note` or None, reasons as footnotes."""
    reasons = list(dict.fromkeys(note.reason for note in marks.values() if note))
    lines = [f"| | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 1) + "|"]
    for feature in FEATURES:
        notes = [marks[feature, name] for name in MODELS]
        cells = [f"{note.mark} [{reasons.index(note.reason) + 1}]" if note else "✓" for note in notes]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}." for number, reason in enumerate(reasons, 1))])


def main():
    """Print the table, or write it; a cell that does not hold ends it."""
    parser = argparse.ArgumentParser(description="Train every kind of model with every feature of the Trainer")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    marks = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            row = Row(name, folder)
            for feature, check in FEATURES.items():
                sys.stderr.write(f"{name}: {feature}\n")
                marks[feature, name] = check(row)
    versions = [f"{module.__name__} {module.__version__}" for module in (torch, transformers, timm, peft, optuna)]
    stamp = f"{datetime.now(UTC):%Y-%m-%d}; {', '.join(versions)}."
    table = f"# Training features\n\nWritten by `tests/compatibility/matrix.py`, {stamp}\n\n{markdown(marks)}\n"
    sys.stdout.write(table)
    if options.output:
        options.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
