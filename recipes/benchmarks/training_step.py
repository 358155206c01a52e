"""What a training step of each method costs, as a ratio to the standard step of the same turn.

    python recipes/benchmarks/training_step.py [--models cnn] [--steps 9] [--compile [MODE]] [--bf16] [--checkpointing]
        [--output FILE.json]

Time, on two CPU cores: the CNN half a minute (a minute more with `--compile`), ResNet-18 a minute and a half, DeiT-tiny
with `--batch 64` three minutes, at 224x224 with `--batch 16` two; at their own batch sizes four times as long.
EfficientNet-lite0 at 224x224 with `--batch 4 --steps 1` half a minute. On a GPU all models together take a minute, and
each compiled model a minute more. The file is written again after every model.

The ways take turns, step by step, so that a slow moment of the machine hits all of them; ratios are taken within a
turn, and their median is what to quote. A step is forward, backward and AdamW; no data are loaded.

  standard     the cross-entropy of one forward pass: what a plain `Trainer` does.
  published    the published SGT step (published_sgt.py).
  naive        SGT as one would write it down: a forward pass for the saliency, and two more for the loss.
  sgt, smoot   ours; 7/3 = 2.33 by the cost model (README, "What it costs").
  masked       smoot with `kl_gradient="masked"` and `saliency_score="log_prob"`; 6/3 = 2.00.
  share        smoot with `masked_share=0.25`; 4/3 = 1.33, with batch statistics 4.75/3 = 1.58.
  compiled ..  the same with `torch_compile=True`; their ratio is to the compiled standard step (`--compile`, and
               `--compile reduce-overhead` for CUDA graphs).
  masking      what is neither forward, backward nor optimizer in a step of smoot: ranking, mask, fill, reading and
               moving K. Its ratio is its share of the step of smoot.

On a CPU freed memory is kept, as with `keep_freed_memory=True`; `--memory_as_found` leaves the C library to itself.

GPU ms, on CUDA alone: the time between two events around a step that the processor issues while the device is still
busy with something else. So it is the device's own time, in which the processor's is hidden, up to the thousand or so
kernels that fit into the queue; the step of `published` waits for the device, and nothing can be hidden there. ms is
the time on the clock of a step that begins and ends with an idle device; of a single thread on a CPU it is the time of
the processor, so that other programs on the machine do not count.

MB: most memory that is alive at once in a step beyond what is there between steps (gradients included). On a CPU it is
that of the tensors, and not known of compiled steps.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from live_memory import peak_bytes
from published_sgt import published_sgt_loss
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from smoot_hf import MaskBudget, PaperCnnConfig, PaperCnnForImageClassification, SmootTrainingArguments
from smoot_hf import functional as SF
from smoot_hf.training.allocator import freed_memory_kept
from smoot_hf.training.clean_pass import compiled_pass, shared_pass
from smoot_hf.training.masked_step import mask_images, masked_step

Step = Callable[[], None]
EPOCH = 0
SETTINGS: dict[str, dict[str, Any]] = {
    "sgt": {"method": "sgt"},
    "smoot": {},
    "masked": {"kl_gradient": "masked", "saliency_score": "log_prob"},
    "share": {"masked_share": 0.25},
}


def make_cnn() -> nn.Module:
    """The paper's CNN for MNIST."""
    return PaperCnnForImageClassification(PaperCnnConfig(image_size=28, num_channels=1, num_labels=10))


def make_deit(image_size: int, patch_size: int, width: int = 192) -> nn.Module:
    """DeiT-tiny; ViT-small with twice the width."""
    heads = {"num_hidden_layers": 12, "num_attention_heads": width // 64}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, **heads}
    return ViTForImageClassification(ViTConfig(image_size=image_size, patch_size=patch_size, num_labels=10, **sizes))


def make_resnet() -> nn.Module:
    """ResNet-18."""
    sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_labels=10, **sizes))


def make_lite0() -> nn.Module:
    """EfficientNet-lite0."""
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="tf_efficientnet_lite0", num_labels=10))


# Model, batch size, image shape, side of the masked cells.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, int, int], int]] = {
    "cnn": (make_cnn, 256, (1, 28, 28), 1),
    "resnet-18": (make_resnet, 256, (3, 32, 32), 1),
    "deit-tiny": (lambda: make_deit(32, 4), 256, (3, 32, 32), 1),
    "deit-tiny-224": (lambda: make_deit(224, 16), 64, (3, 224, 224), 1),
    "vit-small-224": (lambda: make_deit(224, 16, width=384), 64, (3, 224, 224), 16),
    "efficientnet-lite0": (make_lite0, 64, (3, 224, 224), 16),
}


