"""The queue of a campaign: the runs of its file, which of them are finished, and the processes that do the others.

A run leaves one small file, `<output>/<setting>-seed<seed>/results.json`, which appears whole or not at all.
"""

import argparse
import json
import os
import sys
import threading
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from ..evaluation.results import describe_environment
from .campaign_run import Plan, run
from .run import write_whole

RESULTS_NAME = "results.json"
WEIGHTS_NAME = "model.safetensors"


def read_campaign(path: Path) -> list[Plan]:
    """The runs of a campaign file, seed by seed.

    Raises:
        ValueError: the file is no campaign, or says what a run does not know; the message names it.
        OSError: it cannot be read.
    """
    campaign = _read_tables(path)
    unknown = campaign.keys() - {"seeds", "network", "data", "train", "settings", "leave_out"}
    if unknown or not campaign.get("settings") or not isinstance(campaign.get("seeds"), int):
        raise ValueError(
            f"{path} must hold seeds (a number), settings, and may hold network, data, train, leave_out: {unknown}"
        )
    names = [setting.get("name") for setting in campaign["settings"]]
    doubled = sorted({str(name) for name in names if names.count(name) > 1 or not name})
    if doubled:
        raise ValueError(f"{path}: every setting needs a name of its own, got {', '.join(doubled)} twice or empty")
    if len({folder_name(Plan(name, 0)) for name in names}) < len(names):
        raise ValueError(f"{path}: two names of settings become one folder name; make them differ in letters or digits")
    left_out = set(campaign.get("leave_out", []))
    if not left_out <= set(names):
        raise ValueError(f"{path}: leave_out names {sorted(left_out - set(names))[0]!r}, which is no setting")
    plans = []
    for seed in range(campaign["seeds"]):
        for setting in (setting for setting in campaign["settings"] if setting["name"] not in left_out):
            own = {name: value for name, value in setting.items() if name != "name"}
            common = {"data": campaign.get("data", {}), "network": campaign.get("network", "paper")}
            plans.append(Plan(setting["name"], seed, train={**campaign.get("train", {}), **own}, **common))
    return plans


def _read_tables(path: Path) -> dict[str, Any]:
    """The tables of a campaign file; of the file that it extends, those that it does not give itself."""
    try:
        campaign = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    if "extends" not in campaign:
        return campaign
    base = _read_tables(path.parent / campaign.pop("extends"))
    for table in ("data", "train"):
        campaign[table] = {**base.get(table, {}), **campaign.get(table, {})}
    return {**base, **campaign}


def chosen(plan: Plan, options: argparse.Namespace) -> Plan:
    """The plan with what the command line says in place of the file, checked.

    Raises:
        ValueError: it asks for what a run does not know.
    """
    places = {name: getattr(options, name) for name in ("source", "partners") if getattr(options, name) is not None}
    plan = replace(plan, data={**plan.data, **places})
    if options.network is not None:
        plan = replace(plan, network=options.network)
    plan.arguments()
    plan.controls()
    plan.images()
    return plan


def select(plans: list[Plan], seeds: list[int] | None, settings: list[str] | None) -> list[Plan]:
    """The plans of some seeds and settings.

    Raises:
        ValueError: a seed or setting that the campaign does not have.
    """
    for kind, given, there in (
        ("seed", seeds, {plan.seed for plan in plans}),
        ("setting", settings, {plan.name for plan in plans}),
    ):
        unknown = sorted(set(given or []) - there, key=str)
        if unknown:
            raise ValueError(f"the campaign has no {kind} {unknown[0]!r}, only {', '.join(map(str, sorted(there)))}")
    return [plan for plan in plans if plan.seed in (seeds or [plan.seed]) and plan.name in (settings or [plan.name])]


def folder_name(plan: Plan) -> str:
    """Of a run's folder: letters and digits of the setting's name, and the seed."""
    words = "".join(letter if letter.isalnum() or letter == "." else " " for letter in plan.name).split()
    return f"{'-'.join(words)}-seed{plan.seed}"


def result_path(plan: Plan, output: Path) -> Path:
    """Where the result of a run lies, or will lie."""
    return output / folder_name(plan) / RESULTS_NAME


def settings_of(plan: Plan) -> dict[str, Any]:
    """What decides a run, as plain values; where the images lie is left out, for they may lie in several places."""
    data = {name: value for name, value in plan.data.items() if name not in ("source", "partners", "photos")}
    return {"name": plan.name, "seed": plan.seed, "network": plan.network, "data": data, "train": dict(plan.train)}


