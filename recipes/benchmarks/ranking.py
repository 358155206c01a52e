"""Ways to find the exactly K least salient pixels of every image, with K of its own and ties broken by position.

    python recipes/benchmarks/ranking.py [--turns 9] [--threads 1] [--cell 16] [--output FILE.json]

Time: a minute on one core. The ways take turns; the ratio is taken within a turn. A single thread is timed by the
processor, so that other programs do not count. Before anything is timed each way must give what
`functional.least_salient_mask` gives, bit for bit, on ties, NaN, infinities, subnormal numbers, -0.0 beside 0.0, K = 0
and K = H*W.

  argsort       stable argsort of every row, the first K places scattered back: what functional/masking.py does below
                32,768 positions, on a GPU and with more than two threads.
  library       what functional/masking.py does: otherwise rows of integers in the order of the floats, one by one,
                which torch then sorts by radix on a CPU.
  one sort      one stable sort of integer keys (image, value) of the whole batch, by radix as well.
  sort int32    as argsort, but of integer keys in the order of the floats.
  unique int64  keys (value << 32 | position), which have no ties: unstable sort, then all up to the K-th.
  threshold     unstable sort of the floats, all below the K-th value, and of those equal to it the first by a
                cumulative sum.
  threshold32   the same of the int32 keys, as is what follows.
  bisection     the K-th key bit by bit: 32 counts (16 of bfloat16) instead of a sort.
  halves        the same, the upper 16 bits first, then the lower of what is left: twice as many keys in a register.
  histogram     the K-th key byte by byte: 4 histograms (2 of bfloat16) of 256 counts a row.

With `--cell` something else is measured: at 224x224, and for cells of this side beside single pixels, finding the mask
alone, and all that SMOOT does beside its passes (masking: saliency of the gradient, mask, noise, fill).

`kthvalue` and `topk` take one K for all rows. Of rows that are lengthened so that one K serves them all, `kthvalue` is
nearly as fast as `library` on noise, and ten times as slow as `argsort` on values that fall from first to last.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from training_step import now

from smoot_hf import SmootSettings
from smoot_hf.functional import cell_grid, cell_sum, least_salient_mask, spread_cells
from smoot_hf.functional.masking import ranking_key
from smoot_hf.training.masked_step import mask_images

SIZES = {"256 x 28x28": (256, 28, 28), "256 x 32x32": (256, 32, 32), "64 x 224x224": (64, 224, 224)}
LARGEST = "64 x 224x224"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Signed integers as wide as a float, and their largest.
BITS = {torch.float32: (32, torch.int32), torch.bfloat16: (16, torch.int16)}


def keys_of(saliency: Tensor) -> Tensor:
    """Signed integers (B, H*W) as wide as the floats and in their order: -0.0 is 0.0, NaN above everything."""
    bits, integer = BITS[saliency.dtype]
    largest = (1 << (bits - 1)) - 1
    flat = saliency.flatten(1)
    raw = torch.where(flat == 0, 0.0, flat).view(integer)
    return torch.where(flat.isnan(), largest, raw ^ ((raw >> (bits - 1)) & largest))


def up_to_threshold(values: Tensor, threshold: Tensor, k: Tensor, shape: torch.Size) -> Tensor:
    """The positions below the K-th value (B, 1) and, of those equal to it, the first until there are K."""
    below = values < threshold
    equal = values == threshold
    missing = k[:, None] - below.sum(dim=1, keepdim=True)
    return (below | (equal & (equal.cumsum(dim=1) <= missing))).reshape(shape[0], 1, *shape[1:])


def at_rank(rising: Tensor, k: Tensor) -> Tensor:
    """The K-th of each row (B, 1); of K = 0 the first, which `up_to_threshold` then leaves."""
    return rising.gather(1, (k[:, None].long() - 1).clamp_min(0))


def argsort(saliency: Tensor, k: Tensor) -> Tensor:
    """See the head of the file, as for all that follow."""
    return first_places(ranking_key(saliency).flatten(1).argsort(dim=1, stable=True), saliency, k)


def one_sort(saliency: Tensor, k: Tensor) -> Tensor:
    """Integer keys of the whole batch."""
    keys, bits = keys_of(saliency), BITS[saliency.dtype][0]
    image = torch.arange(len(keys), device=keys.device)[:, None]
    order = (keys + ((image << bits) + (1 << (bits - 1)))).flatten().sort(stable=True).indices
    return first_places(order.reshape(keys.shape) - image * keys.shape[1], saliency, k)


def sort_int32(saliency: Tensor, k: Tensor) -> Tensor:
    """Integer keys."""
    return first_places(keys_of(saliency).sort(dim=1, stable=True).indices, saliency, k)


def first_places(order: Tensor, saliency: Tensor, k: Tensor) -> Tensor:
    """The mask of the first K of each row of positions."""
    in_budget = torch.arange(order.shape[1], device=order.device) < k[:, None]
    return torch.empty_like(in_budget).scatter_(1, order, in_budget).reshape(len(k), 1, *saliency.shape[1:])


def unique_int64(saliency: Tensor, k: Tensor) -> Tensor:
    """Keys without ties."""
    keys = keys_of(saliency).long()
    keys = (keys << 32) | torch.arange(keys.shape[1], device=keys.device)
    last = at_rank(keys.sort(dim=1).values, k)
    return ((keys <= last) & (k[:, None] > 0)).reshape(len(k), 1, *saliency.shape[1:])


def threshold(saliency: Tensor, k: Tensor) -> Tensor:
    """The floats themselves, NaN as something above infinity: it is equal to nothing."""
    flat = saliency.flatten(1)
    last = at_rank(flat.sort(dim=1).values, k)
    is_nan = flat.isnan()
    last_is_nan = last.isnan()
    below = torch.where(last_is_nan, ~is_nan, flat < last)
    equal = torch.where(last_is_nan, is_nan, flat == last)
    missing = k[:, None] - below.sum(dim=1, keepdim=True)
    return (below | (equal & (equal.cumsum(dim=1) <= missing))).reshape(len(k), 1, *saliency.shape[1:])


def threshold32(saliency: Tensor, k: Tensor) -> Tensor:
    """The integer keys."""
    keys = keys_of(saliency)
    return up_to_threshold(keys, at_rank(keys.sort(dim=1).values, k), k, saliency.shape)


def bisection(saliency: Tensor, k: Tensor) -> Tensor:
    """The K-th key is the largest number that fewer than K keys are below."""
    keys = keys_of(saliency)
    bits = BITS[saliency.dtype][0]
    found = torch.full_like(keys[:, :1], -(1 << (bits - 1)))
    for bit in reversed(range(bits)):
        candidate = found ^ -(1 << bit) if bit == bits - 1 else found | (1 << bit)
        found = torch.where((keys < candidate).sum(dim=1, keepdim=True) < k[:, None], candidate, found)
    return up_to_threshold(keys, found, k, saliency.shape)


def halves(saliency: Tensor, k: Tensor) -> Tensor:
    """The K-th key by its 16-bit digits, each bit by bit."""
    keys = keys_of(saliency)
    bits = BITS[saliency.dtype][0]
    missing = k[:, None].to(torch.int32)
    below, chosen = torch.zeros_like(keys, dtype=torch.bool), torch.ones_like(keys, dtype=torch.bool)
    for shift in range(bits - 16, -1, -16):
        digit = (keys >> shift).to(torch.int16)
        if shift < bits - 16:
            # Unsigned below the sign's digit; what is chosen no more counts as nothing.
            digit = (digit ^ -(1 << 15)).masked_fill_(~chosen, (1 << 15) - 1)
        found = torch.full_like(digit[:, :1], -(1 << 15))
        for bit in reversed(range(16)):
            candidate = found ^ -(1 << 15) if bit == 15 else found | (1 << bit)
            count = (digit < candidate).sum(dim=1, keepdim=True, dtype=torch.int32)
            found = torch.where(count < missing, candidate, found)
        less = digit < found
        missing = missing - less.sum(dim=1, keepdim=True, dtype=torch.int32)
        below, chosen = below | less, chosen & (digit == found)
    is_masked = below | (chosen & (chosen.cumsum(dim=1) <= missing))
    return is_masked.reshape(len(k), 1, *saliency.shape[1:])


def histogram(saliency: Tensor, k: Tensor) -> Tensor:
    """Counts of the first byte, then of the second of those with the chosen first, and so on."""
    keys = keys_of(saliency)
    bits = BITS[saliency.dtype][0]
    missing = k[:, None].long()
    chosen = torch.ones_like(keys, dtype=torch.int32)
    found = torch.zeros(len(k), 1, dtype=torch.int64, device=keys.device)
    unsigned = keys.long() + (1 << (bits - 1))
    for shift in range(bits - 8, -1, -8):
        byte = (unsigned >> shift) & 255
        counts = torch.zeros(len(k), 256, dtype=torch.int32, device=keys.device).scatter_add_(1, byte, chosen)
        upto = counts.cumsum(dim=1)
        digit = (upto < missing).sum(dim=1, keepdim=True).clamp_max(255)
        missing = missing - (upto - counts).gather(1, digit)
        chosen = chosen * (byte == digit)
        found = (found << 8) | digit
    return up_to_threshold(unsigned, found, k, saliency.shape)


# (saliency (B, H, W), k (B,)) -> a mask.
Way = Callable[[Tensor, Tensor], Tensor]
WAYS: dict[str, Way] = {
    "argsort": argsort,
    "library": least_salient_mask,
    "one sort": one_sort,
    "sort int32": sort_int32,
    "unique int64": unique_int64,
    "threshold": threshold,
    "threshold32": threshold32,
    "bisection": bisection,
    "halves": halves,
    "histogram": histogram,
}


# Of short rows, and of rows that are long enough for a radix sort.
HARD_SIZES = ((64, 9, 7), (4, 190, 180))


def hard_cases(size: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Saliency and K where a way that is nearly right goes wrong."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([math.nan, -math.nan, 0.0, -0.0, math.inf, -math.inf, 1e-42, -1e-42, 1.0, -1.0])
    tied = special[torch.randint(len(special), size, generator=generator)]
    few = torch.randint(-3, 4, size, generator=generator) / 2
    some_nan = torch.randn(size, generator=generator).masked_fill(few == 0, math.nan)
    k = torch.randint(size[1] * size[2] + 1, (size[0],), generator=generator).to(torch.int32)
    k[0], k[1] = 0, size[1] * size[2]
    constant = [torch.full(size, value) for value in (0.0, -0.0, math.nan, math.inf)]
    return [(values.to(device, dtype), k.to(device)) for values in (tied, few, some_nan, *constant)]


def check(device: torch.device) -> None:
    """Raise where a way differs from the library's."""
    for size, dtype in itertools.product(HARD_SIZES, DTYPES.values()):
        for saliency, k in hard_cases(size, device, dtype):
            for name, way in WAYS.items():
                if not torch.equal(way(saliency, k), least_salient_mask(saliency, k)):
                    raise AssertionError(f"{name} is another mask in {dtype}")


