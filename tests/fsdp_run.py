"""Short trainings under FSDP 2, run by test_fsdp.py in two processes; the first saves what came out of them."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import QUICK, PixelImages, TinyImages, build
from distributed_run import Rows, k_of
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from smoot_hf import InputPipeline, SmootSettings, SmootTrainer, SmootTrainingArguments
from smoot_hf.training import trainer as mixin
from smoot_hf.training.masked_step import masked_step

GLOBAL_BATCH = 8
# What a run departs from: a ViT without dropout, 24 images, 2 epochs of 3 steps.
RUNS = {
    "vit": {},
    # SGD without momentum has no state, and torch fails to bring back none.
    "adamw": {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 4},
    "accumulated": {"gradient_accumulation_steps": 2},
    "clipped": {"max_grad_norm": 0.1},
    "eval_pass": {"saliency_pass": "eval"},
    "loss_pass": {"kl_gradient": "masked", "saliency_score": "log_prob"},
    "sgt": {"method": "sgt"},
    "standard": {"method": "standard"},
    "adversarial": {"mask_fill": "adversarial", "mask_positions": "most_salient"},
    "augmented": {"augments": True},
    "measured": {"eval_strategy": "steps", "eval_steps": 3, "deletion_auc_samples": 8},
    "gathered": {"reshard_after_forward": False},
    "dropout": {"dropout": 0.5, "mask_ratio": 0.0, "mask_ratio_min": 0.0},
    "stream": {"streams": True},
    "sharded_budget": {"mask_budget_sharded": True, "gradient_accumulation_steps": 2},
}


def let_accelerate_shard_on_cpus():
    """By itself accelerate makes DDP of FSDP on CPUs, which its list of what can be sharded lacks. Private state."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(tensor):
    """All of a parameter, of which a process may hold a part."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def parts(settings, folder, world_size):
    """What a trainer of one of the runs is made of: model, arguments, training set, and the rest."""
    model = build(settings.pop("model", "vit"), dropout=settings.pop("dropout", 0.0))
    data, more = TinyImages(24), {"eval_dataset": TinyImages(16)}
    if settings.pop("augments", False):
        data = PixelImages(24)
        more = {"input_pipeline": InputPipeline((0.5,) * 3, (0.25,) * 3, crop_padding=2, horizontal_flip=True, seed=1)}
    if settings.pop("streams", False):
        data = Rows(data)
        settings |= {"num_train_samples": 24, "num_train_epochs": 2, "max_steps": -1}
    share = GLOBAL_BATCH // world_size // settings.get("gradient_accumulation_steps", 1)
    common = QUICK | {"output_dir": str(folder), "per_device_train_batch_size": share, "optim": "sgd"}
    return model, common | {"step_size": 3000, "logging_steps": 1} | settings, data, more


def make_trainer(name, folder, world_size, config=None, **more_settings):
    """A trainer of one of the runs, under FSDP where there are several processes."""
    settings = RUNS[name] | more_settings
    # Of what ViT names itself, accelerate shards the embeddings twice, and fails.
    sharding = {"version": 2, "cpu_ram_efficient_loading": False, "transformer_layer_cls_to_wrap": ["ViTLayer"]}
    if "reshard_after_forward" in settings:
        sharding["reshard_after_forward"] = settings.pop("reshard_after_forward")
    model, arguments, data, more = parts(settings, folder, world_size)
    if world_size > 1:
        arguments |= {"fsdp": True, "fsdp_config": sharding | (config or {})}
    args = SmootTrainingArguments(**arguments)
    if world_size > 1:
        _ = args.device  # makes the state that is changed
        let_accelerate_shard_on_cpus()
    return SmootTrainer(model, args, train_dataset=data, **more)


class Observed:
    """Keeps K and delta of every step."""

    def __init__(self):
        self.k = []

    def __call__(self, model, images, labels, sample_idx, k, *others, **more):
        self.k.append(k.tolist())
        return masked_step(model, images, labels, sample_idx, k, *others, **more)


def train(name, folder, world_size, resume=None):
    """One of the runs, or the rest of it."""
    mixin.masked_step = Observed()
    trainer = make_trainer(name, folder, world_size)
    trainer.train(resume_from_checkpoint=resume)
    parameters = dict(trainer.model.named_parameters())
    return {
        "sharded": sum(isinstance(parameter, DTensor) for parameter in parameters.values()),
        "k": None if trainer.mask_budget is None else k_of(trainer.mask_budget),
        "parameters": {key: whole(parameter) for key, parameter in parameters.items()},
        "logs": trainer.state.log_history,
    }


def gradients(world_size, rank, **fsdp):
    """Gradients of one masked step in float64, of the mean over the global batch."""
    model = build("vit").double().train()
    if world_size > 1:
        for layer in model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer:
            fully_shard(layer, **fsdp)
        fully_shard(model, **fsdp)
    share = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
    rows, data = torch.arange(GLOBAL_BATCH)[share], TinyImages(GLOBAL_BATCH)
    images, labels = data.images[share].double(), torch.tensor(data.labels)[share]
    settings, weights = SmootSettings(), list(model.parameters())
    step = masked_step(model, images, labels, rows, torch.full_like(rows, 32), 0, settings, weights=weights)
    (step.ce + step.kl).mean().backward()
    return {key: whole(parameter.grad) for key, parameter in model.named_parameters()}


def said(name, folder, config=None, resume=None, **more):
    """What is said where a run is refused."""
    try:
        trainer = make_trainer(name, folder, 2, config, **more)
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        return str(error)


def main(folder, alone):
    """Train everything; with the checkpoint of a run without FSDP at hand, ask to go on from that as well."""
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {name: train(name, folder / name, size) for name in RUNS}
    checkpoint = str(folder / "adamw" / "checkpoint-4")
    found["resumed"] = train("adamw", folder / "adamw", size, resume=checkpoint)
    found["gradients"] = [gradients(size, rank, reshard_after_forward=again) for again in (True, False)]
    refused = {
        "sharded states": said("sgt", folder / "2", {"state_dict_type": "SHARDED_STATE_DICT"}),
        "checkpointing": said("sgt", folder / "3", {"activation_checkpointing": True}),
        "offload": said("sgt", folder / "4", {"cpu_offload": True}),
        "share": said("sgt", folder / "5", masked_share=0.5),
        "of one process": said("adamw", Path(alone).parent, resume=str(alone)),
    }
    if rank == 0:
        torch.save(found | {"refused": refused}, folder / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
