"""Time of a faithfulness evaluation beside the forward passes it must do, and beside Quantus and torch-cam.

    python recipes/benchmarks/faithfulness.py [--models cnn deit-tiny] [--images 1000] [--repeats 5] [--lines LINE ...]

Time: two minutes for the CNN with 3 repeats on two CPU cores; DeiT-tiny takes over a quarter of an hour (`--images 256`
is a quarter of it). The peers are an extra: `pip install 'smoot-hf[peers]'`.

Every line is measured on the same untrained network, images and given attributions, in turn within each repeat, so that
a machine that slows down slows all of them; medians over the repeats. `forward` is S + 1 forward passes over the images
and nothing else; `floor` the same with the weights of convolutions lent in the channels-last layout, as an evaluation
does on a CPU: `deletion / floor` is 1 plus the overhead. The peers do other work for their numbers, which is why each
has its own line of ours beside it:

  deletion     our deletion curve: S + 1 forward passes.
  quantus      PixelFlipping: S forward passes (the unmasked image is left out), zero fill. It flips single channel
               values, not positions. It is asked for curves: its AUC needs the `np.trapz` that NumPy 2.4 lacks.
  both         our deletion and insertion curves: 2 S forward passes, the two end points shared.
  torchcam     DeletionInsertionMetric: the same, with probabilities and zero fill.

Expected on two CPU cores (--models cnn --repeats 3): forward 4.44 s, deletion 3.00, both 5.16, quantus 4.28, torchcam
7.56: deletion / forward 0.67, since convolutions run in the channels-last layout; quantus / deletion 1.43; torchcam /
both 1.47. A transformer has next to no convolutions: there all of them stand at their number of forward passes, of
which Quantus does one less (0.9 to 1.1 with --models deit-tiny --images 256).

On a machine that others use too, `--clock process --threads 1` counts the processor time of this process alone. There
(--models cnn --repeats 2): forward 7.21 s, floor 5.68, deletion 5.87, both 10.20, quantus 6.67, torchcam 12.52: an
overhead of 3 %; quantus / deletion 1.14 and torchcam / both 1.23, since the layout gains less where memory is shared;
DeiT-tiny (--images 64 --batch_size 32 --repeats 1): floor 9.13 s, deletion 9.59, quantus 8.68: an overhead of 5 %,
quantus / deletion 0.91, close to the 12 / 13 of the forward passes. All CNN times here are from before an evaluation on
a CPU cut its forward passes to 64 images; those of 256 images by 64 took 0.67 (CNN) and 0.73 (DeiT-tiny) of the time.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from smoot_hf.evaluation.convention import Convention
from smoot_hf.evaluation.faithfulness import evaluate_faithfulness
from smoot_hf.functional.perturbation import CPU_CHUNK
from smoot_hf.functional.removal import even_fractions
from smoot_hf.models.classifier import load_model
from smoot_hf.models.logits import LogitsModel
from smoot_hf.models.state import untouched

# Steps that Quantus can take: it wants H * W to be a multiple of the values flipped in a step, and flips C * H * W.
MODELS = {"cnn": {"channels": 1, "side": 28, "steps": 8}, "deit-tiny": {"channels": 3, "side": 32, "steps": 12}}
LINES = ("forward", "floor", "deletion", "both", "quantus", "torchcam")
PEERS = {"quantus": 'pip install "quantus==0.6.*"', "torchcam": 'pip install "torchcam==0.5.*"'}


class InMemory:
    """Images and labels on the device, given out in batches."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"pixel_values": self.images[rows], "labels": self.labels[rows]}


