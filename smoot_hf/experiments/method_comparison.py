"""A comparison of training methods: its runs, trained where they are missing, and their evaluation."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..data.decoded_images import DecodedImages
from ..errors import first_line
from ..evaluation import (
    Convention,
    Faithfulness,
    Localisation,
    NothingToMeasureError,
    RefereeMatrix,
    Results,
    compare_faithfulness,
    compare_localisation,
    evaluate_faithfulness,
    evaluate_localisation,
    on_shared_images,
    referee_matrix,
)
from ..evaluation.attributions import attribute
from ..evaluation.comparison import Compared
from ..evaluation.convention import DEFAULT, PAPER, resolve_convention
from ..evaluation.results import describe_environment
from ..fingerprint import fingerprints_differ
from ..functional.removal import Fill
from ..models.logits import LogitsModel
from ..training import SmootTrainingArguments
from ..training.checkpoint_folder import RunIdentity, newest_whole_checkpoint
from .arguments import make_parser, parse
from .checkpoint import load_checkpoint
from .figures import Measured, draw_budgets, draw_curves, draw_saliency_grid, try_to_draw
from .flags import METHODS, RecipeArguments
from .recipes import RECIPES
from .report import (
    LOCALISATION_COLUMNS,
    comparison_table,
    localisation_rows,
    referee_rows,
    removal_rows,
    training_row,
    write_method_report,
)
from .run import RECORD_NAME, BudgetHistory, Run, RunRecord, difference, settings_of, write_whole
from .training_run import make_trainer, prepare, train
from .verdict import Verdict, judge

FILLS: tuple[Fill, ...] = ("corner", "mean")
# How the methods judge each other's maps.
REFEREE = resolve_convention(DEFAULT, fill=FILLS[0])
# What the methods are compared by where positions are removed: metric -> argument of `compare_faithfulness`.
REMOVAL: dict[str, Compared] = {"gap": "gap", "deletion_auc": "deletion"}
_GRID_IMAGES = 8

Measurable = TypeVar("Measurable", Faithfulness, Localisation, list[Localisation], RefereeMatrix)
# method -> seed -> run
Runs = Mapping[str, Mapping[int, Run]]


class Plan(NamedTuple):
    """What one run shall be trained with."""

    args: SmootTrainingArguments
    recipe: RecipeArguments


def plan_runs(options: Namespace, flags: Sequence[str], output: Path) -> list[Plan]:
    """One plan per method and seed; seed by seed, so that a comparison cut short compares.

    Args:
        options: `recipe`, `methods` and `seeds`.
        flags: of `smoot-hf train`, for all runs.
        output: the runs' folders are made in its folder "runs".
    """
    parser = make_parser(RECIPES[options.recipe], "")
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


class Found(NamedTuple):
    """Everything that was measured.

    Attributes:
        panels: convention -> method -> seed -> removal.
        localisation: method -> seed -> localisation, over the images that all methods of a seed classify correctly;
            empty where the test images do not say where their evidence is.
        referees: seed -> the maps of every method judged by every method; of the seeds that all methods have, and
            empty for a single method.
    """

    panels: dict[Convention, dict[str, dict[int, Faithfulness]]]
    localisation: dict[str, dict[int, Localisation]]
    referees: dict[int, RefereeMatrix]


def compare(runs: Sequence[Run], test: DecodedImages, plan: Plan, recipe_name: str, output: Path) -> Path:
    """Evaluate all runs and write everything; returns the report."""
    output.mkdir(parents=True, exist_ok=True)
    device = plan.args.device
    by_method = {
        method: {run.record.seed: run for run in runs if run.record.method == method}
        for method in METHODS
        if any(run.record.method == method for run in runs)
    }
    found = measure(by_method, test, device, plan.args.per_device_eval_batch_size)
    verdicts = judge_all(found)
    histories = {run.folder: BudgetHistory.load(run.folder) for run in runs}
    settings = {
        "recipe": recipe_name,
        "dataset": plan.recipe.dataset,
        "planted": plan.recipe.planted,
        "test_images": len(test),
        "methods": list(by_method),
        "seeds": sorted({run.record.seed for run in runs}),
        "training": runs[0].record.settings or "not recorded",
    }
    rows = [
        *localisation_rows(found.localisation),
        *removal_rows(found.panels, by_method),
        *referee_rows(found.referees),
        *(verdict.to_row() for verdict in verdicts),
        *(training_row(method, by_seed, histories) for method, by_seed in by_method.items()),
    ]
    results = Results("compare_methods", settings, describe_environment(device), rows)
    results.save(output / "results.json")
    table = comparison_table(results, verdicts)
    write_whole(output / "table.md", table)
    pictures = draw(by_method, found.panels, histories, test, device, output)
    report = output / "report.html"
    write_method_report(report, results, verdicts, pictures)
    print(f"\n{table}\nwritten to {report}, with table.md, results.json and the figures beside it")
    return report


def measure(by_method: Runs, test: DecodedImages, device: torch.device, batch_size: int) -> Found:
    """Every run by both presets with every fill, by its localisation, and by the other methods of its seed.

    What cannot be measured of a model, such as the localisation of one that gets no image right, is told in one line
    and left out.
    """
    conventions = [resolve_convention(preset, fill=fill) for preset in (PAPER, DEFAULT) for fill in FILLS]
    found = Found({convention: {method: {} for method in by_method} for convention in conventions}, {}, {})
    count, number = sum(map(len, by_method.values())), 0
    for seed in sorted({seed for by_seed in by_method.values() for seed in by_seed}):
        of_seed = {method: by_seed[seed] for method, by_seed in by_method.items() if seed in by_seed}
        loaded = {method: load_checkpoint(str(run.folder), test, device) for method, run in of_seed.items()}
        localised = {}
        for method, (model, pipeline) in loaded.items():
            number += 1
            print(f"[{number}/{count}] {method}, seed {seed}: evaluating", flush=True)
            options: dict[str, Any] = {"input_pipeline": pipeline, "batch_size": batch_size}
            for convention in conventions:
                removal = partial(evaluate_faithfulness, model, test, convention=convention, **options)
                measured = unless_nothing(removal, f"{method}, seed {seed}: faithfulness")
                if measured is not None:
                    found.panels[convention][method][seed] = measured
            if test.evidence is not None:
                localisation = partial(evaluate_localisation, model, test, **options)
                localised[method] = unless_nothing(localisation, f"{method}, seed {seed}: localisation")
        known = {method: one for method, one in localised.items() if one is not None}
        if known:
            shared = unless_nothing(partial(on_shared_images, *known.values()), f"seed {seed}: localisation")
            for method, one in zip(known, shared or (), strict=False):
                found.localisation.setdefault(method, {})[seed] = one
        if len(loaded) == len(by_method) > 1:
            models = {method: checkpoint.model for method, checkpoint in loaded.items()}
            # Runs of one comparison have the same training images and settings, and so the same pipeline.
            judged = partial(referee_matrix, models, test, convention=REFEREE, **options)
            matrix = unless_nothing(judged, f"seed {seed}: each method's maps by the others' models")
            if matrix is not None:
                found.referees[seed] = matrix
    panels = {
        convention: {method: by_seed for method, by_seed in measured.items() if by_seed}
        for convention, measured in found.panels.items()
    }
    return found._replace(panels={convention: measured for convention, measured in panels.items() if measured})


def unless_nothing(measure: Callable[[], Measurable], what: str) -> Measurable | None:
    """A measurement; where there is nothing to measure `None`, and a line that says of `what`, and why."""
    try:
        return measure()
    except NothingToMeasureError as error:
        print(f"{what} is left out: {first_line(error)}", flush=True)
        return None


def judge_all(found: Found) -> list[Verdict]:
    """Localisation first, then by every convention the gap, which leads, and the area."""
    verdicts = []
    if found.localisation:
        first = next(iter(next(iter(found.localisation.values())).values()))
        for score in LOCALISATION_COLUMNS:
            by_score = partial(compare_localisation, score=score)
            verdicts += judge(found.localisation, score, {"description": first.description}, by_score)
    for convention, measured in found.panels.items():
        for metric, curve in REMOVAL.items():
            verdicts += judge(measured, metric, convention.to_dict(), partial(compare_faithfulness, curve=curve))
    return verdicts


def draw(
    by_method: Runs,
    panels: Mapping[Convention, Measured],
    histories: Mapping[Path, BudgetHistory | None],
    test: DecodedImages,
    device: torch.device,
    output: Path,
) -> dict[str, Path]:
    """Draw every figure that the runs have something for: "curves", "saliency", "k" -> file."""
    found = {run.record.name: histories[run.folder] for run in by_method.get("smoot", {}).values()}
    known = {name: history for name, history in found.items() if history is not None}
    pictures: dict[str, Callable[[Path], None]] = {"curves": partial(draw_curves, panels)}
    common = set.intersection(*(set(by_seed) for by_seed in by_method.values()))
    if common:
        pictures["saliency"] = partial(draw_saliency, by_method, min(common), test, device)
    if known:
        pictures["k"] = partial(draw_budgets, known)
    return {name: output / f"{name}.png" for name, one in pictures.items() if try_to_draw(one, output / f"{name}.png")}


def draw_saliency(by_method: Runs, seed: int, test: DecodedImages, device: torch.device, path: Path) -> None:
    """The first test image of each class, and its saliency by the models of one seed, the evidence outlined."""
    rows = [int((test.labels == label).argmax()) for label in sorted(set(test.labels.tolist()))[:_GRID_IMAGES]]
    maps = {method: saliency(by_seed[seed], test, rows, device) for method, by_seed in by_method.items()}
    batch = test.__getitems__(rows)
    names = [test.label_names[label] for label in batch["labels"].tolist()]
    pictures = batch["pixel_values"].permute(0, 2, 3, 1) / 255
    draw_saliency_grid(pictures, names, maps, seed, path, batch.get("evidence"))


def saliency(run: Run, test: DecodedImages, rows: list[int], device: torch.device) -> Tensor:
    """(n, H, W) on the CPU: magnitude of the gradient of the label's logit on the given test images."""
    model, pipeline = load_checkpoint(str(run.folder), test, device)
    batch = test.__getitems__(rows)
    images, labels = pipeline.normalize(batch["pixel_values"].to(device)), batch["labels"].to(device)
    return attribute(LogitsModel(model, pipeline.resize), images, labels, torch.tensor(rows)).cpu()