def sources(plan: Plan) -> list[str]:
    """The image sets that a run loads."""
    data = plan.images()
    used = {"pair": [data.partners], "on-photo": [data.photos]}.get(data.planted, [])
    return [data.source, *(source for source in used if source != "scikit-learn")]


def finished_result(plan: Plan, output: Path) -> dict[str, Any] | None:
    """The result of a finished run; `None` where there is none yet.

    Raises:
        ValueError: it is torn, or of other settings than the plan's.
    """
    path = result_path(plan, output)
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["settings"]["name"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, and the run is made again") from error
    _check_settings(plan, result, path)
    return result


def _check_settings(plan: Plan, result: Mapping[str, Any], path: Path) -> None:
    made, asked = result["settings"], json.loads(json.dumps(settings_of(plan)))
    for part in asked:
        if made.get(part) != asked[part]:
            raise ValueError(
                f"{path} was made with {part} {made.get(part)}, not {asked[part]}: choose another place, or delete it"
            )


def finished_results(plans: Sequence[Plan], output: Path, exported: Path | None = None) -> list[dict[str, Any]]:
    """The results of the plans that are finished: in their folders, or in a file that `export` wrote.

    Raises:
        ValueError: a result is torn, or of other settings than its plan's.
        OSError: the file cannot be read.
    """
    if exported is None:
        return [result for plan in plans if (result := finished_result(plan, output)) is not None]
    found = {(result["settings"]["name"], result["settings"]["seed"]): result for result in read_export(exported)}
    here = [(plan, found[plan.name, plan.seed]) for plan in plans if (plan.name, plan.seed) in found]
    for plan, result in here:
        _check_settings(plan, result, exported)
    return [result for _, result in here]


def export(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write finished runs as one file of JSON lines, sorted by name and seed, numbers rounded to four decimals."""
    ordered = sorted(results, key=lambda result: (result["settings"]["name"], result["settings"]["seed"]))
    write_whole(path, "".join(f"{json.dumps(_rounded(result), separators=(',', ':'))}\n" for result in ordered))


def read_export(path: Path) -> list[dict[str, Any]]:
    """The runs of a file that `export` wrote.

    Raises:
        ValueError: a line is no result of a run; the message names it.
        OSError: the file cannot be read.
    """
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            results.append(json.loads(line))
            results[-1]["settings"]["name"], results[-1]["settings"]["seed"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no result of a run: {error}") from error
    return results


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def work(plans: list[Plan], output: Path, workers: int, done: int = 0, device: str = "cpu") -> int:
    """Run the plans on a device, one process a worker; returns how many failed, each of which is told on stderr."""
    failed: list[str] = []
    # A process that inherits threads or locks of ours may hang: each worker starts afresh.
    pool = ProcessPoolExecutor(max(1, min(workers, len(plans))), get_context("spawn"), prepare_worker)
    with tqdm(total=done + len(plans), initial=done, unit="run", desc="Campaign") as bar:
        try:
            futures: dict[Future[str | None], Plan] = {
                pool.submit(run_and_save, plan, output, device): plan for plan in plans
            }
            for future in as_completed(futures):
                error = future.result()
                if error is not None:
                    failed.append(f"{futures[future].name}, seed {futures[future].seed}: {error}")
                bar.set_postfix_str(f"{futures[future].name}, seed {futures[future].seed}")
                bar.update()
        except BrokenProcessPool:
            failed.append(
                "a worker was killed (out of memory?): the same command goes on with the runs that are missing"
            )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for line in failed:
        print(line, file=sys.stderr)
    return len(failed)


def prepare_worker() -> None:
    """One thread, no bars of its own, and an end when the campaign is killed: nobody would take the result."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def run_and_save(plan: Plan, output: Path, device: str = "cpu") -> str | None:
    """Run a plan, write its weights, then its result, whole or not at all; returns the error of a run that failed."""
    path = result_path(plan, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = run(plan, path.with_name(WEIGHTS_NAME), device)
    except Exception:
        return traceback.format_exc()
    whole = {"settings": settings_of(plan), **result, "environment": describe_environment(device)}
    write_whole(path, json.dumps(whole, indent=1) + "\n")
    return None
