"""What K of every sample costs in a step: read and update of a batch, for training sets of many sizes.

    python recipes/benchmarks/mask_budget.py [--samples 1000 1000000 100000000] [--turns 200] [--processes 2 4]
                                             [--output FILE.json]

Time: a minute, most of it imports; K of 1e8 samples takes 0.4 GB of memory, in every process of the second table.

The sizes take turns, step by step; each step has 256 rows drawn anew. The work of a step is the same for
every N, but its 256 entries come out of the processor's cache where all of K fits into it (1,000 samples) and out of
memory where it does not. Once per epoch `begin_epoch` lets every sample move again: one pass over N numbers, given per
sample.

The second table is of several processes on CPUs (gloo), each with 256 rows of its own: K whole on every process
(`MaskBudget`) and in ranges (`ShardedMaskBudget`), turn by turn in the same processes. Reading is that of a process's
own rows; moving includes that the processes exchange their rows and deltas, as a training does either way.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from smoot_hf import MaskBudget
from smoot_hf.training.sharded_mask_budget import Processes, ShardedMaskBudget

BATCH = 256


def seconds(budget: MaskBudget, sample_idx: torch.Tensor, delta: torch.Tensor) -> tuple[float, float]:
    """Wall-clock time of a read and of an update, the device's work included."""
    times = []
    for act in (lambda: budget.read(sample_idx), lambda: budget.update(sample_idx, delta, step_size=10.0)):
        if delta.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        act()
        if delta.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[0], times[1]


def measure(sizes: list[int], turns: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Median microseconds of read, update and both with their extremes, for every number of samples."""
    budgets = [MaskBudget(size, (224, 224), device=device) for size in sizes]
    taken: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for _ in range(turns + 1):
        delta = torch.rand(BATCH, device=device) - 0.5
        for size, budget in zip(sizes, budgets, strict=True):
            sample_idx = torch.randint(size, (BATCH,), device=device)
            taken[size].append(seconds(budget, sample_idx, delta))
    results = {}
    for size, budget in zip(sizes, budgets, strict=True):
        reads, updates = ([1e6 * pair[part] for pair in taken[size][1:]] for part in (0, 1))
        both = [read + update for read, update in zip(reads, updates, strict=True)]
        start = time.perf_counter()
        budget.forget_visits()
        if device.type == "cuda":
            torch.cuda.synchronize()
        epoch = time.perf_counter() - start
        results[f"{size:.0e}"] = {
            "read_us": statistics.median(reads),
            "update_us": statistics.median(updates),
            "both_us": statistics.median(both),
            "min_us": min(both),
            "max_us": max(both),
            "begin_epoch_ns_per_sample": 1e9 * epoch / size,
        }
    return results


def seconds_together(budget: MaskBudget, own: torch.Tensor, delta: torch.Tensor) -> tuple[float, float]:
    """Wall-clock time of reading the own rows, and of moving those of all processes, which begin together."""
    processes = Processes()
    distributed.barrier()
    start = time.perf_counter()
    budget.read(own)
    between = time.perf_counter()
    budget.update(processes.gather(own), processes.gather(delta), step_size=10.0)
    return between - start, time.perf_counter() - between


def measure_process(rank: int, count: int, sizes: list[int], turns: int, folder: str) -> None:
    """One of `count` processes; the first writes median microseconds and bytes of K for every size and way."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    torch.manual_seed(rank)
    results = {}
    for size in sizes:
        budgets = {"whole": MaskBudget(size, (224, 224)), "sharded": ShardedMaskBudget(size, (224, 224))}
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in budgets}
        for _ in range(turns + 1):
            own, delta = torch.randint(size, (BATCH,)), torch.rand(BATCH) - 0.5
            for way, budget in budgets.items():
                taken[way].append(seconds_together(budget, own, delta))
        for way, budget in budgets.items():
            reads, moves = ([1e6 * pair[part] for pair in taken[way][1:]] for part in (0, 1))
            results[f"{size:.0e} {way}"] = {
                "read_us": statistics.median(reads),
                "move_us": statistics.median(moves),
                "both_us": statistics.median([read + move for read, move in zip(reads, moves, strict=True)]),
                "bytes_per_process": 4 * len(budget.rows),
            }
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


def measure_together(count: int, sizes: list[int], turns: int) -> dict[str, dict[str, float]]:
    """What a step costs in `count` processes, with K whole on each and sharded."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure_process, (count, sizes, turns, folder), nprocs=count)
        return json.loads(Path(folder, "results.json").read_text())


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", type=int, default=[1000, 1_000_000, 100_000_000], help="Values of N.")
    parser.add_argument("--turns", type=int, default=200, help="Turns to measure, after one to warm up (default 200).")
    parser.add_argument("--processes", nargs="*", type=int, default=[2, 4], help="Numbers of processes (default 2 4).")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/mask_budget.json"), help="JSON file.")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = measure(arguments.samples, arguments.turns, device)
    print(f"{'N':<8}{'read us':>9}{'update us':>11}{'both us':>9}   min .. max{'epoch, ns/sample':>26}")
    for size, r in results.items():
        spread = f"{r['min_us']:.0f} .. {r['max_us']:.0f}"
        medians = f"{r['read_us']:>9.1f}{r['update_us']:>11.1f}{r['both_us']:>9.1f}"
        print(f"{size:<8}{medians}   {spread:<16}{r['begin_epoch_ns_per_sample']:>18.2f}")
    together = {count: measure_together(count, arguments.samples, arguments.turns) for count in arguments.processes}
    for count, ways in together.items():
        print(f"\n{f'{count} processes':<16}{'read us':>9}{'move us':>9}{'both us':>9}{'MB of K each':>14}")
        for way, r in ways.items():
            medians = f"{r['read_us']:>9.0f}{r['move_us']:>9.0f}{r['both_us']:>9.0f}"
            print(f"{way:<16}{medians}{r['bytes_per_process'] / 1e6:>14.3f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__, "batch": BATCH}
    arguments.output.write_text(
        json.dumps({"settings": settings, "turns": arguments.turns, "results": results, "together": together}, indent=2)
    )
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
