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
import hashlib
import html
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from checkpoints import Checkpoint, load_checkpoint, recorded_images
from command_line import OneLineParser
from explanation import STEPS, Explanation, as_pixels, draw_fall, enlarged, explain, saliency_picture
from figures import style
from PIL import Image
from run_record import METHODS, RECORD_NAME, RunRecord

from smoot_hf.data import DecodedImages
from smoot_hf.markup import one_line

FILLS = ("corner", "mean")
_PER_CLASS, _MOST_EXAMPLES = 2, 20
_CSS = """
.pixels img { image-rendering: pixelated; }
#examples .grid-wrap { max-height: none; overflow: visible; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
footer { display: none !important; }
"""


class Example(NamedTuple):
    """A test image: uint8 (C, H, W), and the name of its class."""

    pixels: torch.Tensor
    label: str


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
            from space import write_space

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

    Raises:
        ValueError: two of one name, or a comparison without runs.
    """
    folders = [folder for path in paths for folder in _runs_of(path)]
    methods = [_method(folder) for folder in folders]
    names = [
        method if method is not None and methods.count(method) == 1 else Path(folder).name
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


def _method(folder: str) -> str | None:
    is_run = (Path(folder) / RECORD_NAME).is_file()
    return RunRecord.load(Path(folder)).method if is_run else None


def choose_examples(test: DecodedImages) -> list[Example]:
    """The first two test images of every class, and at most twenty."""
    labels = range(len(test.label_names))
    by_class = [np.flatnonzero(test.labels == label)[:_PER_CLASS] for label in labels]
    rows = [int(row) for found in by_class for row in found][:_MOST_EXAMPLES]
    return [Example(test[row]["pixel_values"], test.label_names[test[row]["labels"]]) for row in rows]


class PictureFiles:
    """Pictures as files, deleted at the end: each is written once, and is whole when it is there.

    A picture that gradio is handed as such it writes anew every time, also while a browser reads it.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="smoot-demo-")

    def path_of(self, picture: Image.Image) -> str:
        """Of the PNG file."""
        content = f"{picture.mode} {picture.size} ".encode() + picture.tobytes()
        path = Path(self._folder.name) / f"{hashlib.sha256(content).hexdigest()}.png"
        if not path.exists():
            with tempfile.NamedTemporaryFile(dir=self._folder.name, delete=False) as file:
                picture.save(file, "PNG")
            os.replace(file.name, path)
        return str(path)


