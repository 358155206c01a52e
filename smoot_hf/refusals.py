"""What would train silently wrong is refused by name when the trainer is built."""

from typing import Any

from accelerate import Accelerator
from transformers import Trainer

from .sample_index import has_index


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise for every combination of model, arguments and hardware for which the result would be silently wrong.

    Raises:
        ValueError: naming what is refused, the reason, and what to do instead.
    """
    _refuse_model(trainer)
    _refuse_precision(trainer.accelerator)
    for dataset in _evaluation_sets(trainer.eval_dataset):
        refuse_evaluation_set(trainer.args, dataset)
    if trainer.args.method != "standard":
        _refuse_training_set(trainer.train_dataset)
        _refuse_parallelism(trainer)


def _refuse_model(trainer: Trainer) -> None:
    config = getattr(trainer.model, "config", None)
    problem_type = getattr(config, "problem_type", None)
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"problem_type={problem_type!r} is refused: the loss is a cross-entropy over exclusive classes and delta "
            "ranks one softmax distribution. Use transformers.Trainer"
        )
    num_labels = getattr(config, "num_labels", None)
    if num_labels is not None and num_labels < 2:
        raise ValueError(f"the model must have at least 2 classes, got num_labels={num_labels}")
    if getattr(config, "return_dict", True) is False:
        raise ValueError(
            "return_dict=False is refused: the loss needs outputs with 'logits', not tuples. Set "
            "model.config.return_dict = True"
        )
    if len(trainer.label_names) != 1:
        raise ValueError(f"label_names must name one key of the batch, got {trainer.label_names}")


def _refuse_precision(accelerator: Accelerator) -> None:
    # accelerate 1.15 says nothing of it.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "fp16=True is refused on a CPU: accelerate would train in float32 instead. Use bf16=True, or a GPU"
        )


def _evaluation_sets(dataset: Any) -> list[Any]:
    return list(dataset.values()) if isinstance(dataset, dict) else [dataset]


def refuse_evaluation_set(args: Any, dataset: Any) -> None:
    """Raise for an evaluation set that `deletion_auc_samples` images cannot be taken from.

    Raises:
        ValueError: it has no length and index, or no images.
    """
    if dataset is None or not args.deletion_auc_samples:
        return
    if not has_index(dataset):
        raise ValueError(
            f"deletion_auc_samples={args.deletion_auc_samples} takes images from all over the evaluation set, but a "
            f"{type(dataset).__name__} has no length and index: load it with streaming=False, or set it to 0"
        )
    if len(dataset) == 0:
        raise ValueError(f"deletion_auc_samples={args.deletion_auc_samples}, but the evaluation set is empty")


def _refuse_training_set(dataset: Any) -> None:
    if dataset is not None and has_index(dataset) and len(dataset) == 0:
        raise ValueError("train_dataset is empty: K needs at least one training sample")
    if dataset is None or has_index(dataset):
        return
    raise ValueError(
        f"train_dataset is a {type(dataset).__name__} without length and index, but a K per sample needs both: load it "
        "with streaming=False (or datasets.Dataset.from_generator), or use method='standard'"
    )


def _refuse_parallelism(trainer: Trainer) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    if args.n_gpu > 1:
        raise ValueError(
            f"DataParallel over {args.n_gpu} GPUs is refused: it loses the gradients of torch.autograd.grad. Use "
            f"`accelerate launch --num_processes {args.n_gpu}`, or CUDA_VISIBLE_DEVICES=0"
        )
    if getattr(trainer, "is_fsdp_enabled", False) or args.fsdp:
        raise ValueError("FSDP is refused: its sharded parameters have not been shown to give exact gradients here")
    if trainer.is_deepspeed_enabled:
        raise ValueError("DeepSpeed is refused: its engine has not been shown to give exact gradients here")
    if getattr(args, "ddp_static_graph", None):
        raise ValueError(
            "ddp_static_graph=True is refused: with the saliency's backward pass the gradients come out wrong"
        )
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise ValueError(
                f"{name}={{'use_reentrant': True}} is refused: reentrant checkpointing forbids torch.autograd.grad. "
                "Leave it at its default, False"
            )
    if accelerator.dispatch_batches:
        raise ValueError("dispatch_batches=True is refused: the batches must come from the data set of each process")
    if accelerator.num_processes > 1 and not accelerator.even_batches:
        raise ValueError("even_batches=False is refused with several processes: K is shared batch by batch")