def ways_with_cells(saliency: Tensor, cell: int) -> dict[str, dict[str, Way]]:
    """What is measured with `--cell`: the mask alone, and masking, of pixels and of cells."""
    batch, height, width = saliency.shape
    size, share = (height, width), math.prod(cell_grid((height, width), cell)) / (height * width)
    images = torch.rand(batch, 3, height, width, device=saliency.device)
    rows = torch.arange(batch, device=saliency.device)

    def cells_of(k: Tensor) -> Tensor:
        return (k * share).int()

    def mask_of_cells(saliency: Tensor, k: Tensor) -> Tensor:
        return spread_cells(least_salient_mask(cell_sum(saliency, cell), cells_of(k)), cell, size)

    def masking(mask_cell: int) -> Way:
        settings = SmootSettings(mask_cell=mask_cell)

        def way(saliency: Tensor, k: Tensor) -> Tensor:
            gradient = saliency[:, None].expand_as(images)
            return mask_images(images, gradient, rows, k if mask_cell == 1 else cells_of(k), 0, settings)[0]

        return way

    return {
        "mask": {"pixels": least_salient_mask, f"cells of {cell}": mask_of_cells},
        "masking": {"pixels": masking(1), f"cells of {cell}": masking(cell)},
    }


def milliseconds(way: Way, saliency: Tensor, k: Tensor) -> float:
    """Time of one call, the device's work included."""
    start = now(saliency.device)
    way(saliency, k)
    return 1000 * (now(saliency.device) - start)


