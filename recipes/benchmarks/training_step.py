"""What a training step of each method costs, as a ratio to standard training.

    python recipes/benchmarks/training_step.py [--steps 15] [--models cnn deit-tiny] [--output FILE.json]

Time: about 4 minutes on two CPU cores. The methods take turns, step by step, so that a slow moment of the machine hits
all of them; ratios are taken within a turn, and their median is what to quote. The cost model says 7/3 = 2.33 for sgt
and smoot (README, "What it costs").
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from smoot_hf import MaskBudget, PaperCnnConfig, PaperCnnForImageClassification, SmootTrainingArguments
from smoot_hf import functional as SF
from smoot_hf.masked_step import masked_step

Method = Literal["standard", "sgt", "smoot"]
METHODS: tuple[Method, ...] = get_args(Method)
EPOCH = 0


def make_cnn() -> tuple[nn.Module, int, tuple[int, int, int]]:
    """The paper's CNN on MNIST: model, batch size, image shape."""
    config = PaperCnnConfig(image_size=28, num_channels=1, num_labels=10)
    return PaperCnnForImageClassification(config), 256, (1, 28, 28)


def make_deit() -> tuple[nn.Module, int, tuple[int, int, int]]:
    """DeiT-tiny on CIFAR-10 at its native size: model, batch size, image shape."""
    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=10,
    )
    return ViTForImageClassification(config), 64, (3, 32, 32)


MODELS = {"cnn": make_cnn, "deit-tiny": make_deit}


def make_step(model: nn.Module, batch: int, shape: tuple[int, int, int], method: Method) -> Callable[[], None]:
    """One training step without data loading: forward, backward, optimiser, K."""
    device = next(model.parameters()).device
    args = SmootTrainingArguments(output_dir="runs/benchmark", method=method, report_to="none")
    images, labels = torch.randn(batch, *shape, device=device), torch.randint(10, (batch,), device=device)
    sample_idx = torch.randperm(50_000, device=device)[:batch]
    budget = MaskBudget(50_000, shape[1:], device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        if method == "standard":
            loss = SF.classification_loss(model(pixel_values=images).logits, labels).mean()
        else:
            budget.begin_epoch(EPOCH)
            result = masked_step(model, images, labels, sample_idx, budget.read(sample_idx), EPOCH, args)
            if method == "smoot":
                budget.update(sample_idx, result.delta, args.step_size, args.rounding)
            loss = (result.ce + args.kl_weight * result.kl).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Wall-clock time of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, steps: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Median step time, and ratio to the standard step of the same turn with its extremes, of each method."""
    model, batch, shape = MODELS[name]()
    model.to(device).train()
    by_method = {method: make_step(model, batch, shape, method) for method in METHODS}
    for step in by_method.values():
        seconds(step, device)
    turns = [{method: seconds(step, device) for method, step in by_method.items()} for _ in range(steps)]
    results: dict[str, dict[str, float]] = {}
    for method in METHODS:
        ratios = [turn[method] / turn["standard"] for turn in turns]
        median = statistics.median(turn[method] for turn in turns)
        results[method] = {
            "ms": 1000 * median,
            "images_per_second": batch / median,
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return results


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=15, help="Turns to measure, after one to warm up (default 15).")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="What to measure.")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/training_step.json"), help="JSON file.")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {name: measure(name, arguments.steps, device) for name in arguments.models}
    print(f"{'model':<12}{'method':<10}{'ms':>9}{'img/s':>9}{'ratio':>8}   min .. max")
    for name, methods in results.items():
        for method, r in methods.items():
            times = f"{r['ms']:>9.1f}{r['images_per_second']:>9.0f}{r['ratio']:>8.2f}"
            print(f"{name:<12}{method:<10}{times}   {r['ratio_min']:.2f} .. {r['ratio_max']:.2f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    arguments.output.write_text(
        json.dumps({"settings": settings, "steps": arguments.steps, "results": results}, indent=2)
    )
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
