"""Where the time of one step of smoot goes, part by part, beside the parts of a standard step.

    python recipes/benchmarks/step_parts.py [--model cnn] [--batch 64] [--steps 9] [--compile] [--output FILE.json]

Time on one CPU core: half a minute for the CNN, a minute for DeiT-tiny at 224x224 with `--batch 8`.

The step is the one of `masked_step` with the default settings, written down part by part; before anything is timed its
loss must be that of `masked_step`, bit for bit. The two steps take turns, and the ratio of a part is to the standard
step of the same turn. By the cost model (docs/costs.md) a forward pass and the saliency are a third each, the backward
pass of the standard step two thirds and that of smoot four. Reading and moving K are left out.

As in training_step.py, a single thread on a CPU is timed by the processor, and freed memory is kept. With `--compile`
the clean forward pass and the saliency are one graph, and so one part.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from training_step import EPOCH, MODELS, arguments_of, now

from smoot_hf import functional as SF
from smoot_hf.training.allocator import freed_memory_kept
from smoot_hf.training.clean_pass import compiled_pass, shared_pass, without_image_gradient
from smoot_hf.training.masked_step import masked_step


class Clock:
    """Seconds of each part of a step: a part ends where the clock is called with its name."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self.last = now(device)

    def __call__(self, part: str) -> None:
        """End a part."""
        end = now(self.device)
        self.seconds[part], self.last = end - self.last, end


# Runs the forward passes and gives the loss, whose backward pass follows.
Loss = Callable[[Clock], Tensor]


def make_losses(name: str, batch: int, device: torch.device, is_compiled: bool) -> tuple[nn.Module, dict[str, Loss]]:
    """The model, and the losses of both steps on the same batch."""
    make, _, shape, cell = MODELS[name]
    model = make().to(device).train()
    network = torch.compile(model) if is_compiled else model
    clean_pass = compiled_pass() if is_compiled else shared_pass
    weights, args = list(model.parameters()), arguments_of("smoot", cell)
    images, labels = torch.randn(batch, *shape, device=device), torch.randint(10, (batch,), device=device)
    sample_idx = torch.arange(batch, device=device)
    k = torch.full((batch,), torch.Size(SF.cell_grid(shape[1:], cell)).numel() // 2, device=device)

    def standard(clock: Clock) -> Tensor:
        loss = SF.classification_loss(network(pixel_values=images).logits, labels).mean()
        clock("forward")
        return loss

    def smoot(clock: Clock) -> Tensor:
        leaf = images.clone().requires_grad_()
        # Both views draw the same dropout.
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            if is_compiled:
                _, logits, gradient = clean_pass(model, leaf, labels, "logit", {})
                clock("clean forward and saliency")
            else:
                logits = model(pixel_values=leaf).logits
                clock("clean forward")
        if not is_compiled:
            score = SF.ranking_score(logits, labels, "logit").sum()
            (gradient,) = torch.autograd.grad(score, leaf, retain_graph=True)
            logits = without_image_gradient(logits, weights)
            clock("saliency")
        saliency = SF.cell_sum(SF.channel_mean(gradient, args.signed_saliency), cell)
        is_masked = SF.spread_cells(SF.least_salient_mask(saliency, k), cell, images.shape[2:])
        clock("ranking")
        noise = SF.counter_uniform(args.seed, EPOCH, sample_idx, shape)
        clock("noise")
        masked = torch.where(is_masked, SF.uniform_fill(images, is_masked, noise), images)
        clock("fill")
        masked_logits = network(pixel_values=masked).logits
        clock("masked forward")
        return (SF.classification_loss(logits, labels) + SF.kl_divergence(logits, masked_logits)).mean()

    torch.manual_seed(0)
    expected = masked_step(
        network, images, labels, sample_idx, k, EPOCH, args.settings,
        saliency_model=model, weights=weights, clean_pass=clean_pass,
    )  # fmt: skip
    torch.manual_seed(0)
    if not torch.equal(smoot(Clock(device)), (expected.ce + args.settings.kl_factor * expected.kl).mean()):
        raise AssertionError("the parts do not add up to masked_step")
    return model, {"standard": standard, "smoot": smoot}


def seconds_of_parts(loss: Loss, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, float]:
    """Time of each part of one whole step."""
    clock = Clock(device)
    total = loss(clock)
    total.backward()
    clock("backward")
    optimizer.step()
    optimizer.zero_grad()
    clock("optimizer")
    return clock.seconds


def measure(
    model: nn.Module, losses: dict[str, Loss], turns: int, device: torch.device
) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of each part's time, and of its ratio to the standard step of the turn with its extremes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    measured = []
    for _ in range(turns + 2):
        measured.append({way: seconds_of_parts(loss, optimizer, device) for way, loss in losses.items()})
        for parts in measured[-1].values():
            parts["sum"] = sum(parts.values())
    measured = measured[2:]
    results: dict[str, dict[str, dict[str, float]]] = {}
    for way in losses:
        results[way] = {}
        for part in measured[0][way]:
            ratios = [turn[way][part] / turn["standard"]["sum"] for turn in measured]
            ms = statistics.median(1000 * turn[way][part] for turn in measured)
            results[way][part] = {
                "ms": ms, "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)
            }  # fmt: skip
    return results


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="cnn", help="What to measure (default cnn).")
    parser.add_argument("--batch", type=int, default=64, help="Images in a step (default 64).")
    parser.add_argument("--steps", type=int, default=9, help="Turns to measure, after two to warm up (default 9).")
    parser.add_argument("--compile", action="store_true", help="Compile both steps.")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/step_parts.json"), help="JSON file.")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, losses = make_losses(arguments.model, arguments.batch, device, arguments.compile)
    with freed_memory_kept(device.type == "cpu"):
        results = measure(model, losses, arguments.steps, device)
    compiled = ", compiled" if arguments.compile else ""
    print(f"{arguments.model}, batch {arguments.batch}{compiled}, {torch.get_num_threads()} threads")
    for way, parts in results.items():
        print(f"{way:<28}{'ms':>10}{'ratio':>8}   min .. max")
        for part, r in parts.items():
            print(f"  {part:<26}{r['ms']:>10.1f}{r['ratio']:>8.3f}   {r['ratio_min']:.3f} .. {r['ratio_max']:.3f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value if key != "output" else str(value) for key, value in vars(arguments).items()}
    settings |= {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    arguments.output.write_text(json.dumps({"settings": settings, "results": results}, indent=2))


if __name__ == "__main__":
    main()