def measure(ways: dict[str, Way], saliency: Tensor, k: Tensor, turns: int) -> dict[str, dict[str, float]]:
    """Median time of each way with its extremes, and how many times as fast as the first it is in the same turn."""
    for way in ways.values():
        milliseconds(way, saliency, k)
    measured = [{name: milliseconds(way, saliency, k) for name, way in ways.items()} for _ in range(turns)]
    first, results = next(iter(ways)), {}
    for name in ways:
        times = [turn[name] for turn in measured]
        speedup = statistics.median(turn[first] / turn[name] for turn in measured)
        results[name] = {"ms": statistics.median(times), "min": min(times), "max": max(times), "speedup": speedup}
    return results


def main() -> None:
    """Check, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9, help="Turns to measure, after one to warm up (default 9).")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch.")
    parser.add_argument("--cell", type=int, help="Compare cells of this side with single pixels, at 224x224.")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/ranking.json"), help="JSON file.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for device in (torch.device(name) for name in ("cpu", "cuda") if name == "cpu" or torch.cuda.is_available()):
        check(device)
        sizes = SIZES if arguments.cell is None else {LARGEST: SIZES[LARGEST]}
        for size, (batch, height, width) in sizes.items():
            generator = torch.Generator().manual_seed(0)
            values = torch.randn(batch, height, width, generator=generator)
            k = torch.randint(height * width // 5, height * width * 4 // 5, (batch,), generator=generator)
            for name, dtype in DTYPES.items():
                saliency = values.to(device, dtype)
                groups = {"": WAYS} if arguments.cell is None else ways_with_cells(saliency, arguments.cell)
                for group, ways in groups.items():
                    case = ", ".join(filter(None, (device.type, size, name, group)))
                    results[case] = measure(ways, saliency, k.to(device, torch.int32), arguments.turns)
                    print(f"\n{case}\n{'':<14}{'ms':>9}{'times as fast':>15}   min .. max")
                    for way, r in results[case].items():
                        print(f"{way:<14}{r['ms']:>9.2f}{r['speedup']:>15.2f}   {r['min']:.2f} .. {r['max']:.2f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    arguments.output.write_text(
        json.dumps({"settings": settings, "turns": arguments.turns, "results": results}, indent=2)
    )
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