def make_steps(
    name: str, batch: int, device: torch.device, mode: str | None, bf16: bool, checkpointing: bool
) -> dict[str, Step]:
    """One step of each way on the same model and batch; the compiled ones by a mode of `torch.compile`."""
    model = MODELS[name][0]().to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, _, shape, cell = MODELS[name]
    images, labels = torch.randn(batch, *shape, device=device), torch.randint(10, (batch,), device=device)
    sample_idx = torch.randperm(50_000, device=device)[:batch]
    weights = list(model.parameters())

    def optimized(loss: Callable[[], Tensor], after: Step = lambda: None) -> Step:
        optimizer = torch.optim.AdamW(weights, lr=1e-4)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                total = loss()
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            after()

        return step

    def standard(network: nn.Module) -> Callable[[], Tensor]:
        return lambda: SF.classification_loss(network(pixel_values=images).logits, labels).mean()

    def ours(way: str, network: nn.Module, clean_pass: Any = shared_pass) -> Callable[[], Tensor]:
        args = arguments_of(way, cell)
        budget = MaskBudget.for_training(args.settings, 50_000, shape[1:], device=device)
        # A CUDA graph writes the gradients of the masked view over those of the clean one.
        named = None if network is not model and mode == "reduce-overhead" else weights
        # As many as on average, and known on the host, as in SmootTrainer.
        is_chosen = torch.arange(batch) < args.masked_share * batch if args.masked_share < 1 else None

        def loss() -> Tensor:
            budget.begin_epoch(EPOCH)
            step = masked_step(
                network, images, labels, sample_idx, budget.read(sample_idx), EPOCH, args,
                saliency_model=model, weights=named, clean_pass=clean_pass, is_chosen=is_chosen,
            )  # fmt: skip
            if args.method == "smoot":
                budget.update(sample_idx, step.delta, args.settings.step_in_positions(shape[1:]), args.rounding)
            return (step.ce + args.settings.kl_factor * step.kl).mean()

        return loss

    steps = {"standard": optimized(standard(model))}
    steps["naive"] = optimized(naive_sgt_loss(model, images, labels, mask_ratio=0.5))
    steps["published"] = optimized(*published_sgt_loss(model, images, labels, mask_ratio=0.5))
    steps |= {way: optimized(ours(way, model)) for way in SETTINGS}
    if mode is not None:
        network = torch.compile(model, mode=mode)
        steps["compiled standard"] = optimized(standard(network))
        for way in ("smoot", "masked"):
            steps[f"compiled {way}"] = optimized(ours(way, network, compiled_pass(mode=mode)))
    steps["masking"] = make_masking(images, sample_idx, cell)
    return steps


