"""Run a campaign: many short trainings of many settings and seeds, each judged, in a queue that can be broken off.

    smoot-hf campaign FILE.toml [--source DIRECTORY] [--workers 2] [--seeds 0 1] [--settings NAME ...]
    smoot-hf campaign FILE.toml --summary [--results RESULTS.jsonl]
    smoot-hf campaign FILE.toml --export RESULTS.jsonl

Time: processor time on one thread is measured for every run; recipes/campaigns/forks.toml says what it takes.

Each worker is one process on one thread, so --workers is the number of cores. A run leaves one small file,
OUTPUT/SETTING-seedSEED/results.json, which appears whole or not at all: kill the campaign whenever you like, and the
same command goes on with what is missing. A finished run is never trained again; where the campaign file asks for other
settings than it was made with, the campaign stops before it begins. The error of a run that fails is printed at the
end, and the others go on.

A campaign file (TOML) has `seeds` (how many, from 0), `network` ("paper" or "small"), `[data]` and `[train]` of all
runs, and `[[settings]]` with a `name` and what differs in `[train]`; smoot_hf/experiments/campaign_run.py says what may
stand there. `extends = "other.toml"` takes what the file does not give itself from another, but for the settings that
`leave_out` names. The runs go seed by seed, so that the settings can be compared seed by seed at any time.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from .flags import OneLineParser


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, or print the table of what is there; exits with code 1 where a run has failed."""
    parser = make_campaign_parser()
    options = parser.parse_args(argv)
    # Only now, since it takes ten seconds.
    from . import campaign_queue as queue
    from .campaign_images import load_pixels
    from .campaign_summary import summary

    try:
        plans = [queue.chosen(plan, options) for plan in queue.read_campaign(options.file)]
        plans = queue.select(plans, options.seeds, options.settings)
        output = options.output or Path(f"runs/campaign-{options.file.stem}-{plans[0].network}")
        finished = queue.finished_results(plans, output, options.results)
        if options.export is not None:
            queue.export(finished, options.export)
            print(f"{len(finished)} of {len(plans)} runs written to {options.export}")
        if options.summary:
            print(summary(finished, options.score, options.against))
        if options.summary or options.export is not None:
            return
        missing = [plan for plan in plans if not queue.result_path(plan, output).is_file()]
        for source in {source for plan in missing for source in queue.sources(plan)}:
            load_pixels(source, "train")  # decoded once, before the workers would all do so
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    if queue.work(missing, output, options.workers, done=len(finished), device=options.device):
        raise SystemExit(1)


def make_campaign_parser() -> OneLineParser:
    """The flags of this command."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help="Campaign file, TOML.")
    parser.add_argument("--output", type=Path, help="Folder of the results (default: runs/campaign-FILE-NETWORK).")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="Processes, one thread each (default: all cores)."
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="Where all workers compute (default: cpu)."
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="These seeds alone.")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="These settings alone, by name.")
    parser.add_argument("--network", choices=("paper", "small"), help="In place of the file's.")
    parser.add_argument("--source", help="The images, in place of the file's: a Hub id or a local directory.")
    parser.add_argument("--partners", help="The second image set of the planted set pair, in place of the file's.")
    parser.add_argument("--summary", action="store_true", help="Print the table of the finished runs; train nothing.")
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="Write the finished runs as one file of JSON lines."
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="With --summary: runs of a file that --export wrote."
    )
    parser.add_argument(
        "--score", default="outside_0.1", help="The localisation score of the table (default: outside_0.1)."
    )
    parser.add_argument(
        "--against", default="standard", help="The setting that the others are compared with (default: standard)."
    )
    return parser


if __name__ == "__main__":
    main()