class GivenAttribution:
    """Hands out the next rows of finished maps, to us as an attribution and to torch-cam as its extractor."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps, self.next = model, maps, 0

    def take(self, count: int) -> Tensor:
        """The next `count` maps, from the start again after the last."""
        maps = self.maps[self.next : self.next + count]
        self.next = (self.next + count) % len(self.maps)
        return maps

    # torch-cam's protocol, as are the next two.
    def __call__(self, class_idx: Any = None, scores: Any = None, *_: Any, **__: Any) -> list[Tensor]:
        """The next map for every row of `scores`, as a list of one."""
        return [self.take(len(scores))]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        """One map of several: of the one."""
        return cams[0]

    @contextlib.contextmanager
    def _hooks_off(self) -> Iterator[None]:
        yield


def jobs(name: str, count: int, batch_size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    channels, side, steps = (MODELS[name][key] for key in ("channels", "side", "steps"))
    torch.manual_seed(0)
    labels = [str(i) for i in range(10)]
    network = load_model(name, labels=labels, image_size=(side, side), num_channels=channels, from_scratch=True)
    model = LogitsModel(network).eval().to(device)
    images = torch.randn(count, channels, side, side, device=device)
    targets = torch.arange(count, device=device) % 10
    given = GivenAttribution(model, torch.rand(count, side, side, device=device))
    data = InMemory(images, targets)
    convention = Convention(measure="probability", fill="zero", fractions=even_fractions(steps))

    def forward(state: contextlib.AbstractContextManager[None], block_size: int) -> None:
        with state, torch.no_grad():
            for _ in range(steps + 1):
                for block in images.split(block_size):
                    model(block)

    def evaluate(curves: tuple[Any, ...]) -> None:
        def attribution(_: nn.Module, block: Tensor, __: Tensor) -> Tensor:
            return given.take(len(block))

        evaluate_faithfulness(model, data, attribution, convention=convention, curves=curves, batch_size=batch_size)

    block_size = min(batch_size, CPU_CHUNK) if device.type == "cpu" else batch_size
    timed: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(contextlib.nullcontext(), batch_size),
        "floor": lambda: forward(untouched(model), block_size),
        "deletion": lambda: evaluate(()),
        "both": lambda: evaluate(("insertion",)),
    }
    if importlib.util.find_spec("quantus"):
        timed["quantus"] = quantus_job(model, images, targets, given.maps, steps, batch_size)
    if importlib.util.find_spec("torchcam"):
        timed["torchcam"] = torchcam_job(given, images, targets, steps, batch_size)
    return timed


def lines(name: str, count: int, args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], object]]:
    """The lines asked for, of those that can be run here."""
    return {line: job for line, job in jobs(name, count, args.batch_size, device).items() if line in args.lines}


def quantus_job(
    model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor, steps: int, batch_size: int
) -> Callable[[], object]:
    """Quantus' PixelFlipping with as many steps as ours."""
    import quantus

    # A number is a baseline too, though its annotation says str.
    settings: dict[str, Any] = {"perturb_baseline": 0.0, "normalise": False, "disable_warnings": True}
    metric = quantus.PixelFlipping(features_in_step=images[0].numel() // steps, **settings)
    arrays = (values.cpu().numpy() for values in (images, targets, maps[:, None].expand_as(images)))
    x, y, a = arrays
    return lambda: metric(
        model=model, x_batch=x, y_batch=y, a_batch=a, softmax=True, device=str(images.device), batch_size=batch_size
    )


def torchcam_job(
    given: GivenAttribution, images: Tensor, targets: Tensor, steps: int, batch_size: int
) -> Callable[[], object]:
    """torch-cam's DeletionInsertionMetric over the same batches."""
    from torchcam.metrics import DeletionInsertionMetric

    metric = DeletionInsertionMetric(given, lambda logits: logits.softmax(-1), steps=steps, batch_size=batch_size)

    def run() -> None:
        for block, classes in zip(images.split(batch_size), targets.split(batch_size), strict=True):
            metric.update(block, classes.tolist())
        metric.summary()
        metric.reset()

    return run


def measure(
    timed: dict[str, Callable[[], object]], repeats: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, run in timed.items():
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(name: str, seconds: dict[str, float]) -> dict[str, float]:
    """Print a model's times and ratios; give the ratios back."""
    pairs = (("deletion", "floor"), ("deletion", "forward"), ("quantus", "deletion"), ("torchcam", "both"))
    ratios = {f"{a} / {b}": seconds[a] / seconds[b] for a, b in pairs if a in seconds and b in seconds}
    print(f"{name}, {MODELS[name]['steps']} steps")
    for line, value in seconds.items():
        print(f"  {line:22} {value:8.3f} s")
    for line, value in ratios.items():
        print(f"  {line:22} {value:8.3f}")
    for peer, how in PEERS.items():
        if not importlib.util.find_spec(peer):
            print(f"  {peer} is not installed: {how}")
    return ratios


def main() -> None:
    """Measure, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES), help="What is timed (default: all)")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    found = {}
    for name in args.models:
        # One batch of everything warms up, and does not count.
        measure(lines(name, args.batch_size, args, device), 1, device, clock)
        seconds = measure(lines(name, args.images, args, device), args.repeats, device, clock)
        found[name] = {"steps": MODELS[name]["steps"], "median_seconds": seconds, "ratios": report(name, seconds)}
    if args.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(args), "versions": versions, "models": found}, file, indent=2)


if __name__ == "__main__":
    main()
