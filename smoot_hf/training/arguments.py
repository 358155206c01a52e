"""The arguments that SMOOT adds to `TrainingArguments`."""

import copy
import json
import math
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, Literal, cast, get_args

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of the metrics that this package reports: whether a greater value is better. `TrainingArguments` takes every name
# that does not end in "loss" for one of which greater is better.
GREATER_IS_BETTER = {"deletion_auc": False, "insertion_auc": True}

# Where and how a run is carried out, and what is looked at afterwards: none of it changes the trained weights.
_NO_SETTINGS = {
    *("method", "seed", "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "use_cpu", "log_level"),
    *("do_eval", "eval_strategy", "save_strategy", "save_total_limit", "logging_strategy", "logging_steps"),
    *("per_device_eval_batch_size", "resume_from_checkpoint", "remove_unused_columns", "dataloader_num_workers"),
    *("dataloader_pin_memory", "accelerator_config", "fsdp_config", "trackio_space_id"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
    *("hub_revision", "overwrite_output_dir"),
}


def _argument(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SmootTrainingArguments(TrainingArguments):
    """`TrainingArguments` and the fields of SMOOT; no inherited default differs.

    The defaults follow the equations of the paper to the letter where they are sound. Pixels are positions of the
    image as the trainer sees it, before any resizing to the model's input by an `InputPipeline`.

    Args:
        method: `"standard"` (cross-entropy alone), `"sgt"` (every image masked by the same K) or `"smoot"` (a K of
            its own for every image, Equation 4).
        mask_ratio: K at the start, and for sgt throughout, as a fraction of H*W; floored to pixels.
        mask_ratio_min: K_min of Equation 4, as a fraction of H*W.
        mask_ratio_max: K_max of Equation 4, as a fraction of H*W.
        step_size: mu of Equation 4, at least 0; with 0 smoot is sgt.
        step_unit: `"pixels"`, or `"percent"`: mu counts percentage points of H*W.
        rounding: of mu * delta (Equation 4): `"floor"` as printed, `"trunc"` or `"nearest"`.
        alpha: weight of the highest output in delta (Equation 3), in [0, 1].
        top_n: n of Equation 2, at least 1; cut to the number of classes.
        delta_mode: whose i-th highest output: `"rank"` (each distribution by its own order), `"class"` (the clean
            one's order) or `"label"` (the label first).
        kl_weight: lambda of Equation 5, at least 0.
        saliency_score: the output whose gradient is the saliency: `"logit"` or `"log_prob"`.
        signed_saliency: rank the gradient as it is (Algorithm 2), or its magnitude.
        saliency_target: the class whose score it is: `"label"` or `"predicted"`.
        saliency_pass: `"shared"` (one forward pass serves saliency and loss) or `"eval"` (a pass of its own, dropout
            off, batch statistics untouched).
        shared_dropout: clean and masked images see the same dropout draw, so that delta measures the mask alone.
        kl_gradient: `"both"`, or `"masked"`: f(X) is a constant teacher in the KL term.
        mask_fill: what replaces a pixel: `"uniform"` (Section 4.1) or `"mean"` (of its channel in that image).
        deletion_auc_samples: every evaluation reports `deletion_auc` (`evaluate_faithfulness`; lower is better) over
            this many images of the evaluation set, so that it may be the `metric_for_best_model` (`greater_is_better`
            is then False by default); 0 leaves it out.
        overwrite_output_dir: begin a new training although `output_dir` holds another one's checkpoints, which is
            refused otherwise. They stay until the new training writes one of the same step or `save_total_limit`
            removes them; `resume_from_checkpoint=True` passes over them.

    Raises:
        ValueError: a field is out of its range, or contradicts the direction of `metric_for_best_model`; the message
            names field, value and what is allowed.
    """

    method: Literal["standard", "sgt", "smoot"] = _argument(
        "smoot", "standard: cross-entropy alone. sgt: one fixed K for all images. smoot: each image's K adapts."
    )
    mask_ratio: float = _argument(0.5, "Initial K (for sgt: the K) as a fraction of the image's H*W pixels, in [0, 1].")
    mask_ratio_min: float = _argument(0.2, "K_min of Equation 4 as a fraction of H*W, in [0, mask_ratio] (smoot).")
    mask_ratio_max: float = _argument(0.8, "K_max of Equation 4 as a fraction of H*W, in [mask_ratio, 1] (smoot).")
    step_size: float = _argument(10.0, "mu of Equation 4: how far K moves for delta = 1, in step_unit; 0 = sgt.")
    step_unit: Literal["pixels", "percent"] = _argument(
        "pixels", "Unit of step_size: pixels, or percentage points of H*W (for images far above 32x32)."
    )
    rounding: Literal["floor", "trunc", "nearest"] = _argument(
        "floor", "Rounding of mu * delta in Equation 4. floor (as printed) costs a pixel for any negative delta; trunc."
    )
    alpha: float = _argument(0.8, "Weight of the highest output in delta, Equation 3, in [0, 1].")
    top_n: int = _argument(5, "n of Equation 2: how many of the highest outputs delta looks at, at least 1.")
    delta_mode: Literal["rank", "class", "label"] = _argument(
        "rank", "Whose i-th highest output: rank: each distribution's own; class: the clean order; label: label first."
    )
    kl_weight: float = _argument(1.0, "lambda of Equation 5: weight of KL(f(X) || f(X~)), at least 0.")
    saliency_score: Literal["logit", "log_prob"] = _argument(
        "logit", "The output whose input gradient is the saliency. log_prob gradients vanish as the model fits."
    )
    signed_saliency: bool = _argument(True, "Rank the gradient as it is (Algorithm 2); False: its magnitude.")
    saliency_target: Literal["label", "predicted"] = _argument("label", "The class whose score gives the saliency.")
    saliency_pass: Literal["shared", "eval"] = _argument(
        "shared", "shared: the training forward pass also gives the saliency; eval: a forward pass in eval mode does."
    )
    shared_dropout: bool = _argument(True, "Clean and masked images see the same dropout draw.")
    kl_gradient: Literal["both", "masked"] = _argument(
        "both", "Where the KL term's gradient flows: through both predictions, or the masked one alone."
    )
    mask_fill: Literal["uniform", "mean"] = _argument(
        "uniform", "What replaces a pixel: uniform noise in the range of what remains, or the channel's mean."
    )

    deletion_auc_samples: int = _argument(
        0, "Report deletion_auc (lower is better) over this many evaluation images at every evaluation; 0: do not."
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

    def step_in_pixels(self, image_size: tuple[int, int]) -> float:
        """mu in pixels of an image of (H, W)."""
        if self.step_unit == "pixels":
            return self.step_size
        return self.step_size / 100 * image_size[0] * image_size[1]

    def changed_from_defaults(self) -> dict[str, Any]:
        """What decides the weights, beside method and seed: the arguments that differ from their defaults, by name.

        They are compared with the fields' defaults, since making a second instance would reset accelerate's state.
        """
        values = self.to_dict()
        changed = {
            f.name: values[f.name]
            for f in fields(self)
            if f.name in values and f.name not in _NO_SETTINGS and (values[f.name] or None) != (_default(f) or None)
        }
        return json.loads(json.dumps(changed, default=str, sort_keys=True))

    def check_smoot_fields(self) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: naming the field, its value and the range.
        """
        for f in _smoot_fields():
            choices = get_args(f.type)
            if choices and getattr(self, f.name) not in choices:
                raise ValueError(
                    f"{f.name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, f.name)!r}"
                )
            if f.type is bool and not isinstance(getattr(self, f.name), bool):
                raise ValueError(f"{f.name} must be True or False, got {getattr(self, f.name)!r}")
        for name in ("mask_ratio", "mask_ratio_min", "mask_ratio_max", "alpha", "label_smoothing_factor"):
            _require(name, getattr(self, name), 0, 1)
        for name in ("step_size", "kl_weight", "learning_rate", "weight_decay"):
            _require(name, getattr(self, name), 0, math.inf)
        # Two of the Trainer's own as well, which it divides by or passes on hours later; so are the last two above.
        counts = {"top_n": 1, "deletion_auc_samples": 0}
        counts |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1}
        for name, low in counts.items():
            value = getattr(self, name)
            _require(name, value, low, math.inf)
            if value != int(value):
                raise ValueError(f"{name} must be a whole number, got {value}")
        if self.method == "smoot" and not self.mask_ratio_min <= self.mask_ratio <= self.mask_ratio_max:
            raise ValueError(
                "mask_ratio_min <= mask_ratio <= mask_ratio_max must hold, got "
                f"mask_ratio_min={self.mask_ratio_min}, mask_ratio={self.mask_ratio}, "
                f"mask_ratio_max={self.mask_ratio_max}"
            )
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
    for name, greater in GREATER_IS_BETTER.items():
        if metric is not None and (metric == name or metric.endswith(f"_{name}")):
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


def _require(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (low <= value <= high and math.isfinite(value)):
        allowed = f"in [{low}, {high}]" if math.isfinite(high) else f"finite and at least {low}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
