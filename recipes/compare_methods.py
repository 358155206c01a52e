"""Compare standard training, SGT and SMOOT: accuracy and faithfulness over several seeds, in one report.

    accelerate launch recipes/compare_methods.py [--recipe digits] [--seeds 0 1 2] [--output FOLDER] [training flags]
    python recipes/compare_methods.py --runs FOLDER FOLDER ... [--recipe mnist] [--dataset DATA]

Time: a minute and a half for the digits (three methods, three seeds, 20 epochs) on one CPU core.

--recipe takes the settings of recipes/train_<recipe>.py; every other flag is one of recipes/train.py and holds for all
runs. A run that is found finished in the output folder is not trained again, one that was cut off goes on from its last
checkpoint. --runs evaluates finished runs in place of training: folders of recipes/train*.py, or any folder with a
saved model whose name says method and seed, as in `smoot-seed0`.

Every model is measured by both presets (the library's and the paper's) with two fills, corner and mean, on all test
images (--max_eval_samples: fewer). Beside each AUC stands that of the same model with the positions removed in random
order: an AUC that is not below it says nothing. What is written into the output folder:

  report.html                       everything below in one file, with nothing to load from elsewhere
  table.md, results.json            the numbers, per seed as well, with settings, versions, device and commit
  curves.png, saliency.png, k.png   deletion curves, saliency maps of the same images, K over the epochs
  runs/<method>-seed<seed>/         the trained models
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from budget_history import BudgetHistory
from checkpoints import load_checkpoint
from command_line import OneLineParser
from figures import Measured, draw_budgets, draw_curves, draw_saliency_grid
from method_report import comparison_results, comparison_table, write_method_report
from method_runs import Plan, Run, check_comparable, known_runs, plan_runs, read_runs, train_missing
from run_record import METHODS
from torch import Tensor
from train import load_data
from verdict import judge

from smoot_hf import Convention, Faithfulness, evaluate_faithfulness
from smoot_hf.attributions import LogitsModel, attribute
from smoot_hf.convention import DEFAULT, PAPER, resolve_convention
from smoot_hf.data import DecodedImages
from smoot_hf.functional.removal import Fill

RECIPES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
FILLS: tuple[Fill, ...] = ("corner", "mean")
_GRID_IMAGES = 8
_ONE_RUNS_FLAGS = ("--method", "--seed", "--output_dir", "--resume_from_checkpoint")

# method -> seed -> run
Runs = Mapping[str, Mapping[int, Run]]


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Train what is missing, evaluate, write the report.

    What a user can get wrong ends the process with one line on stderr and exit code 2, before training starts.

    Returns:
        The report; `None` on all processes but the first.
    """
    parser = make_comparison_parser()
    options, flags = parser.parse_known_args(argv)
    given = next((flag for flag in flags if flag.split("=")[0] in _ONE_RUNS_FLAGS), None)
    if given is not None:
        parser.error(f"{given} is a flag of a single run: use --methods, --seeds and --output")
    output = options.output or Path(f"runs/compare-{options.recipe}")
    plans = plan_runs(options, flags, output)
    args, recipe = plans[0]
    try:
        train_images, test = load_data(args, recipe)
        runs = read_runs(options.runs) if options.runs else known_runs(plans)
        check_comparable(runs, train_images, recipe.dataset)
        for run in runs:
            # Read once more after training, but before it nothing is lost.
            BudgetHistory.load(run.folder)
            if run.record.is_finished:
                load_checkpoint(str(run.folder), test, "cpu")
        runs = runs if options.runs else train_missing(plans)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    return compare(runs, test, plans[0], options.recipe, output) if args.process_index == 0 else None


def make_comparison_parser() -> OneLineParser:
    """The parser of what is not a flag of a single training run."""
    parser = OneLineParser(
        (),
        description=__doc__,
        usage="%(prog)s [--flag VALUE ...] [flags of recipes/train.py]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", choices=RECIPES, default="digits", help="Whose settings (default: digits).")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="Default: all three.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Default: 0 1 2.")
    parser.add_argument("--runs", nargs="+", type=Path, metavar="FOLDER", help="Evaluate these instead of training.")
    parser.add_argument("--output", type=Path, help="Folder to write to (default: runs/compare-RECIPE).")
    return parser


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
    pictures = draw(by_method, panels, histories, test, device, output)
    table = comparison_table(results)
    (output / "table.md").write_text(table, encoding="utf-8")
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
    pictures = {"curves": output / "curves.png"}
    draw_curves(panels, pictures["curves"])
    common = set.intersection(*(set(by_seed) for by_seed in by_method.values()))
    if common:
        seed = min(common)
        rows = [int((test.labels == label).argmax()) for label in sorted(set(test.labels.tolist()))[:_GRID_IMAGES]]
        maps = {method: saliency(by_seed[seed], test, rows, device) for method, by_seed in by_method.items()}
        batch = test.__getitems__(rows)
        names = [test.label_names[label] for label in batch["labels"].tolist()]
        pictures["saliency"] = output / "saliency.png"
        draw_saliency_grid(batch["pixel_values"].permute(0, 2, 3, 1) / 255, names, maps, seed, pictures["saliency"])
    found = {run.record.name: histories[run.folder] for run in by_method.get("smoot", {}).values()}
    known = {name: history for name, history in found.items() if history is not None}
    if known:
        pictures["k"] = output / "k.png"
        draw_budgets(known, pictures["k"])
    return pictures


def saliency(run: Run, test: DecodedImages, rows: list[int], device: torch.device) -> Tensor:
    """(n, H, W) on the CPU: magnitude of the gradient of the label's logit on the given test images."""
    model, pipeline = load_checkpoint(str(run.folder), test, device)
    batch = test.__getitems__(rows)
    images, labels = pipeline.normalize(batch["pixel_values"].to(device)), batch["labels"].to(device)
    return attribute(LogitsModel(model, pipeline.resize), images, labels, torch.tensor(rows)).cpu()


if __name__ == "__main__":
    main()
