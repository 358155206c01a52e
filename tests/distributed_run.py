"""Short trainings, run by test_distributed.py in one or several processes; every rank saves what came out of them."""

import shutil
import sys
from pathlib import Path

import torch
from conftest import QUICK, PixelImages, TinyImages, build, freeze_batch_statistics
from torch.utils.data import IterableDataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from smoot_hf import InputPipeline, SmootTrainer, SmootTrainingArguments
from smoot_hf.training import trainer as mixin
from smoot_hf.training.masked_step import masked_step
from smoot_hf.training.sharded_mask_budget import ShardedMaskBudget

GLOBAL_BATCH = 8
# What a run departs from: a ViT without dropout, 24 images, 2 epochs of 3 steps.
RUNS = {
    "vit": {"save_strategy": "steps", "save_steps": 4},
    "uneven": {"length": 21},
    "few": {"length": 5},
    "accumulated": {"gradient_accumulation_steps": 2},
    "uneven_accumulated": {"length": 21, "gradient_accumulation_steps": 2},
    "few_accumulated": {"length": 5, "gradient_accumulation_steps": 2},
    "eval_pass": {"saliency_pass": "eval"},
    "loss_pass": {"kl_gradient": "masked", "saliency_score": "log_prob", "gradient_accumulation_steps": 2},
    "sgt": {"method": "sgt"},
    "soft_labels": {"labels": "soft", "delta_mode": "label"},
    "several_labels": {"labels": "several", "gradient_accumulation_steps": 2},
    "stream": {"streams": True},
    "uneven_stream": {"streams": True, "length": 21},
    # Often one process has nobody of the share, or nobody else; its buffers would then be sent to nobody.
    "share": {"masked_share": 0.4, "has_buffer": True},
    "share_accumulated": {"masked_share": 0.4, "masked_every": 2, "gradient_accumulation_steps": 2, "length": 21},
    "share_loss_pass": {"masked_share": 0.4, "kl_gradient": "masked", "saliency_score": "log_prob", "augments": True},
    # A part of K on each process; of four processes the last holds none of 5 samples.
    "sharded": {"mask_budget_sharded": True, "save_strategy": "steps", "save_steps": 4},
    "sharded_few": {"mask_budget_sharded": True, "length": 5},
    "sharded_accumulated": {"mask_budget_sharded": True, "length": 21, "gradient_accumulation_steps": 2},
    "sharded_sgt": {"mask_budget_sharded": True, "method": "sgt"},
    "sharded_share": {"mask_budget_sharded": True, "masked_share": 0.4, "masked_every": 2, "length": 21},
    "sharded_stream": {"mask_budget_sharded": True, "streams": True},
    "share_batchnorm": {"masked_share": 0.3, "model": "resnet"},
    "augmented": {"model": "cnn", "dropout": 0.0, "augments": True},
    "frozen_batchnorm": {"model": "resnet", "freezes": True},
    "batchnorm": {"model": "resnet"},
    "dropout": {"model": "cnn"},
    "batchnorm_without_kl": {"model": "resnet", "kl_weight": 0.0},
    "batchnorm_standard": {"model": "resnet", "method": "standard"},
    "batchnorm_plain": {"model": "resnet", "method": "plain"},
}


class Repeating(Sampler):
    """A shuffled order of its own for every epoch; alone, it repeats the samples that accelerate gives out twice."""

    def __init__(self, length, world_size):
        self.length, self.epoch = length, 0
        self.repeats = -length % GLOBAL_BATCH if world_size == 1 else 0

    def __len__(self):
        return self.length + self.repeats

    def __iter__(self):
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.epoch += 1
        return iter(order + order[: self.repeats])


class Rows(IterableDataset):
    """The samples of a data set as a stream, each with its number; shuffled anew in every epoch."""

    def __init__(self, data):
        self.data, self.epoch = data, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch))
        return iter([self.data[i] | {"sample_idx": i} for i in order.tolist()])


class Uneven(SmootTrainer):
    """Trains in the order of `Repeating`."""

    def _get_train_sampler(self, train_dataset=None):
        return Repeating(len(self.train_dataset), self.args.world_size)


class Observed(TrainerCallback):
    """Keeps K at the end of every step, and which samples each step held on this rank."""

    def __init__(self, monkeypatched):
        self.trainer, self.k, self.seen = None, [], []
        monkeypatched.masked_step = self.step

    def step(self, model, images, labels, sample_idx, *others, **more):
        self.seen.append(sample_idx.tolist())
        return masked_step(model, images, labels, sample_idx, *others, **more)

    def on_step_end(self, *_, **__):
        if getattr(self.trainer, "mask_budget", None) is not None:
            self.k.append(k_of(self.trainer.mask_budget))


def k_of(budget):
    """K of every sample, which of a sharded budget all processes ask for together."""
    return budget.gathered().k if isinstance(budget, ShardedMaskBudget) else budget.k


def read_alone(budget, rank):
    """What the last process reads of K without the others, and what it is told of the K of every sample."""
    if not isinstance(budget, ShardedMaskBudget) or rank + 1 < torch.distributed.get_world_size():
        return None
    try:
        said = budget.to_dataset()
    except RuntimeError as error:
        said = str(error)
    return {"statistics": budget.statistics(), "counts": budget.histogram.tolist(), "said": said}


def dropout_of(settings):
    """The configuration of a CNN without dropout, where the settings ask for that."""
    rate = settings.pop("dropout", None)
    return {} if rate is None else {"feature_dropout": rate, "classifier_dropout": rate}


