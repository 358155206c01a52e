"""Kill training processes with SIGKILL, resume them, and compare the results with an undisturbed run, bit for bit.

    python recipes/benchmarks/kill_test.py [--kills 20] [--seed 0] [--output DIR]

Time: about 10 minutes for 20 kills on two CPU cores.
Expected: 20/20 the same, at least half of the kills in the middle of a save.

Each trial runs `recipes/train_digits.py` as a user would, in an interpreter of its own, kills it, starts it again with
`--resume_from_checkpoint true` (or from the start where there is no whole checkpoint), and lets it end. The models take
turns: the paper's CNN (dropout) and DeiT-tiny (its checkpoints take longer to write). Every second kill is aimed at a
save: the process is stopped as soon as a given file of a checkpoint has appeared, and killed if the checkpoint is not
whole yet; the others come at a moment drawn uniformly from the duration of the training. Compared are the final
weights, and of the last checkpoint the state of the optimizer and of the schedule, K with its first visits, and the
logs (but for times and `train_loss`, which the Trainer counts from the moment of resuming).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from smoot_hf.training.checkpoint_folder import checkpoint_folders, find_damage
from smoot_hf.training.mask_budget_file import MASK_BUDGET_NAME

RECIPE = Path(__file__).resolve().parent.parent / "train_digits.py"
SETTINGS = [
    *("--use_cpu", "--disable_tqdm", "true", "--max_eval_samples", "50", "--eval_strategy", "no", "--seed", "3"),
    *("--save_strategy", "steps", "--save_total_limit", "2", "--logging_strategy", "steps", "--step_size", "50"),
    *("--save_steps", "3", "--logging_steps", "3"),
]
MODELS = {
    "cnn": ["--max_train_samples", "320", "--num_train_epochs", "12"],
    "deit": [
        *("--model", "deit-tiny", "--from_scratch", "--patch_size", "4", "--max_train_samples", "80"),
        *("--optimizer", "trainer", "--learning_rate", "0.0005", "--per_device_train_batch_size", "16"),
        *("--num_train_epochs", "4"),
    ],
}
# In the order in which they are written; the file at which a kill is aimed.
AIMS = ("model.safetensors", "optimizer.pt", "scheduler.pt", MASK_BUDGET_NAME, "rng_state")
# Written by the recipe when it begins to train, and when it has trained.
BEGUN, TRAINED = "run.json", "train_results.json"
TIMES = ("runtime", "per_second", "train_loss")


@dataclass(frozen=True)
class Trial:
    """One kill and what came of it.

    Attributes:
        model: key of `MODELS`.
        moment: where the process was when it was killed, in words.
        in_save: whether that was in the middle of a save.
        resumed_from: name of the checkpoint that was there to resume from; `None`: it started afresh.
        difference: the first thing that is not as in the undisturbed run; `None`: nothing.
    """

    model: str
    moment: str
    in_save: bool
    resumed_from: str | None
    difference: str | None


def start(model: str, folder: Path, resume: bool = False) -> subprocess.Popen:
    """Start a training; what it prints goes to a log beside its folder."""
    command = [sys.executable, str(RECIPE), *SETTINGS, *MODELS[model], "--output_dir", str(folder)]
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, *(["--resume_from_checkpoint", "true"] if resume else [])],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            process_group=0,
        )


def wait_for(name: str, process: subprocess.Popen, folder: Path) -> None:
    """Wait until a training writes the file `name`."""
    while process.poll() is None and not (folder / name).is_file():
        time.sleep(0.01)


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Wait for a training to end well."""
    if process.wait() != 0:
        raise SystemExit(f"error: the training in {folder} failed; see {folder.with_suffix('.log')}")


def kill(process: subprocess.Popen) -> None:
    """End a process and its children as a machine that is switched off does; it leads a process group of its own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_at_random(process: subprocess.Popen, seconds: float) -> bool:
    """Kill after so many seconds; `False` where the training was faster."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        return True
    return False


