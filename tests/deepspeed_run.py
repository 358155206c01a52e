"""Short trainings under DeepSpeed, run by test_deepspeed.py in two processes; the first saves what came out of them."""

import sys
from pathlib import Path

import fsdp_run
import torch
from accelerate.state import AcceleratorState

from smoot_hf import SmootTrainer, SmootTrainingArguments

WORLD_SIZE = 2
# Every run of FSDP but the one of its own option, and what accumulates: the engine keeps count of backward passes.
RUNS = {name: settings for name, settings in fsdp_run.RUNS.items() if name != "gathered"} | {
    "clipped_accumulated": {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2},
    "loss_pass_accumulated": fsdp_run.RUNS["loss_pass"] | {"gradient_accumulation_steps": 2},
    "standard_accumulated": {"method": "standard", "gradient_accumulation_steps": 2},
    "every_other": {"masked_every": 2},
}
# The engine holds the weights themselves in bf16, one process only what it computes: they agree, and are not the same.
BF16 = RUNS["adamw"] | {"bf16": True, "learning_rate": 1e-3}
# Optional parts of ZeRO that leave the numbers alone.
TUNED = {
    "allgather_partitions": True,
    "allgather_bucket_size": 200,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 200,
    "contiguous_gradients": True,
}


def at_stage(settings, stage):
    """Of a run at a stage: ZeRO 3 trains with the saliency's pass in eval mode alone."""
    return settings | ({"saliency_pass": "eval"} if stage == 3 else {})


def configuration(stage, zero=None, **more):
    """A configuration of DeepSpeed, as a user would write it, with some more settings."""
    gathers = {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    return (
        {"zero_optimization": {"stage": stage} | (gathers if stage == 3 else {}) | (zero or {})}
        | dict.fromkeys((*automatic, "gradient_clipping"), "auto")
        | {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
        | more
    )


def make_trainer(settings, folder, config):
    """A trainer of one of the runs under DeepSpeed."""
    model, arguments, data, more = fsdp_run.parts(dict(settings), folder, WORLD_SIZE)
    # One process has one configuration otherwise.
    AcceleratorState._reset_state()
    args = SmootTrainingArguments(**arguments, deepspeed=config)
    return SmootTrainer(model, args, train_dataset=data, **more)


def train(settings, folder, stage, resume=None, **zero):
    """One of the runs, or the rest of it."""
    import deepspeed  # in this process alone: it takes seconds

    trainer = make_trainer(settings, folder, configuration(stage, zero))
    trainer.train(resume_from_checkpoint=resume)
    parameters = dict(trainer.model.named_parameters())
    sharded = sum(parameter.numel() == 0 for parameter in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        parameters = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    return {
        "sharded": sharded,
        "k": None if trainer.mask_budget is None else trainer.mask_budget.k,
        "parameters": parameters,
        "logs": trainer.state.log_history,
    }


def said(settings, folder, config, resume=None):
    """What is said where a run is refused."""
    try:
        make_trainer(settings, folder, config).train(resume_from_checkpoint=resume)
    except ValueError as error:
        return str(error)


def refusals(folder, alone):
    """What is said of everything that is refused."""
    sgt = {"method": "sgt"}
    changes = {
        "stage 0": (sgt, configuration(0)),
        "stage 3, shared": (sgt, configuration(3)),
        "stage 3, not gathered": (
            {"saliency_pass": "eval"},
            configuration(3, {"stage3_gather_16bit_weights_on_model_save": False}),
        ),
        "offload": (sgt, configuration(2, {"offload_optimizer": {"device": "cpu"}})),
        "share": ({"masked_share": 0.5}, configuration(2)),
        "compiled": ({"torch_compile": True}, configuration(2)),
        "optimizer": (sgt, configuration(2, optimizer={"type": "AdamW", "params": {"lr": "auto"}})),
        "clipping": (sgt, {name: value for name, value in configuration(2).items() if name != "gradient_clipping"}),
    }
    found = {name: said(settings, folder / "refused", config) for name, (settings, config) in changes.items()}
    of_zero_2, place = str(folder / "adamw-2" / "checkpoint-4"), folder / "adamw-2"
    return found | {
        "of one process": said(RUNS["adamw"], Path(alone).parent, configuration(2), alone),
        "of ZeRO 2": said(at_stage(RUNS["adamw"], 3), place, configuration(3), of_zero_2),
    }


def main(folder, alone):
    """Train everything; with the checkpoint of a run without DeepSpeed at hand, ask to go on from that as well."""
    torch.distributed.init_process_group("gloo")
    found = {}
    for stage in (1, 2, 3):
        for name, settings in RUNS.items():
            found[name, stage] = train(at_stage(settings, stage), folder / f"{name}-{stage}", stage)
        found["tuned", stage] = train(at_stage(RUNS["accumulated"], stage), folder / "tuned", stage, **TUNED)
        settings, place = at_stage(BF16, stage), folder / f"bf16-{stage}"
        found["bf16", stage] = train(settings, place, stage)
        found["bf16 resumed", stage] = train(settings, place, stage, resume=str(place / "checkpoint-4"))
        settings, place = at_stage(RUNS["adamw"], stage), folder / f"adamw-{stage}"
        found["adamw resumed", stage] = train(settings, place, stage, resume=str(place / "checkpoint-4"))
    found["bf16 cnn"] = train(BF16 | {"model": "cnn", "augments": True}, folder / "cnn", 2)
    found["refused"] = refusals(folder, alone)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
