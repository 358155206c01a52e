"""What would train silently wrong is refused by name when the trainer is built; what may surprise is warned of."""

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import ModelOutput, logging

from ..errors import first_line
from ..evaluation.ranked_batches import has_index
from ..models.logits import MULTI_LABEL, is_multi_label, logits_of
from ..models.state import untouched
from .clean_pass import runs_cuda_graphs
from .labels import find_fault
from .mask_budget import MaskBudget
from .parallelism import refuse_model_parallelism, refuse_parallelism
from .problem import problem_of
from .sample_stream import HOW_TO_INDEX
from .settings import SmootSettings

logger = logging.get_logger(__name__)

_OWN_LOSS = (
    "That loss is not used: training is by the cross-entropy of the logits. To train by another one, pass it as "
    "compute_loss_func"
)
# How far K moves at most by a step of mu: Equation 4 with floor moves it downwards by the next whole number.
_FARTHEST: dict[str, Callable[[float], int]] = {"floor": math.ceil, "trunc": math.floor, "nearest": round}
# A share of the positions below which it makes no difference whether K has moved.
_NOTICEABLE_MOVE = 0.01


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise for every combination of model, arguments and hardware for which the result would be silently wrong.

    Raises:
        ValueError: naming what is refused, the reason, and what to do instead.
    """
    is_sharded_here = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    refuse_model_parallelism(trainer.model, trainer.accelerator.parallelism_config, is_sharded_here)
    _refuse_model(trainer)
    _refuse_forward(trainer.model)
    _refuse_precision(trainer.accelerator)
    for dataset in _evaluation_sets(trainer.eval_dataset):
        refuse_evaluation_set(trainer.args, dataset)
    _refuse_unsavable(trainer)
    _refuse_splits(trainer.train_dataset)
    _refuse_count(trainer.train_dataset, trainer.args.num_train_samples)
    if trainer.args.method != "standard":
        _refuse_training_set(trainer.train_dataset, trainer.args.num_train_samples)
        refuse_parallelism(trainer)
        _refuse_graphs_of_shares(trainer)


def _refuse_model(trainer: Trainer) -> None:
    config = getattr(trainer.model, "config", None)
    problem_type = getattr(config, "problem_type", None)
    if problem_type not in (None, "single_label_classification", MULTI_LABEL):
        raise ValueError(
            f"problem_type={problem_type!r} is refused: delta ranks the outputs of classes, of which a regression has "
            "none. Use transformers.Trainer"
        )
    if is_multi_label(trainer.model) and trainer.args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={trainer.args.label_smoothing_factor} is for exclusive classes, and the model "
            f"has problem_type={problem_type!r}: set it to 0"
        )
    num_labels = getattr(config, "num_labels", None)
    if num_labels is not None and num_labels < 2:
        raise ValueError(
            f"the model must have at least 2 classes, got num_labels={num_labels}: build it with num_labels= the "
            "number of classes of the data"
        )
    if getattr(config, "return_dict", True) is False:
        raise ValueError(
            "return_dict=False is refused: the loss needs outputs with 'logits', not tuples. Set "
            "model.config.return_dict = True"
        )
    if len(trainer.label_names) != 1:
        raise ValueError(f"label_names must name one key of the batch, got {trainer.label_names}")


def _refuse_forward(model: Any) -> None:
    """Raise where the signature of the model's forward says that no logits of images alone can come of it."""
    takes = _arguments(model.forward)
    if takes is None:
        return
    name, main = type(model).__name__, getattr(model, "main_input_name", "pixel_values")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    if "pixel_values" not in takes and (main in takes or not takes_any):
        raise ValueError(
            f"{name} is refused: its forward takes {main if main in takes else next(iter(takes), 'nothing')!r}, no "
            "'pixel_values', and saliency is a gradient with respect to images (B, C, H, W)"
        )
    if main == "input_ids" and main in takes:
        raise ValueError(
            f"{name} is refused: its main input is text ('input_ids'), and SMOOT trains classifiers of images alone"
        )
    if "spatial_shapes" in takes:
        raise ValueError(
            f"{name} is refused: its 'pixel_values' are patches with their 'spatial_shapes', and masks need images "
            "(B, C, H, W). Wrap it in a module that takes images and cuts the patches, or take one of fixed resolution"
        )
    outputs = _declared_outputs(model.forward)
    if outputs and not any(field.name == "logits" for output in outputs for field in dataclasses.fields(output)):
        raise ValueError(
            f"{name} is refused: its forward returns {outputs[0].__name__}, which has no 'logits'. Wrap it in a module "
            "that returns them as ImageClassifierOutput(logits=...)"
        )


