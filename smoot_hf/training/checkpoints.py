"""The layer of a Trainer that saves whole checkpoints, and resumes from those of its own run alone."""

import json
import os
import uuid
from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..errors import writing
from ..fingerprint import dataset_fingerprint
from .checkpoint_folder import (
    FSDP_OPTIMIZER_NAME,
    FSDP_WEIGHTS_NAME,
    RUN_IDENTITY_NAME,
    RunIdentity,
    begin_checkpoint,
    describe_engine,
    describe_engine_of,
    describe_model,
    find_damage,
    newest_whole_checkpoint,
    reasons_against,
    refuse_other_runs,
)

logger = logging.get_logger(__name__)


class CheckpointTrainer(Trainer):
    """The layer of checkpoints: after a crash at any moment, training goes on from its run's newest whole checkpoint.

    Where a checkpoint or a model cannot be written, the error names the folder, the reason and the remedy, and nothing
    that was saved before is lost.

    Attributes:
        run_identity: of the training under way, or of the last one; written into each of its checkpoints.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.run_identity = RunIdentity()
        # Ids of all trainings of this trainer: their checkpoints are not another's.
        self._own_runs: set[str] = set()
        # What `train` was called for: each batch size that is tried begins there.
        self._resumed_from: str | None = None
        self._trial: Any = None
        self._fingerprint: tuple[Any, str | None] = (None, None)
        super().__init__(*args, **kwargs)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As `Trainer.train`, with the checkpoints of one run.

        `resume_from_checkpoint=True` takes the newest whole checkpoint of the run that the output folder belongs to,
        and passes over others with a warning. A path is taken as it is, if it is whole, of this seed and this training
        set; another method is warned of. Without either a new run begins.

        Raises:
            ValueError: there is no such checkpoint, or the one that is named is not whole, or of another seed or
                training set; or a new run would begin among the checkpoints of another, without
                `overwrite_output_dir`.
        """
        if resume_from_checkpoint is True:
            asked = self._describe_run()
            resume_from_checkpoint = newest_whole_checkpoint(self.args.output_dir, self.accelerator, asked)
            if resume_from_checkpoint is None:
                raise ValueError(no_checkpoint(self.args.output_dir, asked))
        elif resume_from_checkpoint:
            if damage := find_damage(resume_from_checkpoint):
                raise ValueError(
                    f"{resume_from_checkpoint} is not a whole checkpoint: {damage}. Resume from an earlier checkpoint; "
                    "resume_from_checkpoint=True finds the newest that is whole"
                )
            # The seed of a trial is not known yet.
            if trial is None:
                self._require_same_run(resume_from_checkpoint)
        if resume_from_checkpoint:
            self._require_same_engine(resume_from_checkpoint)
        self._resumed_from, self._trial = resume_from_checkpoint or None, trial
        return super().train(resume_from_checkpoint, trial, *args, **kwargs)

    def dataset_fingerprint(self) -> str | None:
        """Of the training set (`smoot_hf.fingerprint`), computed once."""
        dataset, fingerprint = self._fingerprint
        if dataset is not self.train_dataset:
            fingerprint = dataset_fingerprint(self.train_dataset)
            self._fingerprint = self.train_dataset, fingerprint
        return fingerprint

    def _describe_run(self, run_id: str | None = None) -> RunIdentity:
        method = getattr(self.args, "method", None)
        return RunIdentity(run_id, method, self.args.seed, describe_model(self.model), self.dataset_fingerprint())

    def _require_same_run(self, checkpoint: str) -> None:
        """Refuse a checkpoint that was named, but is of another run; whether the weights fit shows when they load."""
        found, asked = RunIdentity.load(checkpoint), self._describe_run()
        if found is None:
            logger.warning(f"nothing in {checkpoint} says which run it is of (no {RUN_IDENTITY_NAME}): it is taken")
            return
        other = found.difference(RunIdentity(seed=asked.seed, dataset_fingerprint=asked.dataset_fingerprint))
        if other is not None:
            raise ValueError(
                f"{checkpoint} is of another run: {other}. Resume with the seed and the training set of that run; to "
                "begin a new training with its weights, load them by from_pretrained"
            )
        if found.method != asked.method:
            logger.warning(f"{checkpoint} was trained with method={found.method!r}: the rest is {asked.method!r}")

    def _require_same_engine(self, checkpoint: str) -> None:
        """Refuse a checkpoint whose weights and optimizer were written by another engine than is to read them."""
        is_of_fsdp, deepspeed = (
            os.path.isfile(os.path.join(checkpoint, FSDP_WEIGHTS_NAME)),
            describe_engine_of(checkpoint),
        )
        engines = {
            "FSDP": (is_of_fsdp, self.is_fsdp_enabled),
            "DeepSpeed": (deepspeed is not None, self.is_deepspeed_enabled),
        }
        remedy = "resume as it was begun, or begin a new training with its weights, by from_pretrained"
        for engine, (is_there, is_here) in engines.items():
            if is_there != is_here:
                there, here = ("with", "without") if is_there else ("without", "with")
                raise ValueError(
                    f"{checkpoint} was written {there} {engine}, and this training runs {here} it: {remedy}"
                )
        if self.is_deepspeed_enabled:
            stage = self.accelerator.state.deepspeed_plugin.zero_stage
            own = describe_engine(self.accelerator.num_processes, shards_weights=stage == 3)
            if deepspeed != own:
                raise ValueError(f"{checkpoint} was written by {deepspeed}, and this training runs {own}: {remedy}")

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Every training starts here: by `train`, for each trial of a search, and again for each batch size tried."""
        self._begin_run()
        return super()._inner_training_loop(*args, **kwargs)

    def _begin_run(self) -> None:
        """Take up the id of the run that is resumed, or begin one; on all processes together.

        Raises:
            ValueError: see `train`.
        """
        folder, checkpoint = self._get_output_dir(trial=self._trial), self._resumed_from
        resumed = None if checkpoint is None else RunIdentity.load(checkpoint)
        if checkpoint is None and not getattr(self.args, "overwrite_output_dir", False):
            self._together(refuse_other_runs, folder, self._own_runs)
        # One id for all processes: the first one's.
        run_id = uuid.uuid4().hex if resumed is None else str(resumed.run_id)
        if self.accelerator.num_processes > 1:
            run_id = broadcast_object_list([run_id])[0]
        self.run_identity = self._describe_run(run_id)
        self._own_runs.add(run_id)
        # A checkpoint that does not say which run it is of is all there is until there is a new one.
        if self.args.should_save and (checkpoint is None or resumed is not None):
            self._write_identity(folder)

    def _together(self, check: Callable[..., None], *args: Any) -> None:
        """Let a check that fails on one process end the training on all of them."""
        error: ValueError | None = None
        try:
            check(*args)
        except ValueError as raised:
            error = raised
        said = [None if error is None else str(error)]
        if self.accelerator.num_processes > 1:
            said = gather_object(said)
        message = next((line for line in said if line is not None), None)
        if message is not None:
            raise ValueError(message) from error

    def _write_identity(self, folder: str) -> None:
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
            self.run_identity.save(folder)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of the last step, in mid-epoch: the stock loop would take one step more before it looks.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial=trial)
        if self.args.should_save:
            checkpoint = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            with writing(run_dir):
                begin_checkpoint(checkpoint)
            self._write_identity(checkpoint)
        self.accelerator.wait_for_everyone()
        with writing(run_dir):
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self._write_identity(run_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with writing(output_dir or self.args.output_dir):
            super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What the first process writes next declares the checkpoint whole, and may cost the previous one its place.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled:
            return
        optimizer = FSDP_OPTIMIZER_NAME if self.is_fsdp_enabled else OPTIMIZER_NAME
        if any(not os.path.isfile(os.path.join(checkpoint, name)) for name in (optimizer, SCHEDULER_NAME)):
            logger.warning(
                f"{checkpoint} has no {optimizer} and {SCHEDULER_NAME} (save_only_model?): optimizer and learning "
                "rate start afresh"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled and has_other_names(self.model, resume_from_checkpoint):
            load_translated(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not is_sharded and has_other_names(self.model, best):
            load_translated(self.model, best)
        else:
            super()._load_best_model()


def no_checkpoint(output_dir: str, asked: RunIdentity) -> str:
    """What to say where nothing in a folder can be resumed, with what is there and why not."""
    reasons = [f"{os.path.basename(name)}: {reason}" for name, reason in reasons_against(output_dir, asked).items()]
    passed_over = f" ({'; '.join(reasons[:3])})" if reasons else ""
    return (
        f"resume_from_checkpoint=True: there is no whole checkpoint of this run in {output_dir}{passed_over}; leave it "
        "away to start afresh"
    )


def make_output_dir(args: TrainingArguments) -> None:
    """Make the output folder, before anything else is done.

    Raises:
        SaveError: it cannot be made.
    """
    if args.should_save:
        with writing(args.output_dir):
            os.makedirs(args.output_dir, exist_ok=True)


def has_other_names(model: nn.Module, folder: str) -> bool:
    """Whether the weights in `folder` are not name by name those of `model`: `from_pretrained` can tell why."""
    if not isinstance(model, PreTrainedModel):
        return False
    index, single = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME), os.path.join(folder, SAFE_WEIGHTS_NAME)
    if os.path.isfile(single):
        with safe_open(single, framework="pt") as file:
            names = set(file.keys())
    elif os.path.isfile(index):
        with open(index) as file:
            names = set(json.load(file)["weight_map"])
    else:
        return False
    return names != set(model.state_dict())


def load_translated(model: PreTrainedModel, folder: str) -> None:
    """Give `model` the weights of the checkpoint in `folder`, all of them.

    Raises:
        ValueError: the checkpoint lacks weights of the model, or has others: it is another architecture's.
    """
    # Sizes that differ are in the report as well, instead of in an error that does not name them.
    restored, report = type(model).from_pretrained(
        folder, config=model.config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(
                f"the weights in {folder} are not this model's: {kind} {sorted(map(str, report[kind]))[:5]}. "
                "Build the architecture that was saved, or do not resume from this checkpoint"
            )
    model.load_state_dict(restored.state_dict())
