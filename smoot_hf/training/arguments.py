"""The arguments that SMOOT adds to `TrainingArguments`."""

import copy
import json
import math
import re
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, Literal, cast

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from .settings import SmootSettings, require_count, require_number

logger = logging.get_logger(__name__)

# Of the metrics that this package reports: whether a greater value is better. `TrainingArguments` takes every name
# that does not end in "loss" for one of which greater is better.
GREATER_IS_BETTER = {
    "deletion_auc": False,
    "insertion_auc": True,
    "relevance_mass": True,
    "rank_accuracy": True,
    "pointing_game": True,
    "roc_auc": True,
    # Share of the top outside the evidence; the top follows the name, as in outside_0.1.
    "outside": False,
}

# Of the Trainer's arguments, those that decide the trained weights.
_DECIDE_WEIGHTS = {
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("auto_find_batch_size", "train_sampling_strategy", "length_column_name", "dataloader_drop_last", "data_seed"),
    *(
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "warmup_ratio",
        "optim",
        "optim_args",
    ),
    *("optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("label_smoothing_factor", "average_tokens_across_devices", "neftune_noise_alpha", "bf16", "fp16", "tf32"),
    *("use_liger_kernel", "liger_kernel_config", "ddp_broadcast_buffers", "fsdp", "deepspeed"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
}
# These decide which weights are the best, where the best are taken.
_DECIDE_THE_BEST = {
    *("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps", "deletion_auc_samples"),
}


def _argument(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _of_settings(name: str) -> Any:
    """A field with the default and the help text that `SmootSettings` has for it."""
    setting = SmootSettings.__dataclass_fields__[name]
    return field(default=setting.default, metadata=setting.metadata)


# Without a `repr` of its own: that of `TrainingArguments` hides the tokens.
@dataclass(repr=False)
class SmootTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the fields of the method added; the inherited fields keep their defaults.

    The defaults follow the equations of the paper to the letter where they are sound. Pixels and cells are counted in
    the images that the mask acts on, before an `InputPipeline` resizes them to the model's input.

    Args:
        method, mask_ratio, ..., mask_fill: the settings of the method; `SmootSettings` documents each of them.
        deletion_auc_samples: every evaluation reports `deletion_auc` (`evaluate_faithfulness`; lower is better) over
            this many images of the evaluation set, so that it may be the `metric_for_best_model` (`greater_is_better`
            is then False by default); 0 leaves it out. It removes the cells that training masks (`mask_cell`).
        num_train_samples: number of rows of a training set that is a stream (`datasets.IterableDataset`), each of which
            holds its index in [0, num_train_samples) under `sample_idx`. The training then counts epochs and resumes as
            with any other data set. Without effect on data sets that have a length.
        mask_budget_sharded: with several processes, each holds the K of a range of the samples (`ShardedMaskBudget`) in
            place of all of them: 4 GB divided by the number of processes for a billion samples. K and the checkpoints
            are the same; checkpoints may be resumed with or without it, on any number of processes. Without effect on
            one process and in standard training.
        keep_freed_memory: on a CPU with glibc, keep freed memory in the process during training, and give it back at
            the end. SMOOT frees and allocates twice as much in each step as standard training, and otherwise waits for
            the pages of the system: with the CNN on two cores a step took 2.34 times that of standard training in
            place of 2.80 times. Off by default, since it changes the allocator of the whole process. It does nothing
            where the environment sets the allocator (`MALLOC_...`, `GLIBC_TUNABLES`).
        overwrite_output_dir: begin a new training although `output_dir` holds another one's checkpoints, which is
            refused otherwise. They stay until the new training writes one of the same step or `save_total_limit`
            removes them; `resume_from_checkpoint=True` passes over them.

    Raises:
        ValueError: a field is out of its range, or contradicts the direction of `metric_for_best_model`; the message
            names field, value and what is allowed.
    """

    method: Literal["standard", "sgt", "smoot"] = _of_settings("method")
    mask_ratio: float = _of_settings("mask_ratio")
    mask_ratio_min: float = _of_settings("mask_ratio_min")
    mask_ratio_max: float = _of_settings("mask_ratio_max")
    mask_cell: int = _of_settings("mask_cell")
    step_size: float = _of_settings("step_size")
    step_unit: Literal["auto", "pixels", "percent"] = _of_settings("step_unit")
    rounding: Literal["floor", "trunc", "nearest"] = _of_settings("rounding")
    alpha: float = _of_settings("alpha")
    top_n: int = _of_settings("top_n")
    delta_mode: Literal["rank", "class", "label"] = _of_settings("delta_mode")
    kl_weight: float = _of_settings("kl_weight")
    saliency_score: Literal["logit", "log_prob"] = _of_settings("saliency_score")
    signed_saliency: bool = _of_settings("signed_saliency")
    saliency_target: Literal["label", "predicted"] = _of_settings("saliency_target")
    saliency_pass: Literal["shared", "eval"] = _of_settings("saliency_pass")
    shared_dropout: bool = _of_settings("shared_dropout")
    kl_gradient: Literal["both", "masked"] = _of_settings("kl_gradient")
    masked_share: float = _of_settings("masked_share")
    masked_every: int = _of_settings("masked_every")
    mask_positions: Literal["least_salient", "random", "most_salient", "alternating"] = _of_settings("mask_positions")
    mask_fill: Literal["uniform", "mean", "other_image", "adversarial"] = _of_settings("mask_fill")
    fill_step: float = _of_settings("fill_step")
    deletion_auc_samples: int = _argument(
        0, "Report deletion_auc (lower is better) over this many evaluation images at every evaluation; 0: do not."
    )
    num_train_samples: int | None = _argument(
        None, "Rows of a training set that is a stream, each with its number under sample_idx (default: no stream)."
    )
    mask_budget_sharded: bool = _argument(
        False,
        "With several processes, each holds the K of a range of the samples in place of all of them (4 bytes each). "
        "The results are the same.",
    )
    keep_freed_memory: bool = _argument(
        False,
        "On a CPU with glibc: keep freed memory in the process during training. A step of smoot then took 2.34 times "
        "that of standard training, not 2.80 times (the CNN, two cores). Changes the whole process's allocator.",
    )
    overwrite_output_dir: bool = _argument(
        False,
        "Begin a new training although output_dir holds another one's checkpoints; they stay, and are passed over when "
        "this one is resumed.",
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None:
            self.greater_is_better: bool | None = greater_is_better(self.metric_for_best_model)
        self.check_smoot_fields()
        super().__post_init__()

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> "SmootTrainingArguments":
        """The same arguments with SMOOT's defaults added, so that a script may pass `TrainingArguments`.

        Every value is taken over as it stands, and nothing of `args` is computed again or changed. A class that derives
        from `TrainingArguments` keeps its fields and methods: the result is an instance of both.

        Raises:
            TypeError: `args` are no `TrainingArguments`, or their class gives a name of SMOOT another meaning.
        """
        if not isinstance(args, TrainingArguments):
            raise TypeError(f"args must be SmootTrainingArguments or TrainingArguments, got {type(args).__name__}")
        kind: Any = type(args)
        smoot_args = copy.copy(args)
        smoot_args.__class__ = _with_smoot_fields(kind)
        for f in _smoot_fields():
            setattr(smoot_args, f.name, f.default)
        greater = greater_is_better(args.metric_for_best_model)
        if greater is not None and bool(args.greater_is_better) != greater:
            # Whether the user gave it or TrainingArguments did cannot be told apart any more.
            logger.warning(
                f"greater_is_better={args.greater_is_better} becomes {greater}, which metric_for_best_model="
                f"{args.metric_for_best_model!r} asks for; TrainingArguments does not know this metric"
            )
            smoot_args.greater_is_better = greater
        return cast(SmootTrainingArguments, smoot_args)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but `hub_token`, for the Trainer pushes its pickled arguments to the Hub."""
        return self.__dict__ | {"hub_token": None}

    @property
    def settings(self) -> SmootSettings:
        """What one step and the mask budget need to know, checked.

        Raises:
            ValueError: a field is out of its range.
        """
        return SmootSettings(**{f.name: getattr(self, f.name) for f in fields(SmootSettings)})

    def step_in_positions(self, image_size: tuple[int, int]) -> float:
        """mu in the positions that K counts, for images of (H, W): pixels, or cells (`mask_cell`)."""
        return self.settings.step_in_positions(image_size)

    def changed_from_defaults(self) -> dict[str, Any]:
        """What decides the weights, beside method and seed: the arguments that differ from their defaults, by name.

        They are compared with the fields' defaults, since making a second instance would reset accelerate's state.
        """
        values = self.to_dict()
        names = _DECIDE_WEIGHTS | {f.name for f in fields(SmootSettings)} - {"method", "seed"}
        if self.load_best_model_at_end:
            names |= _DECIDE_THE_BEST
        changed = {
            f.name: values[f.name]
            for f in fields(self)
            if f.name in names and f.name in values and (values[f.name] or None) != (_default(f) or None)
        }
        return json.loads(json.dumps(changed, default=str, sort_keys=True))

    def check_smoot_fields(self) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: naming the field, its value and the range.
        """
        _ = self.settings
        for name in ("overwrite_output_dir", "keep_freed_memory", "mask_budget_sharded"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        # Of the Trainer's own as well, which it divides by, or passes on hours later.
        for name in ("learning_rate", "weight_decay"):
            require_number(name, getattr(self, name), 0, math.inf)
        require_count("deletion_auc_samples", self.deletion_auc_samples, 0)
        if self.num_train_samples is not None:
            require_count("num_train_samples", self.num_train_samples, 1)
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
            require_count(name, getattr(self, name), 1)
        self._check_direction()

    def _check_direction(self) -> None:
        """Refuse arguments by which the worst checkpoint would be kept, or the learning rate fall as it improves."""
        greater = greater_is_better(self.metric_for_best_model)
        if greater is None:
            return
        if bool(self.greater_is_better) != greater:
            raise ValueError(
                f"greater_is_better={self.greater_is_better} contradicts metric_for_best_model="
                f"{self.metric_for_best_model!r}, of which a {'greater' if greater else 'smaller'} value is better: "
                f"leave it away, or set greater_is_better={greater}"
            )
        # The two schedules that follow the metric. Both take "min" where nothing is said.
        kwargs = self.lr_scheduler_kwargs if isinstance(self.lr_scheduler_kwargs, dict) else {}
        mode, expected = kwargs.get("mode", "min"), "max" if greater else "min"
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY) and mode != expected:
            raise ValueError(
                f"lr_scheduler_type={str(self.lr_scheduler_type)!r} follows metric_for_best_model="
                f"{self.metric_for_best_model!r}, of which a {'greater' if greater else 'smaller'} value is better, "
                f"but its mode is {mode!r}: set lr_scheduler_kwargs={{'mode': {expected!r}}}"
            )


def greater_is_better(metric: str | None) -> bool | None:
    """Whether a greater value of a metric is better; `None` where it is not one of this package.

    Args:
        metric: its name as in `metric_for_best_model`, with or without the prefixes of an evaluation (`eval_`) and of
            one of several evaluation sets (`eval_NAME_`).
    """
    without_top = re.sub(r"(?<=outside)_[0-9.]+$", "", metric or "")
    for name, greater in GREATER_IS_BETTER.items():
        if without_top == name or without_top.endswith(f"_{name}"):
            return greater
    return None


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


@cache
def _with_smoot_fields(kind: Any) -> Any:
    """The class of the arguments of `kind` with those of SMOOT; the methods of `kind` come first.

    Raises:
        TypeError: `kind` gives a name of SMOOT another meaning.
    """
    if kind is TrainingArguments:
        return SmootTrainingArguments
    added = vars(SmootTrainingArguments).keys() - vars(object).keys() - vars(TrainingArguments).keys()
    taken = sorted(name for name in added if not name.startswith("__") and hasattr(kind, name))
    if taken:
        raise TypeError(
            f"{kind.__name__}.{taken[0]} has a name that SmootTrainingArguments gives another meaning: rename it, or "
            f"derive {kind.__name__} from SmootTrainingArguments"
        )
    return make_dataclass(
        f"Smoot{kind.__name__}",
        [],
        bases=(kind, SmootTrainingArguments),
        repr=False,
        # The class has no module from which a pickle of its instances could import it.
        namespace={"__reduce__": lambda self: (_without_values, (kind,), self.__getstate__())},
    )


def _without_values(kind: Any) -> Any:
    """What a pickle of such arguments begins with; it then sets the values."""
    combined = _with_smoot_fields(kind)
    return combined.__new__(combined)


def _smoot_fields() -> list[Any]:
    inherited = {f.name for f in fields(TrainingArguments)}
    return [f for f in fields(SmootTrainingArguments) if f.name not in inherited]