def make_page(checkpoints: Mapping[str, Checkpoint], examples: Sequence[Example]) -> Any:
    """The page, a `gradio.Blocks`; see `launch_settings`.

    Args:
        checkpoints: model -> checkpoint.
        examples: at least one; they say the size and the channels of images.

    Raises:
        ImportError: without gradio.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("the demo needs gradio: pip install 'smoot-hf[demo]'") from error
    shape: Any = tuple(examples[0].pixels.shape)
    files = PictureFiles()
    pictures = [files.path_of(enlarged(example.pixels.permute(1, 2, 0).numpy())) for example in examples]
    labels = {name: _labels(checkpoint) for name, checkpoint in checkpoints.items()}
    colours = {name: colour for name, (colour, _) in style(list(checkpoints)).items()}

    def explain_image(image: Image.Image | None, fill: Any, removed: float) -> list[Any]:
        """Explain an image by every model."""
        if image is None:
            return [None, *show({}, removed)]
        try:
            pixels = as_pixels(image, shape)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        found = {name: explain(checkpoint, pixels, fill) for name, checkpoint in checkpoints.items()}
        return [found, *show(found, removed)]

    def show(found: Mapping[str, Explanation] | None, removed: float) -> list[Any]:
        """The models' columns and the curve with so many percent of the pixels removed."""
        step = round(removed * STEPS / 100)
        if not found:
            return [None] * (3 * len(checkpoints) + 1)
        columns = [
            value
            for name, one in found.items()
            for value in (
                verdict(one, labels[name], step),
                files.path_of(enlarged(one.pictures[step])),
                files.path_of(enlarged(saliency_picture(one.attribution))),
            )
        ]
        return [*columns, draw_fall(found, colours, step)]

    def choose(event: gr.SelectData) -> str:
        """File of the example that was clicked."""
        return pictures[event.index]

    with gr.Blocks(title="What does the model look at?", analytics_enabled=False) as page:
        gr.Markdown(
            "# What does the model look at?\nChoose an image or drop one, then remove the pixels that each model calls "
            "most salient. The faster its probability falls, the more faithful is its map."
        )
        found = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                image = gr.Image(
                    type="pil", image_mode=None, format="png", show_label=False, height=230, elem_classes="pixels",
                    sources=["upload", "clipboard"],
                )  # fmt: skip
                gr.Markdown("Test images")
                gallery = gr.Gallery(
                    [(picture, one_line(example.label)) for picture, example in zip(pictures, examples, strict=True)],
                    show_label=False, columns=4, allow_preview=False, format="png", buttons=[], height="auto",
                    object_fit="contain",
                    elem_id="examples", elem_classes="pixels",
                )  # fmt: skip
            with gr.Column(scale=3):
                removed = gr.Slider(
                    0,
                    100,
                    value=0,
                    step=100 / STEPS,
                    label="Most salient pixels removed (% at most)",
                    elem_id="removed",
                )
                fill = gr.Radio(list(FILLS), value=FILLS[0], label="Removed pixels become the image's")
                columns: list[Any] = []
                with gr.Row():
                    for name in checkpoints:
                        with gr.Column(min_width=200):
                            gr.HTML(f"<h3 style='color: {colours[name]}'>{html.escape(one_line(name))}</h3>")
                            columns.append(gr.HTML(elem_id=f"verdict-{name}"))
                            for label in ("Pixels left", "Saliency"):
                                gr.Markdown(label)
                                columns.append(
                                    gr.Image(
                                        label=f"{label}, {name}", show_label=False, height=210, format="png",
                                        interactive=False, buttons=[], elem_classes="pixels",
                                    )
                                )  # fmt: skip
                curve = gr.Plot(show_label=False, format="png", elem_id="curve")
        outputs = [*columns, curve]
        gr.on(
            [image.change, fill.change],
            explain_image,
            [image, fill, removed],
            [found, *outputs],
            api_name="explain",
            show_progress="hidden",
        )
        removed.change(
            show, [found, removed], outputs, api_name="show", show_progress="hidden", trigger_mode="always_last"
        )
        gallery.select(choose, None, image, show_progress="hidden")
        page.load(lambda: pictures[0], None, image, show_progress="hidden")
    return page


def launch_settings() -> dict[str, Any]:
    """What goes to `launch` beside address and port; nothing is fetched from elsewhere."""
    import gradio as gr

    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return {"theme": gr.themes.Default(**fonts), "css": _CSS, "ssr_mode": False}


def verdict(one: Explanation, labels: Sequence[str], step: int) -> str:
    """What a model says of the whole image, and what with so much of it removed, as HTML."""
    first, now = (
        "no class (NaN)" if predicted < 0 else labels[predicted]
        for predicted in (int(one.classes[0]), int(one.classes[step]))
    )
    whole, kept, removed = (100 * float(v) for v in (one.probability[0], one.probability[step], one.fractions[step]))
    changed = "still" if now == first else "now"
    was, becomes = html.escape(one_line(first)), html.escape(one_line(now))
    # Three short lines whatever happens, so that the columns stay level.
    return (
        f"Whole image: <b>{was}</b>, {whole:.0f} %<br>{removed:.0f} % removed: {kept:.0f} %<br>"
        f"{changed} predicts <b>{becomes}</b>"
    )


def _labels(checkpoint: Checkpoint) -> list[str]:
    config = checkpoint.model.config
    return [str(config.id2label[number]) for number in range(config.num_labels)]


if __name__ == "__main__":
    main()
