"""Which ways of dividing a training over processes and devices are refused, because their results were not exact."""

from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from ..models.state import is_sharded

_DDP = "Several processes work through DDP: `torchrun --nproc_per_node N`, or `accelerate launch --multi_gpu`"
# The sizes of accelerate's ParallelismConfig that split a model or a sample over processes.
_SHARED = ("tp_size", "cp_size", "sp_size", "dp_shard_size")


def refuse_model_parallelism(model: Any, config: Any, is_sharded_here: bool = False) -> None:
    """Raise where one sample is shared by several processes, or a parameter is, whatever made it so.

    The loss is multiplied by the number of processes, each of which must see samples of its own and the whole model.

    Args:
        model: `None` where it is not built yet.
        config: `ParallelismConfig` of accelerate, or `None`.
        is_sharded_here: the Trainer has sharded the parameters itself, over samples of their own.

    Raises:
        ValueError: naming what is shared.
    """
    found = [f"{name}={size}" for name in _SHARED if (size := getattr(config, name, None) or 1) > 1]
    tp_size = getattr(model, "_tp_size", None) or 1
    if tp_size > 1:
        found.append(f"model.tp_size={tp_size}")
    if getattr(model, "is_distributed_loading_by_transformers", False):
        found.append("a model loaded with a distributed_config")
    if model is not None and not is_sharded_here and (name := _first_sharded_parameter(model)):
        found.append(f"the DTensor parameter {name}")
    if found:
        raise ValueError(
            f"model parallelism is refused ({', '.join(found)}): loss and gradients have not been shown to be exact "
            f"where processes share a model's parameters or a sample. Load the whole model on each. {_DDP}"
        )


def _first_sharded_parameter(model: nn.Module) -> str | None:
    return next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)


def _refuse_fsdp(trainer: Trainer) -> None:
    """Raise for every way of FSDP but the one that has been shown to be exact: version 2, whole states."""
    accelerator = trainer.accelerator
    # accelerate makes no plugin where it shards nothing.
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            f"FSDP 1 is refused: its gradients have not been shown to be exact here. Set fsdp_config={{'version': 2}}. "
            f"{_DDP}"
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"fsdp is set, but accelerate runs {accelerator.distributed_type.value} here, which shards nothing: on "
            "CPUs, and with one process, leave fsdp away"
        )
    if "FULL" not in str(plugin.state_dict_type):
        raise ValueError(
            f"FSDP with {plugin.state_dict_type} is refused: save_model would write no weights, without an error. Set "
            "fsdp_config={'state_dict_type': 'FULL_STATE_DICT'}"
        )
    from torch.distributed.fsdp import CPUOffloadPolicy

    untried = {
        "cpu_offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "activation_checkpointing": plugin.activation_checkpointing,
        "fp16": accelerator.scaler is not None,
        "torch_compile": trainer.args.torch_compile,
        # Processes would gather weights as often as they have chosen samples, and wait for each other.
        "masked_share below 1": trainer.args.masked_share < 1,
    }
    found = next((name for name, is_asked in untried.items() if is_asked), None)
    if found is not None:
        raise ValueError(f"FSDP with {found} is refused: the two have not been shown to be exact together. {_DDP}")


# What a configuration of DeepSpeed may hold: what the tests of the engine set, and what leaves the numbers alone.
_DEEPSPEED_KEYS = {
    *("zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"),
    *("gradient_clipping", "bf16", "fp16", "zero_allow_untested_optimizer", "steps_per_print", "wall_clock_breakdown"),
}
_ZERO_KEYS = {
    *("stage", "allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "reduce_bucket_size"),
    *("contiguous_gradients", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"),
}


def _refuse_deepspeed(trainer: Trainer) -> None:
    """Raise for every way of DeepSpeed but those that have been tried: ZeRO 1, 2 and 3, in float32 and bf16."""
    args, plugin = trainer.args, trainer.accelerator.state.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    zero: dict[str, Any] = config.get("zero_optimization", {})
    stage = plugin.zero_stage
    if stage not in (1, 2, 3):
        raise ValueError(f"DeepSpeed with ZeRO stage {stage} is refused: it shards nothing. {_DDP}")
    if stage == 3 and args.saliency_pass != "eval":
        raise ValueError(
            f"DeepSpeed with ZeRO stage 3 is refused with saliency_pass={args.saliency_pass!r}: the engine fails at a "
            "second backward pass through the clean view. Set saliency_pass='eval', or ZeRO stage 2"
        )
    if stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "DeepSpeed with ZeRO stage 3 is refused without 'stage3_gather_16bit_weights_on_model_save': true in "
            "'zero_optimization': save_model would write no weights"
        )
    clipping = config.get("gradient_clipping") or 0
    if clipping != args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm}, but DeepSpeed would clip by its own 'gradient_clipping', "
            f"{clipping}: set it to 'auto' in the configuration of DeepSpeed"
        )
    untried = {
        "torch_compile": args.torch_compile,
        # Processes would make passes as often as they have chosen samples, and wait for each other.
        "masked_share below 1": args.masked_share < 1,
        "fp16": _is_on(config.get("fp16")),
        **{name: _is_on(config[name]) for name in config.keys() - _DEEPSPEED_KEYS},
        **{name: _is_on(zero[name]) for name in zero.keys() - _ZERO_KEYS},
    }
    found = next((name for name, is_asked in untried.items() if is_asked), None)
    if found is not None:
        raise ValueError(f"DeepSpeed with {found} is refused: the two have not been shown to be exact together. {_DDP}")


def _is_on(setting: Any) -> bool:
    """Whether a part of a configuration of DeepSpeed asks for anything."""
    if not isinstance(setting, dict) or not setting:
        return bool(setting)
    return bool(setting["enabled"]) if "enabled" in setting else setting.get("device", "asked") not in (None, "none")


def refuse_parallelism(trainer: Trainer) -> None:
    """Raise for every way of dividing a masked training over processes that has not been shown to be exact.

    Raises:
        ValueError: naming what is refused, the reason, and what to do instead.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if args.n_gpu > 1:
        raise ValueError(
            f"DataParallel over {args.n_gpu} GPUs is refused: it loses the gradients of torch.autograd.grad. Use "
            f"`accelerate launch --num_processes {args.n_gpu}`, or CUDA_VISIBLE_DEVICES=0"
        )
    if getattr(trainer, "is_fsdp_enabled", False) or args.fsdp:
        _refuse_fsdp(trainer)
    if trainer.is_deepspeed_enabled:
        _refuse_deepspeed(trainer)
    if getattr(args, "ddp_static_graph", None):
        raise ValueError(
            "ddp_static_graph=True is refused: with the saliency's backward pass the gradients come out wrong. "
            "Leave it away"
        )
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise ValueError(
                f"{name}={{'use_reentrant': True}} is refused: reentrant checkpointing forbids torch.autograd.grad. "
                "Leave it at its default, False"
            )
    if accelerator.dispatch_batches:
        raise ValueError(
            "dispatch_batches=True is refused: the batches must come from the data set of each process. Leave it away"
        )
    if accelerator.num_processes > 1 and not accelerator.even_batches:
        raise ValueError(
            "even_batches=False is refused with several processes: K is shared batch by batch. Leave it away"
        )