def naive_sgt_loss(model: nn.Module, images: Tensor, labels: Tensor, mask_ratio: float) -> Callable[[], Tensor]:
    """The loss of SGT by three forward passes, of which nothing is shared."""
    k = torch.full_like(labels, int(mask_ratio * images.shape[2:].numel()))

    def loss() -> Tensor:
        leaf = images.clone().requires_grad_()
        score = model(pixel_values=leaf).logits.gather(1, labels[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, leaf)
        is_masked = SF.least_salient_mask(SF.channel_mean(gradient, signed=False), k)
        masked = torch.where(is_masked, SF.uniform_fill(images, is_masked, torch.rand_like(images)), images)
        logits, masked_logits = (model(pixel_values=view).logits for view in (images, masked))
        return (SF.classification_loss(logits, labels) + SF.kl_divergence(logits, masked_logits)).mean()

    return loss


def make_masking(images: Tensor, sample_idx: Tensor, cell: int) -> Step:
    """What SMOOT does beside its passes, on gradients of no meaning."""
    args, size = arguments_of("smoot", cell), (images.shape[2], images.shape[3])
    budget = MaskBudget.for_training(args.settings, 50_000, size, device=images.device)
    gradient, delta = torch.randn_like(images), torch.rand(len(images), device=images.device) - 0.5

    def masking() -> None:
        budget.begin_epoch(EPOCH)
        mask_images(images, gradient, sample_idx, budget.read(sample_idx), EPOCH, args)
        budget.update(sample_idx, delta, args.settings.step_in_positions(size), args.rounding)

    return masking


def arguments_of(way: str, cell: int) -> SmootTrainingArguments:
    """The arguments of one of our ways."""
    return SmootTrainingArguments(output_dir="runs/benchmark", report_to="none", mask_cell=cell, **SETTINGS[way])


def baseline_of(way: str) -> str:
    """The step of the same turn that a way is held against."""
    return "smoot" if way == "masking" else "compiled standard" if way.startswith("compiled") else "standard"


def now(device: torch.device) -> float:
    """Seconds, the device's work included; with a single thread those that the process has had of the processor."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    is_single = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if is_single else time.perf_counter()


def seconds(step: Step, device: torch.device) -> float:
    """Time of one step."""
    start = now(device)
    step()
    return now(device) - start


def gpu_seconds(step: Step) -> float:
    """The device's own time of one step: the processor issues it while the device is busy with something else."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    busy = torch.empty(8192, 8192, dtype=torch.bfloat16, device="cuda").normal_()
    for _ in range(40):
        busy @ busy
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def measure(steps: dict[str, Step], turns: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Medians with their extremes of each way's time and ratio, and its memory."""
    for step in [*steps.values()] * 2:
        seconds(step, device)
    measured = [{way: seconds(step, device) for way, step in steps.items()} for _ in range(turns)]
    results = {}
    for way, step in steps.items():
        ms = [1000 * turn[way] for turn in measured]
        ratios = [turn[way] / turn[baseline_of(way)] for turn in measured]
        hidden = way.startswith("compiled") and device.type != "cuda"
        results[way] = {
            "ms": statistics.median(ms), "ms_min": min(ms), "ms_max": max(ms),
            "images_per_second": 1000 * batch / statistics.median(ms),
            "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            "peak_mb": None if hidden else peak_bytes(step, device) / 1e6,
        }  # fmt: skip
    if device.type == "cuda":
        for way, found in measure_on_gpu(steps, turns).items():
            results[way] |= found
    return results


def measure_on_gpu(steps: dict[str, Step], turns: int) -> dict[str, dict[str, float]]:
    """Medians of the device's own time and of its ratio for each way."""
    measured = [{way: gpu_seconds(step) for way, step in steps.items()} for _ in range(turns)]
    return {
        way: {
            "gpu_ms": statistics.median(1000 * turn[way] for turn in measured),
            "gpu_ratio": statistics.median(turn[way] / turn[baseline_of(way)] for turn in measured),
        }
        for way in steps
    }


def print_table(name: str, batch: int, results: dict[str, Any]) -> None:
    """A line for every way."""
    print()
    title = f"{name}, batch {batch}"
    columns = f"{'ms':>9}   {'min .. max':<20}{'img/s':>8}{'ratio':>8}   {'min .. max':<16}{'MB':>8}{'GPU ms':>9}"
    print(f"{title:<26}{columns}{'ratio':>8}")
    for way, r in results.items():
        spread = f"{r['ms_min']:.1f} .. {r['ms_max']:.1f}"
        ratios = f"{r['ratio']:>8.3f}   {r['ratio_min']:.3f} .. {r['ratio_max']:.3f}"
        memory = "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
        on_gpu = f"{r['gpu_ms']:>9.2f}{r['gpu_ratio']:>8.3f}" if "gpu_ms" in r else ""
        print(f"  {way:<24}{r['ms']:>9.1f}   {spread:<20}{r['images_per_second']:>8.0f}{ratios:<27}{memory:>8}{on_gpu}")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["cnn", "resnet-18"], help="What to measure.")
    parser.add_argument("--steps", type=int, default=9, help="Turns to measure, after two to warm up (default 9).")
    parser.add_argument("--batch", type=int, help="Images in a step, in the place of the model's own.")
    parser.add_argument("--only", nargs="+", help="Ways to measure beside the standard step (default: all).")
    parser.add_argument(
        "--compile", nargs="?", const="default", metavar="MODE",
        help="Measure the compiled steps as well, by this mode of torch.compile (default: default).",
    )  # fmt: skip
    parser.add_argument("--bf16", action="store_true", help="Forward passes in bfloat16 where autocast says so.")
    parser.add_argument("--checkpointing", action="store_true", help="Compute activations again in backward passes.")
    parser.add_argument("--memory_as_found", action="store_true", help="As without keep_freed_memory.")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/training_step.json"), help="JSON file.")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    settings |= {"bf16": arguments.bf16, "compile": arguments.compile, "checkpointing": arguments.checkpointing}
    settings |= {"turns": arguments.steps, "memory_as_found": arguments.memory_as_found}
    if device.type == "cuda":
        settings["device"] = torch.cuda.get_device_name()
    print(*(f"{name}={value}" for name, value in settings.items()))
    found: dict[str, Any] = {}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        batch = arguments.batch or MODELS[name][1]
        steps = make_steps(name, batch, device, arguments.compile, arguments.bf16, arguments.checkpointing)
        if arguments.only:
            wanted = {need for way in arguments.only for need in (way, baseline_of(way))} | {"standard"}
            steps = {way: step for way, step in steps.items() if way in wanted}
        with freed_memory_kept(device.type == "cpu" and not arguments.memory_as_found):
            found[name] = {"batch": batch, "ways": measure(steps, arguments.steps, batch, device)}
        print_table(name, batch, found[name]["ways"])
        arguments.output.write_text(json.dumps({"settings": settings, "models": found}, indent=2))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
