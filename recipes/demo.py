"""A page that shows what models look at: prediction, saliency, and how the probability falls as pixels are removed.

    python recipes/demo.py runs/compare-digits
    python recipes/demo.py CHECKPOINT [CHECKPOINT ...] [--dataset DATA] [--port 7860] [--space FOLDER]

Needs gradio: pip install 'smoot-hf[demo,recipes]'. Time: seconds to start.

A CHECKPOINT is the folder of a run of recipes/train*.py, of a saved model, or a Hub id; the folder of a run of
recipes/compare_methods.py stands for its methods, by their first seed. The examples are test images of the data that
the first run was trained on (--dataset: others, or where they are now). --space writes a folder that can be published
as a Space, with everything it needs, in place of serving the page:

    hf upload --repo-type space NAME/smoot-demo FOLDER

Pixels are ranked, removed and filled as `evaluate_faithfulness` does it. Every model is asked about the class that it
predicts itself for the whole image, since a dropped image has no label.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from checkpoints import load_checkpoint, recorded_images
from command_line import OneLineParser
from page import Example, launch_settings, make_page
from run_record import METHODS, RECORD_NAME, RunRecord
from space import write_space

from smoot_hf.data import DecodedImages

_PER_CLASS, _MOST_EXAMPLES = 2, 20


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page, or write the Space; what a user can get wrong ends with one line and exit code 2."""
    parser = OneLineParser((), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="Folder or Hub id, one or several.")
    parser.add_argument("--dataset", help="Of the examples (default: what the first run's record says).")
    parser.add_argument("--port", type=int, default=7860, help="Of the page (default 7860).")
    parser.add_argument("--space", type=Path, metavar="FOLDER", help="Write a Space instead of serving the page.")
    options = parser.parse_args(argv)
    try:
        names = named_checkpoints(options.checkpoints)
        test = recorded_images(Path(next(iter(names.values()))), "test", options.dataset)
        loaded = {name: load_checkpoint(path, test, "cpu") for name, path in names.items()}
        if options.space is not None:
            write_space(options.space, names, choose_examples(test))
            print(f"written to {options.space}")
            return
        page = make_page(loaded, choose_examples(test))
        # Without blocking, so that a port in use is told like every other error.
        page.launch(server_port=options.port, prevent_thread_lock=True, **launch_settings())
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    page.block_thread()


def named_checkpoints(paths: Sequence[str]) -> dict[str, str]:
    """Checkpoints by the method that trained them, or by the folder's name where that would not tell them apart.

    Methods are those of `METHODS`, whatever a run's record says: the record is checked when it is read.

    Raises:
        ValueError: two of one name, or a comparison without runs.
    """
    folders = [folder for path in paths for folder in _runs_of(path)]
    methods = [_method(folder) for folder in folders]
    names = [
        method if method is not None and methods.count(method) == 1 else _own_name(folder)
        for folder, method in zip(folders, methods, strict=True)
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two of the checkpoints are called {twice!r}: rename a folder")
    return dict(zip(names, folders, strict=True))


def _runs_of(path: str) -> list[str]:
    """A checkpoint as it is; of a comparison the methods' runs of the lowest seed."""
    runs = Path(path) / "runs"
    if not runs.is_dir() or (Path(path) / "config.json").is_file():
        return [path]
    found = [(RunRecord.load(folder), folder) for folder in sorted(runs.iterdir()) if (folder / RECORD_NAME).is_file()]
    finished = [(record, folder) for record, folder in found if record.is_finished]
    if not finished:
        raise ValueError(f"{path} holds no finished run: run recipes/compare_methods.py")
    first = min(record.seed for record, _ in finished)
    chosen = {record.method: str(folder) for record, folder in finished if record.seed == first}
    return [chosen[method] for method in METHODS if method in chosen]


def _own_name(path: str) -> str:
    """Of a folder, also where it is given as "." or "..", or the last part of a Hub id."""
    return (Path(path).resolve() if Path(path).is_dir() else Path(path)).name


def _method(folder: str) -> str | None:
    is_run = (Path(folder) / RECORD_NAME).is_file()
    return RunRecord.load(Path(folder)).method if is_run else None


def choose_examples(test: DecodedImages) -> list[Example]:
    """The first two test images of every class, and at most twenty."""
    labels = range(len(test.label_names))
    by_class = [np.flatnonzero(test.labels == label)[:_PER_CLASS] for label in labels]
    rows = [int(row) for found in by_class for row in found][:_MOST_EXAMPLES]
    return [Example(test[row]["pixel_values"], test.label_names[test[row]["labels"]]) for row in rows]


if __name__ == "__main__":
    main()