def check_mixed_labels(pipeline: Any, labels: Tensor, multi_label: bool) -> None:
    """Refuse what `InputPipeline.mix` has made of the labels of a batch; waits for the device.

    Args:
        pipeline: of the training, or `None`.
        labels: int64 (B,), or (B, classes).
        multi_label: whether an image may have several labels.

    Raises:
        ValueError: they are no soft labels.
    """
    if pipeline is None or pipeline.mix is None:
        return
    fault = find_fault(labels, None, multi_label)
    if fault is not None:
        raise ValueError(f"the labels that input_pipeline.mix makes must {fault.must}, but one is {fault.found}")


def warn_of_own_loss(model: nn.Module, images: Tensor, labels: Tensor, label_name: str, others: dict[str, Any]) -> None:
    """Warn where the model's forward computes a loss that is not the cross-entropy, for it is not trained by.

    Costs one forward pass in eval mode, of models that take labels; those of transformers are known to compute the
    cross-entropy, unless a `loss_function` has been set.

    Args:
        model: not wrapped.
        images: as the model takes them, (B, C, H, W).
        labels: int64 (B,), or (B, classes).
        label_name: of its argument for labels.
        others: further keyword arguments of the model.
    """
    is_known = type(model).__module__.startswith("transformers.") and "_loss_function" not in vars(model)
    if is_known or label_name not in (_arguments(model.forward) or {}):
        return
    name = type(model).__name__
    with untouched(model), torch.no_grad():
        try:
            outputs = model(pixel_values=images, **{label_name: labels}, **others)
        except Exception as error:  # whatever the user's code raises: training does not ask for this loss
            logger.warning(f"{name} fails where it is given {label_name!r} ({first_line(error)}). {_OWN_LOSS}")
            return
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if own is None:
        return
    own = own.detach().float().mean()
    ce = problem_of(model).loss(logits_of(outputs, len(images)), labels, 0.0).mean()
    if not torch.allclose(own, ce, rtol=0.01, atol=1e-4, equal_nan=True):
        logger.warning(
            f"{name} computes a loss of its own in its forward, {own:.4g} on the first batch, where the cross-entropy "
            f"is {ce:.4g}. {_OWN_LOSS}"
        )


def warn_of_still_budget(budget: MaskBudget, settings: SmootSettings, epochs: int) -> None:
    """Warn where no K can move by 1 % of the positions in the whole training, even if delta were 1 in every epoch.

    Args:
        budget: of the training set; one whose bounds are equal (sgt) is not meant to move.
        settings: of the method.
        epochs: of the whole training; K of a sample moves once in each.
    """
    step = settings.step_in_positions(budget.image_size)
    farthest, share = _FARTHEST[settings.rounding](step), settings.masked_share / settings.masked_every
    if step == 0 or budget.k_min == budget.k_max or farthest * epochs * share >= _NOTICEABLE_MOVE * budget.positions:
        return
    masked = "" if share == 1 else f", in {share:.3g} of which a sample is masked"
    advice = "" if settings.step_unit == "auto" else ", or leave step_unit at 'auto', which scales it with the image"
    logger.warning(
        f"K will hardly move: step_size={settings.step_size} with step_unit={settings.step_unit!r} and "
        f"rounding={settings.rounding!r} moves it by at most {farthest} of {budget.positions} {budget.unit} in an "
        f"epoch, and this training has {epochs}{masked}. Raise step_size{advice}"
    )


def warn_of_unseen_samples(budget: MaskBudget) -> None:
    """Warn where an epoch of a stream has not brought every index: its rows repeat some, or are fewer than was said."""
    seen = budget.count_visits()
    if seen < budget.num_samples:
        logger.warning(
            f"the stream has brought {seen} different sample_idx in this epoch, not num_train_samples="
            f"{budget.num_samples}: it has fewer rows; or it repeats an index, and rows of one index share one K; or "
            "several workers have cut it into incomplete batches, and the last ones were left out"
        )


