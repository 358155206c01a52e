"""The demo's page: images on the left; what each model says of one, looks at, and is left with on the right."""

import html
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.decoded_images import DecodedImages
from ..evaluation.attributions import Method
from ..functional.localisation import top_outside
from ..markup import one_line
from .checkpoint import Checkpoint
from .explanation import STEPS, Explanation, draw_fall, enlarged, explain, read_pixels, saliency_picture
from .figures import style
from .html_page import picture_html

_PER_CLASS, _MOST_EXAMPLES = 2, 20
# The share of the pixels that counts as most salient, as in docs/verdict.md.
_TOP = 0.1
FILLS = ("corner", "mean")
# Of an uploaded file; a photograph has a tenth of it.
_MOST_UPLOADED = "20mb"
# Uploaded files that are older than so many seconds are deleted, which is looked at every so many seconds.
_OLD, _EVERY = 600, 60
# Visitors whose last explanation is kept, and for how many seconds: one of 224x224 pixels by three models takes 10 MB.
_VISITORS, _KEPT = 100, 3600
_CSS = """
.pixels img { image-rendering: pixelated; }
img.picture { image-rendering: pixelated; height: 210px; max-width: 100%; object-fit: contain; }
#examples .grid-wrap { max-height: none; overflow: visible; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
footer { display: none !important; }
"""


class Example(NamedTuple):
    """A test image: uint8 (C, H, W), the name of its class, and bool (H, W) where its evidence lies, if it is known."""

    pixels: torch.Tensor
    label: str
    evidence: torch.Tensor | None = None


def choose_examples(test: DecodedImages) -> list[Example]:
    """The first two test images of every class, and at most twenty."""
    labels = range(len(test.label_names))
    by_class = [np.flatnonzero(test.labels == label)[:_PER_CLASS] for label in labels]
    rows = [int(row) for found in by_class for row in found][:_MOST_EXAMPLES]
    found = (test[row] for row in rows)
    return [Example(row["pixel_values"], test.label_names[row["labels"]], row.get("evidence")) for row in found]


class Found(NamedTuple):
    """What a visitor sees: model -> explanation, and where the evidence of the image lies, if that is known."""

    explained: Mapping[str, Explanation]
    evidence: torch.Tensor | None


class ExampleFiles:
    """The examples as PNG files, which gradio shows and hands back by their paths; deleted with this object."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="smoot-demo-")
        self.paths = [str(Path(self._folder.name) / f"{number:02}.png") for number in range(len(examples))]
        for path, example in zip(self.paths, examples, strict=True):
            enlarged(example.pixels.permute(1, 2, 0).numpy()).save(path)


def make_page(
    checkpoints: Mapping[str, Checkpoint], examples: Sequence[Example], attribution: Method = "gradient"
) -> Any:
    """The page, a `gradio.Blocks`; see `launch_settings`.

    Args:
        checkpoints: model -> checkpoint.
        examples: at least one; they say the size and the channels of images.
        attribution: what ranks the pixels.

    Raises:
        ValueError: the attribution cannot explain one of the models.
        ImportError: without gradio.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("the demo needs gradio: pip install 'smoot-hf[demo]'") from error
    shape: Any = tuple(examples[0].pixels.shape)
    for checkpoint in checkpoints.values():
        # Whether it can be explained shows here, and not to the first visitor.
        explain(checkpoint, examples[0].pixels, attribution=attribution)
    files = ExampleFiles(examples)
    labels = {name: _labels(checkpoint) for name, checkpoint in checkpoints.items()}
    colours = {name: colour for name, (colour, _) in style(list(checkpoints)).items()}

    def explain_image(file: str | None, fill: Any, removed: float) -> list[Any]:
        """Explain the image in a file by every model."""
        if file is None:
            return [None, *show(None, removed)]
        try:
            pixels = read_pixels(file, shape)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        explained = {name: explain(checkpoint, pixels, fill, attribution) for name, checkpoint in checkpoints.items()}
        found = Found(explained, evidence_of(pixels, examples))
        return [found, *show(found, removed)]

    def show(found: Found | None, removed: float) -> list[Any]:
        """The models' columns and the curve with so many percent of the pixels removed."""
        step = round(removed * STEPS / 100)
        if found is None:
            return [None] * (3 * len(checkpoints) + 1)
        columns = [
            value
            for name, one in found.explained.items()
            for value in (
                verdict(one, labels[name], step, found.evidence),
                picture_html(enlarged(one.pictures[step]), f"pixels left, {name}"),
                picture_html(enlarged(saliency_picture(one.attribution)), f"saliency, {name}"),
            )
        ]
        return [*columns, draw_fall(found.explained, colours, step)]

    def choose(event: gr.SelectData) -> str:
        """File of the example that was clicked."""
        return files.paths[event.index]

    with gr.Blocks(title="What does the model look at?", analytics_enabled=False, delete_cache=(_EVERY, _OLD)) as page:
        gr.Markdown(
            "# What does the model look at?\nChoose an image or drop one, then remove the pixels that each model calls "
            "most salient. The faster its probability falls, the more faithful is its map."
        )
        found = gr.State(time_to_live=_KEPT)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                image = gr.Image(
                    type="filepath", image_mode=None, format="png", show_label=False, height=230, elem_classes="pixels",
                    sources=["upload", "clipboard"],
                )  # fmt: skip
                gr.Markdown("Test images")
                gallery = gr.Gallery(
                    [(path, one_line(example.label)) for path, example in zip(files.paths, examples, strict=True)],
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
                                columns.append(gr.HTML())
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
        page.load(lambda: files.paths[0], None, image, show_progress="hidden")
    return page


def launch_settings() -> dict[str, Any]:
    """What goes to `launch` beside address and port: nothing is fetched from elsewhere, little is kept of a visitor."""
    import gradio as gr

    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    look: dict[str, Any] = {"theme": gr.themes.Default(**fonts), "css": _CSS, "ssr_mode": False}
    return look | {"max_file_size": _MOST_UPLOADED, "state_session_capacity": _VISITORS}


def evidence_of(pixels: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor | None:
    """Where the evidence of an image lies, bool (H, W), if it is an example of which that is known."""
    return next((example.evidence for example in examples if torch.equal(example.pixels, pixels)), None)


def verdict(one: Explanation, labels: Sequence[str], step: int, evidence: torch.Tensor | None = None) -> str:
    """What a model says of the whole image, what with so much of it removed, and how its map fits, as HTML."""
    first, now = (
        "no class (NaN)" if predicted < 0 else labels[predicted]
        for predicted in (int(one.classes[0]), int(one.classes[step]))
    )
    whole, kept, removed = (100 * float(v) for v in (one.probability[0], one.probability[step], one.fractions[step]))
    changed = "still" if now == first else "now"
    was, becomes = html.escape(one_line(first)), html.escape(one_line(now))
    # As many short lines for every model, so that the columns stay level.
    lines = [f"Whole image: <b>{was}</b>, {whole:.0f} %", f"{removed:.0f} % removed: {kept:.0f} %"]
    lines.append(f"{changed} predicts <b>{becomes}</b>")
    if evidence is not None:
        outside = 100 * float(top_outside(one.attribution[None], evidence[None], _TOP))
        lines.append(f"{outside:.0f} % of the top {100 * _TOP:.0f} % pixels lie outside the evidence")
    return "<br>".join(lines)


def _labels(checkpoint: Checkpoint) -> list[str]:
    config = checkpoint.model.config
    return [str(config.id2label[number]) for number in range(config.num_labels)]
