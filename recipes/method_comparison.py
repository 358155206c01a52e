"""The comparison of training methods, evaluated: every run by both presets, the figures, and the report."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from budget_history import BudgetHistory
from checkpoints import load_checkpoint
from figures import Measured, draw_budgets, draw_curves, draw_saliency_grid, try_to_draw
from flags import METHODS
from method_report import comparison_results, comparison_table, write_method_report
from method_runs import Plan, Run
from run_record import write_whole
from torch import Tensor
from verdict import judge

from smoot_hf import Convention, Faithfulness, evaluate_faithfulness
from smoot_hf.attributions import LogitsModel, attribute
from smoot_hf.convention import DEFAULT, PAPER, resolve_convention
from smoot_hf.data import DecodedImages
from smoot_hf.functional.removal import Fill

FILLS: tuple[Fill, ...] = ("corner", "mean")
_GRID_IMAGES = 8

# method -> seed -> run
Runs = Mapping[str, Mapping[int, Run]]


def compare(runs: Sequence[Run], test: DecodedImages, plan: Plan, recipe_name: str, output: Path) -> Path:
    """Evaluate all runs and write everything; returns the report."""
    output.mkdir(parents=True, exist_ok=True)
    device = plan.args.device
    by_method = {
        method: {run.record.seed: run for run in runs if run.record.method == method}
        for method in METHODS
        if any(run.record.method == method for run in runs)
    }
    panels = measure(by_method, test, device, plan.args.per_device_eval_batch_size)
    verdicts = {convention: judge(found) for convention, found in panels.items()}
    histories = {run.folder: BudgetHistory.load(run.folder) for run in runs}
    settings = {
        "recipe": recipe_name,
        "dataset": plan.recipe.dataset,
        "test_images": len(test),
        "methods": list(by_method),
        "seeds": sorted({run.record.seed for run in runs}),
        "training": runs[0].record.settings or "not recorded",
    }
    results = comparison_results(settings, panels, verdicts, by_method, histories, device)
    results.save(output / "results.json")
    table = comparison_table(results)
    write_whole(output / "table.md", table)
    pictures = draw(by_method, panels, histories, test, device, output)
    report = output / "report.html"
    write_method_report(report, results, verdicts, pictures)
    print(f"\n{table}\nwritten to {report}, with table.md, results.json and the figures beside it")
    return report


def measure(
    by_method: Runs, test: DecodedImages, device: torch.device, batch_size: int
) -> dict[Convention, dict[str, dict[int, Faithfulness]]]:
    """Every run by both presets with every fill: convention -> method -> seed -> measurement."""
    conventions = [resolve_convention(preset, fill=fill) for preset in (PAPER, DEFAULT) for fill in FILLS]
    panels: dict[Convention, dict[str, dict[int, Faithfulness]]] = {
        convention: {method: {} for method in by_method} for convention in conventions
    }
    runs = [run for by_seed in by_method.values() for run in by_seed.values()]
    for number, (folder, record) in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {record.method}, seed {record.seed}: evaluating", flush=True)
        model, pipeline = load_checkpoint(str(folder), test, device)
        for convention in conventions:
            panels[convention][record.method][record.seed] = evaluate_faithfulness(
                model,
                test,
                convention=convention,
                curves=("insertion", "random"),
                input_pipeline=pipeline,
                batch_size=batch_size,
            )
    return panels


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
    """The first test image of each class, and its saliency by the models of one seed."""
    rows = [int((test.labels == label).argmax()) for label in sorted(set(test.labels.tolist()))[:_GRID_IMAGES]]
    maps = {method: saliency(by_seed[seed], test, rows, device) for method, by_seed in by_method.items()}
    batch = test.__getitems__(rows)
    names = [test.label_names[label] for label in batch["labels"].tolist()]
    draw_saliency_grid(batch["pixel_values"].permute(0, 2, 3, 1) / 255, names, maps, seed, path)


def saliency(run: Run, test: DecodedImages, rows: list[int], device: torch.device) -> Tensor:
    """(n, H, W) on the CPU: magnitude of the gradient of the label's logit on the given test images."""
    model, pipeline = load_checkpoint(str(run.folder), test, device)
    batch = test.__getitems__(rows)
    images, labels = pipeline.normalize(batch["pixel_values"].to(device)), batch["labels"].to(device)
    return attribute(LogitsModel(model, pipeline.resize), images, labels, torch.tensor(rows)).cpu()