def train(name, folder, world_size, resume=False):
    """One of the runs above, or the rest of it; what came out of it on this rank."""
    settings = dict(RUNS[name])
    length, model = settings.pop("length", 24), build(settings.pop("model", "vit"), **dropout_of(settings))
    data, more = TinyImages(length), {}
    kind_of_labels = settings.pop("labels", None)
    if kind_of_labels == "soft":
        data.labels = [[0.25, *(0.25 + 0.5 * (j == i % 3) for j in range(3))] for i in range(length)]
        data.labels = [[weight / sum(row) for weight in row] for row in data.labels]
    if kind_of_labels == "several":
        model.config.problem_type = "multi_label_classification"
        data.labels = [[float(i % 3 == j or i % 4 == j) * (i % 5 > 0) for j in range(4)] for i in range(length)]
    if settings.pop("freezes", False):
        freeze_batch_statistics(model)
    if settings.pop("has_buffer", False):
        model.register_buffer("extra", torch.zeros(1))
    if settings.pop("augments", False):
        data = PixelImages(length)
        more["input_pipeline"] = InputPipeline((0.5,) * 3, (0.25,) * 3, crop_padding=2, horizontal_flip=True, seed=1)
    if settings.pop("streams", False):
        settings |= {"num_train_samples": length, "num_train_epochs": 2, "max_steps": -1}
        data = Rows(data)
    share = GLOBAL_BATCH // world_size // settings.get("gradient_accumulation_steps", 1)
    common = QUICK | {"output_dir": str(folder), "per_device_train_batch_size": share, "optim": "sgd"}
    observed = Observed(mixin)
    if settings.get("method") == "plain":
        trainer = Trainer(model, TrainingArguments(**common), train_dataset=data)
    else:
        args = SmootTrainingArguments(**common | {"step_size": 3000} | settings)
        kind = Uneven if length % GLOBAL_BATCH and not isinstance(data, Rows) else SmootTrainer
        trainer = kind(model, args, train_dataset=data, callbacks=[observed], **more)
        observed.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    budget = getattr(trainer, "mask_budget", None)
    return {
        "world_size": trainer.args.world_size,
        "k": observed.k,
        "held": 0 if budget is None else len(budget.rows),
        "alone": read_alone(budget, trainer.args.process_index),
        "seen": observed.seen,
        "parameters": {name: p.detach() for name, p in trainer.model.named_parameters()},
        "buffers": {name: b.detach() for name, b in trainer.model.named_buffers()},
        "logs": trainer.state.log_history,
    }


def fsdp_refusal(folder):
    """What is said of FSDP 2 by its flag."""
    try:
        args = SmootTrainingArguments(folder, **QUICK, fsdp="full_shard", fsdp_config={"fsdp_version": 2})
        SmootTrainer(build("vit"), args, train_dataset=TinyImages())
    except ValueError as error:
        return str(error)


def lost_budget_refusal(folder, saved, rank, **settings):
    """What is said where the second process finds a checkpoint without K on its disk."""
    own = shutil.copytree(saved, Path(folder) / f"disk{rank}" / "checkpoint-4", dirs_exist_ok=True)
    if rank == 1:
        (own / "mask_budget.safetensors").unlink()
    args = SmootTrainingArguments(str(Path(folder) / f"disk{rank}"), **QUICK, step_size=3000, **settings)
    try:
        SmootTrainer(build("vit"), args, train_dataset=TinyImages(24)).train(resume_from_checkpoint=str(own))
    except ValueError as error:
        return str(error)


def other_seed(folder):
    """What is said where a run of another seed begins, or resumes, in a folder; the id of one that may begin there."""
    said = []
    for resume, may_begin in ((None, False), (True, False), (None, True)):
        args = SmootTrainingArguments(str(folder), **QUICK, seed=1, overwrite_output_dir=may_begin)
        trainer = SmootTrainer(build("vit"), args, train_dataset=TinyImages(24))
        try:
            trainer.train(resume_from_checkpoint=resume)
            said.append(trainer.run_identity.run_id)
        except ValueError as error:
            said.append(str(error))
    return said


def main(folder, saved=None, names=None, saved_of_others=None):
    """Train everything, or what `names` has; with `saved` also the rest of the run whose checkpoint that folder is.

    From `saved_of_others`, of another number of processes, the rest is trained with a sharded K.
    """
    torch.use_deterministic_algorithms(True)
    args = SmootTrainingArguments(folder, use_cpu=True)
    results = {
        name: train(name, Path(folder) / name, args.world_size) for name in (names.split(",") if names else RUNS)
    }
    if saved:
        with args.main_process_first():
            run = Path(folder) / "resumed"
            if args.process_index == 0:
                shutil.copytree(saved, run / "checkpoint-4")
                (run / "checkpoint-5").mkdir()  # torn: to be passed over by all ranks
        results["resumed"] = train("vit", run, args.world_size, resume=True)
        results["resumed_sharded"] = train("sharded", Path(folder) / "others", args.world_size, resume=saved_of_others)
        results["other_seed"] = other_seed(run)
        results["lost_budget"] = [
            lost_budget_refusal(folder, saved, args.process_index, mask_budget_sharded=is_sharded)
            for is_sharded in (False, True)
        ]
    if args.world_size > 1 and not names:
        results["fsdp"] = fsdp_refusal(folder)
    torch.save(results, f"{folder}/rank{args.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
