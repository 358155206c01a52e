"""The runs of a comparison: what shall be trained, what is finished already, and whether they can be compared."""

import importlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from command_line import make_parser, parse
from flags import METHODS, RecipeArguments
from run_record import RECORD_NAME, RunRecord, difference, settings_of
from train import make_trainer, prepare, train

from smoot_hf import SmootTrainingArguments
from smoot_hf.data import DecodedImages
from smoot_hf.fingerprint import fingerprints_differ
from smoot_hf.run_identity import RunIdentity
from smoot_hf.whole_checkpoints import newest_whole_checkpoint


class Run(NamedTuple):
    """A training run and its folder."""

    folder: Path
    record: RunRecord


class Plan(NamedTuple):
    """What one run shall be trained with."""

    args: SmootTrainingArguments
    recipe: RecipeArguments


def plan_runs(options: Namespace, flags: Sequence[str], output: Path) -> list[Plan]:
    """One plan per method and seed; seed by seed, so that a comparison cut short compares.

    Args:
        options: `recipe`, `methods` and `seeds`.
        flags: of recipes/train.py, for all runs.
        output: the runs' folders are made in its folder "runs".
    """
    parser = make_parser(importlib.import_module(f"train_{options.recipe}").DEFAULTS, "")
    plans = []
    for seed in dict.fromkeys(options.seeds):
        for method in (name for name in METHODS if name in options.methods):
            folder = output / "runs" / RunRecord(method, seed).name
            own = ["--method", method, "--seed", str(seed), "--output_dir", str(folder)]
            plans.append(Plan(*parse(parser, [*flags, *own])))
    return plans


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Finished runs.

    Raises:
        ValueError: a folder holds none.
    """
    runs = [Run(folder, RunRecord.load(folder)) for folder in folders]
    for folder, record in runs:
        if not record.is_finished:
            raise ValueError(f"{folder} holds a run that was not finished")
    return runs


def known_runs(plans: Sequence[Plan]) -> list[Run]:
    """Runs of an earlier call, finished or not.

    Raises:
        ValueError: one was trained with other settings than are asked for now.
    """
    runs = []
    for args, recipe in plans:
        folder = Path(args.output_dir)
        if (folder / RECORD_NAME).is_file():
            record = RunRecord.load(folder)
            other = difference(record.settings, settings_of(args, recipe))
            if other is not None:
                raise ValueError(f"{folder} was trained with {other}: choose another --output")
            runs.append(Run(folder, record))
    return runs


def check_comparable(runs: Sequence[Run], images: DecodedImages, dataset: str) -> None:
    """Refuse runs that cannot stand in one table.

    Args:
        runs: the runs.
        images: the training set that they must share.
        dataset: its name.

    Raises:
        ValueError: a run of other images, unlike settings, or two runs of one method and seed.
    """
    seen: dict[str, Path] = {}
    for folder, record in runs:
        if fingerprints_differ(record.dataset_fingerprint, images.fingerprint):
            trained_on = (record.settings or {}).get("dataset", "another data set")
            raise ValueError(f"{folder} was trained on other images ({trained_on}) than the training set of {dataset}")
        other = difference(record.settings, runs[0].record.settings)
        if other is not None:
            raise ValueError(f"{folder} cannot be compared with {runs[0].folder}: it was trained with {other}")
        if record.name in seen:
            raise ValueError(f"{folder} and {seen[record.name]} are both {record.method} with seed {record.seed}")
        seen[record.name] = folder


def train_missing(plans: Sequence[Plan]) -> list[Run]:
    """Train what is not finished yet; what was cut off goes on from its last checkpoint. The runs of all plans."""
    known = {run.folder: run.record for run in known_runs(plans)}
    for number, (args, recipe) in enumerate(plans, 1):
        folder = Path(args.output_dir)
        is_finished = folder in known and known[folder].is_finished
        if args.process_index == 0:
            what = "finished before, not trained again" if is_finished else "training"
            print(f"[{number}/{len(plans)}] {args.method}, seed {args.seed}: {what}", flush=True)
        if is_finished:
            continue
        if folder in known:
            asked = RunIdentity(method=args.method, seed=args.seed)
            args.resume_from_checkpoint = True if newest_whole_checkpoint(folder, asked=asked) else None
        task = prepare(args, recipe)
        train(make_trainer(task, args, recipe), args, recipe)
    # The first process alone writes the records, and goes on to read them.
    return read_runs([Path(args.output_dir) for args, _ in plans]) if plans[0].args.process_index == 0 else []