def kill_in_a_save(process: subprocess.Popen, folder: Path, saves: int, aim: str) -> bool:
    """Kill in the middle of a save, after `saves` others, once the file `aim` of it has appeared.

    The process is stopped before it is looked at, so that what is seen is what is killed; where it was too fast, it
    goes on to its next save. `False` where the training ended before.
    """
    seen: set[str] = set()
    while process.poll() is None:
        newest = newest_folder(folder)
        if newest is None or newest.name in seen or not any(name.startswith(aim) for name in listing(newest)):
            time.sleep(0.0005)
            continue
        seen.add(newest.name)
        if len(seen) <= saves:
            continue
        os.killpg(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if find_damage(newest) is not None:
            kill(process)
            return True
        os.killpg(process.pid, signal.SIGCONT)
    return False


def newest_folder(folder: Path) -> Path | None:
    """The newest checkpoint, whole or not."""
    found = checkpoint_folders(folder)
    return Path(found[0]) if found else None


def listing(folder: Path) -> list[str]:
    """The files in a folder that may be deleted meanwhile."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def difference(one: Path, other: Path) -> str | None:
    """The first thing in which two finished runs differ, in words."""
    mine, theirs = (run_state(folder) for folder in (one, other))
    for name in mine:
        if not is_same(mine[name], theirs[name]):
            return name
    return None


def run_state(folder: Path) -> dict[str, Any]:
    """What two runs must share."""
    last = Path(checkpoint_folders(folder)[0])
    logs = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    history = json.loads((folder / "k_history.json").read_text(encoding="utf-8"))
    return {
        "last checkpoint": last.name,
        "weights": load_file(folder / "model.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "schedule": torch.load(last / "scheduler.pt", weights_only=True),
        "K": load_file(last / MASK_BUDGET_NAME),
        "logs": [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in logs],
        # Where training was resumed the recipe adds an entry of its own, in mid-epoch.
        "history of K": [
            entry for entry in zip(history["epochs"], history["counts"], strict=True) if entry[0].is_integer()
        ],
    }


def is_same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(is_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def run_undisturbed(model: str, output: Path) -> float:
    """Train from beginning to end; how many seconds the training took, without the start of the interpreter."""
    folder = output / f"{model}-undisturbed"
    process = start(model, folder)
    wait_for(BEGUN, process, folder)
    began = time.perf_counter()
    wait_for(TRAINED, process, folder)
    seconds = time.perf_counter() - began
    finish(process, folder)
    return seconds


def start_and_kill(number: int, model: str, folder: Path, seconds: float, dice: random.Random) -> bool:
    """Start a training and kill it, every second time in a save; `False` where it ended before its moment came."""
    process = start(model, folder)
    wait_for(BEGUN, process, folder)
    if number % 2:
        was_killed = kill_in_a_save(process, folder, dice.randint(0, 4), AIMS[number // 2 % len(AIMS)])
    else:
        was_killed = kill_at_random(process, dice.uniform(0, seconds))
    if not was_killed:
        finish(process, folder)
    return was_killed


def run_trial(number: int, model: str, output: Path, seconds: float, dice: random.Random) -> Trial:
    """Kill one training, resume it, and compare it with the undisturbed one; delete what turned out the same."""
    folder = output / f"{model}-kill{number + 1}"
    while not start_and_kill(number, model, folder, seconds, dice):
        shutil.rmtree(folder)
    newest = newest_folder(folder)
    torn = newest is not None and find_damage(newest) is not None
    whole = [Path(path).name for path in checkpoint_folders(folder) if find_damage(path) is None]
    moment = "before the first save" if newest is None else f"{'in the save of' if torn else 'after'} {newest.name}"
    moment += f" ({len(listing(newest))} files)" if newest is not None and torn else ""
    finish(start(model, folder, resume=bool(whole)), folder)
    found = difference(output / f"{model}-undisturbed", folder)
    if found is None:
        shutil.rmtree(folder)
    return Trial(model, moment, torn, whole[0] if whole else None, found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials, print a table, write JSON; returns the number of kills that left a difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="How many trainings to kill (default 20).")
    parser.add_argument("--seed", type=int, default=0, help="Of the random moments (default 0).")
    parser.add_argument("--output", type=Path, default=Path("runs/kill_test"), help="An empty or new folder.")
    arguments = parser.parse_args(argv)
    output = arguments.output.resolve()
    if output.exists() and any(output.iterdir()):
        parser.error(f"--output {output} is not empty")
    output.mkdir(parents=True, exist_ok=True)

    dice, trials = random.Random(arguments.seed), []
    models = list(MODELS)[: max(1, (arguments.kills + 1) // 2)]
    seconds = {model: run_undisturbed(model, output) for model in models}
    print(f"undisturbed: {', '.join(f'{model} {duration:.1f} s' for model, duration in seconds.items())}")
    print(f"\n{'kill':>4}  {'model':<6}{'killed':<44}{'resumed from':<16}result", flush=True)
    for number in range(arguments.kills):
        model = models[number // 2 % len(models)]
        trial = run_trial(number, model, output, seconds[model], dice)
        trials.append(trial)
        result = "the same" if trial.difference is None else f"{trial.difference}: not the same"
        origin = trial.resumed_from or "the start"
        print(f"{number + 1:>4}  {model:<6}{trial.moment:<44}{origin:<16}{result}", flush=True)

    same = sum(trial.difference is None for trial in trials)
    in_save = sum(trial.in_save for trial in trials)
    print(f"\n{same}/{len(trials)} the same as undisturbed, bit for bit; {in_save} of the kills in a save")
    summary = {"kills": len(trials), "same": same, "in_save": in_save}
    settings = {"seed": arguments.seed, "torch": torch.__version__, "undisturbed_seconds": seconds}
    content = {**summary, "settings": settings, "each": [asdict(trial) for trial in trials]}
    (output / "kill_test.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written to {output / 'kill_test.json'}")
    return len(trials) - same


if __name__ == "__main__":
    sys.exit(main())