def _arguments(forward: Callable) -> Mapping[str, inspect.Parameter] | None:
    """What a forward takes, by name; `None` for that of a scripted model, of which nothing is known."""
    try:
        return inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return None


def _declared_outputs(forward: Callable) -> list[type]:
    """The kinds of `ModelOutput` that a forward is annotated to return."""
    try:
        declared = typing.get_type_hints(forward).get("return")
    except (NameError, TypeError):  # names that exist for type checkers only
        return []
    kinds = typing.get_args(declared) or (declared,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ModelOutput)]


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


def _refuse_splits(dataset: Any) -> None:
    if isinstance(dataset, Mapping):
        splits = list(dataset)
        first = "train" if "train" in splits else next(iter(splits), "train")
        raise ValueError(
            f"train_dataset is a {type(dataset).__name__} of {splits}, and training takes one data set: pass one of "
            f"them, for example train_dataset=data[{first!r}]"
        )


def _refuse_training_set(dataset: Any, num_train_samples: int | None) -> None:
    if dataset is not None and has_index(dataset) and len(dataset) == 0:
        raise ValueError("train_dataset is empty: K needs at least one training sample")
    if dataset is None or has_index(dataset) or num_train_samples:
        return
    raise ValueError(
        f"train_dataset is a {type(dataset).__name__} without length and index, but a K per sample needs both. Set "
        f"num_train_samples= the number of its rows and give each row its index: {HOW_TO_INDEX}. Or load it with "
        "streaming=False (or datasets.Dataset.from_generator), or use method='standard'"
    )


def _refuse_count(dataset: Any, num_train_samples: int | None) -> None:
    """Raise where the rows of a training set that can be counted are said to be another number."""
    if num_train_samples and dataset is not None and has_index(dataset) and len(dataset) != num_train_samples:
        raise ValueError(
            f"num_train_samples={num_train_samples} is for streams, and train_dataset has {len(dataset)} samples: "
            "leave it away"
        )


def _refuse_graphs_of_shares(trainer: Trainer) -> None:
    if trainer.args.masked_share < 1 and runs_cuda_graphs(trainer.accelerator):
        raise ValueError(
            f"masked_share={trainer.args.masked_share} is refused with torch_compile_mode="
            f"{trainer.args.torch_compile_mode!r}: a CUDA graph would be recorded for every number of chosen samples. "
            "Leave the mode away, or set masked_share=1 with masked_every above 1"
        )


def _refuse_unsavable(trainer: Trainer) -> None:
    """Raise for a weight of two names that the model does not declare as tied (timm's CoaT): no checkpoint takes it."""
    # Where transformers itself saves: PEFT saves its adapters alone.
    declared = vars(trainer.model).get("all_tied_weights_keys")
    if trainer.args.save_strategy == "no" or declared is None:
        return
    names: dict[int, str] = {}
    for name, weight in trainer.model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(weight), name)
        if first != name and declared.keys().isdisjoint((first, name)):
            raise ValueError(
                f"{first} and {name} are one weight, which transformers does not save: each checkpoint would fail. "
                "Take another architecture, or set save_strategy='no' and save model.state_dict() by torch.save"
            )


# What the four layers override of `Trainer` without being promised that it exists: were one of these renamed, K would
# silently not be saved, say, or every image keep its first K.
PRIVATE_METHODS = (
    "_get_dataloader",
    "_get_num_items_in_batch",
    "_inner_training_loop",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_prepare_inputs",
    "_push_from_checkpoint",
    "_remove_unused_columns",
    "_run_epoch",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
)


def check_private_methods() -> None:
    """Refuse an installed transformers whose `Trainer` lacks a method that the layers override.

    Raises:
        ImportError: naming the methods and the installed version.
    """
    missing = [name for name in PRIVATE_METHODS if not hasattr(Trainer, name)]
    if missing:
        raise ImportError(
            f"SmootTrainer overrides {', '.join(missing)} of transformers.Trainer, which transformers "
            f"{transformers.__version__} does not have: training would silently go wrong. Install a newer smoot-hf, or "
            "an older transformers"
        )
