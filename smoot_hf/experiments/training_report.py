"""The report of one training, `report.html`: what the model gets right, what it was trained on, what it looks at."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ..errors import first_line
from ..evaluation import Faithfulness
from ..training import SmootTrainer
from .budget_by_class import ClassBudget, by_class, chosen, extremes
from .checkpoint import Checkpoint
from .explanation import enlarged
from .figures import draw_budgets, draw_curves
from .html_page import escaped, figure, html_table, pairs, paragraphs, picture_html, write_page
from .overlay import explain_photograph, heat_over
from .run import BudgetHistory

logger = logging.get_logger(__name__)

# Classes whose confusion matrix can be read, confusions listed, and lowest classes listed.
_MOST_COLUMNS, _MOST_CONFUSIONS, _MOST_CLASSES = 20, 10, 50
# Right and wrong test images that are explained, of each at most.
_EXPLAINED = 6
# Classes of training images, and of each class lowest and highest.
_CLASSES_BY_K, _IMAGES_BY_K = 10, 4
# Side in pixels of the pictures of training images; the page has up to 80 of them.
_SMALL = 96
_NOTHING = "no prediction"


def write_training_report(
    path: Path,
    trainer: SmootTrainer,
    predicted: np.ndarray,
    faithfulness: Sequence[Faithfulness],
    *,
    facts: Mapping[str, Any],
    with_saliency: bool,
) -> None:
    """Write the report; a section that cannot be made says why.

    Args:
        path: of the file.
        trainer: after training; its data sets are `DecodedImages`.
        predicted: int64 (n,), the class predicted for each test image, -1 where there is none; or of several labels
            (n, classes), see `prediction.predicted`.
        faithfulness: of the test images, one for each convention; empty where it was not measured.
        facts: what the first table says of the run.
        with_saliency: whether saliency and deletion are shown.
    """
    names, labels = trainer.train_dataset.label_names, trainer.eval_dataset.labels
    sections: dict[str, Callable[[], str]] = {
        "The run": lambda: pairs(facts),
    }
    if trainer.eval_dataset.is_multi_label:
        sections["Labels"] = lambda: label_table(labels, predicted, names)
    else:
        sections["Accuracy by class"] = lambda: accuracy_table(labels, predicted, names)
        sections["Confusion matrix"] = lambda: confusion(confusion_matrix(labels, predicted, len(names)), names)
    budget = trainer.mask_budget
    if budget is not None and trainer.args.method == "smoot":
        sections["K over the epochs"] = lambda: budget_curve(Path(trainer.args.output_dir))
        sections["The least and the most masked training images"] = lambda: extreme_images(trainer)
    if with_saliency:
        sections["Saliency of test images"] = lambda: saliency(trainer, predicted)
        sections["Deletion"] = lambda: deletion_curves(faithfulness)
    made = {heading: _made(heading, make) for heading, make in sections.items()}
    write_page(path, f"{facts['method']} on {facts['data']}", made)


def _made(heading: str, make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:  # matplotlib and Pillow raise whatever they meet
        logger.warning(f"the report lacks its section {heading!r}: {first_line(error)}")
        return paragraphs([f"This section could not be made: {first_line(error)}."])


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How many images of each class (rows) are predicted as which: int64 (classes, classes + 1).

    Args:
        labels: int64 (n,).
        predicted: int64 (n,); -1, no prediction, is counted in the last column.
        classes: their number.
    """
    counts = np.zeros((classes, classes + 1), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def accuracy_table(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> str:
    """Test images and accuracy of every class that has some, the lowest first."""
    total = np.bincount(labels, minlength=len(names))
    right = np.bincount(labels[labels == predicted], minlength=len(names))
    order = sorted(np.flatnonzero(total).tolist(), key=lambda c: right[c] / total[c])
    lines = [[names[c], f"{100 * right[c] / total[c]:.1f}", f"{right[c]} of {total[c]}"] for c in order[:_MOST_CLASSES]]
    heads = ["Class", "Accuracy (%)", "Test images"]
    left_out = len(order) - len(lines)
    note = [f"{left_out} classes of higher accuracy are left out."] if left_out else []
    return html_table(heads, {"Lowest accuracy first": lines}) + paragraphs(note)


def label_table(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> str:
    """Of several labels: how many test images have each, in how many it is found, and how often it is found rightly.

    Args:
        labels: (n, classes) of 0 and 1.
        predicted: (n, classes): 1 for a label that is predicted.
        names: of the classes.
    """
    has_label, is_found = labels > 0, predicted == 1
    total, found, hits = (values.sum(axis=0) for values in (has_label, is_found, has_label & is_found))
    order = sorted(np.flatnonzero(total).tolist(), key=lambda c: hits[c] / total[c])[:_MOST_CLASSES]
    lines = [[names[c], str(total[c]), _of(hits[c], total[c]), _of(hits[c], found[c])] for c in order]
    heads = ["Label", "Test images", "Found in them (recall)", "Right where found (precision)"]
    left_out = int((total > 0).sum()) - len(lines)
    note = [f"{left_out} labels that are found more often are left out."] if left_out else []
    return html_table(heads, {"Least often found first": lines}) + paragraphs(note)


def _of(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} % ({count} of {total})" if total else "–"


def confusion(counts: np.ndarray, names: Sequence[str]) -> str:
    """The matrix where it can be read, and the most frequent confusions."""
    columns = [*names, _NOTHING] if counts[:, -1].any() else list(names)
    matrix = _shaded(counts[:, : len(columns)], names, columns) if len(names) <= _MOST_COLUMNS else ""
    wrong = [(int(counts[i, j]), i, j) for i, j in zip(*np.nonzero(counts), strict=True) if i != j]
    worst = sorted(wrong, key=lambda one: (-one[0], *one[1:]))[:_MOST_CONFUSIONS]
    if not worst:
        return matrix + paragraphs(["Every test image is classified correctly."])
    lines = [[names[i], [*names, _NOTHING][j], str(count)] for count, i, j in worst]
    return matrix + html_table(["Label", "Predicted", "Test images"], {"Most frequent confusions": lines})


def _shaded(counts: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> str:
    """Counts, the darker the larger their share of the row."""
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    lines = ["<th>label \\ predicted</th>" + "".join(f"<th>{escaped(name)}</th>" for name in columns)]
    for name, numbers, share in zip(rows, counts, shares, strict=True):
        cells = zip(numbers, share, strict=True)
        lines.append(f"<td>{escaped(name)}</td>" + "".join(_shaded_cell(number, part) for number, part in cells))
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"


def _shaded_cell(count: int, share: float) -> str:
    text = "white" if share > 0.5 else "inherit"
    return f'<td style="background: rgba(0, 114, 178, {share:.2f}); color: {text}">{count or ""}</td>'


def budget_curve(folder: Path) -> str:
    """K over the epochs, from the history that the run keeps.

    Raises:
        ValueError: there is none.
    """
    history = BudgetHistory.load(folder)
    if history is None:
        raise ValueError("the run kept no history of K")
    caption = "How many training images have which K (number of masked positions) after each epoch."
    return _drawn("K over the epochs", caption, lambda path: draw_budgets({"smoot": history}, path))


def extreme_images(trainer: SmootTrainer) -> str:
    """Of every class the training images of lowest and of highest K."""
    budget, images = trainer.mask_budget, trainer.train_dataset
    found = chosen(by_class(budget, images), _CLASSES_BY_K)
    heads = "".join(f"<th>{text}</th>" for text in ("Class", "Lowest K", "Median K", "Highest K"))
    rows = "".join(f"<tr>{_extremes_of(one, images)}</tr>\n" for one in found)
    text = (
        f"The number under an image is its K: so many {budget.unit} of {budget.positions} were masked in it at the end "
        "of training. An image of high K keeps its prediction without most of what the model does not look at. Of "
        "equal K the first in the data set is shown; the classes stand in the order of their median."
    )
    return paragraphs([text]) + f'<div class="wide"><table class="pictures"><tr>{heads}</tr>\n{rows}</table></div>'


def _extremes_of(one: ClassBudget, images: Any) -> str:
    low, high = ("".join(_training_image(one, int(place), images) for place in places)
                 for places in extremes(one, _IMAGES_BY_K))  # fmt: skip
    return f"<td>{escaped(one.label)}</td><td>{low}</td><td>{np.median(one.k):g}</td><td>{high}</td>"


def _training_image(one: ClassBudget, place: int, images: Any) -> str:
    row, k = int(one.sample_idx[place]), int(one.k[place])
    pixels = images[row]["pixel_values"].permute(1, 2, 0).numpy()
    picture = enlarged(pixels, _SMALL)
    picture.thumbnail((2 * _SMALL, 2 * _SMALL))
    shown = picture_html(picture, f"training image {row}, {one.label}, K {k}")
    return f"<figure>{shown}<figcaption>{k}</figcaption></figure>"


def saliency(trainer: SmootTrainer, predicted: np.ndarray) -> str:
    """Some test images that are classified correctly and some that are not, each beside its overlay."""
    is_right = predicted == trainer.eval_dataset.labels
    is_wrong = ~is_right & (predicted >= 0)
    text = (
        "Each image as the model gets it, and the same in grey under the saliency of the class predicted: the "
        "magnitude of the gradient of its logit. The most probable classes stand below."
    )
    parts = [paragraphs([text])]
    for heading, is_such in (("Classified correctly", is_right), ("Classified wrongly", is_wrong)):
        rows = np.flatnonzero(is_such)
        count = min(_EXPLAINED, len(rows))
        # Spread evenly over the test images.
        some = [int(rows[number * len(rows) // count]) for number in range(count)]
        shown = "".join(_explained(trainer, row) for row in some) or paragraphs([f"None of {len(predicted)} images."])
        parts.append(f'<h3>{heading}</h3><div class="pictures">{shown}</div>')
    return "".join(parts)


def _explained(trainer: SmootTrainer, row: int) -> str:
    test = trainer.eval_dataset[row]
    checkpoint = Checkpoint(trainer.model, trainer.input_pipeline)  # type: ignore[arg-type]  # every recipe has one
    overlay = explain_photograph(checkpoint, torch.as_tensor(test["pixel_values"]), ["gradient"])
    name = trainer.train_dataset.label_names[int(test["labels"])]
    heat = (255 * heat_over(overlay.picture, overlay.maps[0].values)).round().astype(np.uint8)
    said = ", ".join(f"{escaped(label)} ({100 * share:.0f}&nbsp;%)" for label, share in overlay.predictions[:3])
    pictures = "".join(
        picture_html(_limited(picture), description)
        for picture, description in ((overlay.picture, f"test image {row}"), (heat, f"saliency of test image {row}"))
    )
    return f"<figure>{pictures}<figcaption>Label: {escaped(name)}. Predicted: {said}.</figcaption></figure>"


def _limited(pixels: np.ndarray) -> Image.Image:
    """Small pictures are enlarged, large ones reduced."""
    picture = enlarged(pixels, 112)
    picture.thumbnail((224, 224))
    return picture


def deletion_curves(faithfulness: Sequence[Faithfulness]) -> str:
    """The curves of every convention, with what it is.

    Raises:
        ValueError: nothing was measured.
    """
    if not faithfulness:
        raise ValueError("the saliency could not be measured")
    caption = (
        f"The share of {faithfulness[0].n} test images still classified correctly after their most salient positions "
        "were replaced. The lower the curve is below the dashed one, positions in random order, the better the "
        "saliency points at what the model uses."
    )
    panels = {found.convention: {"this model": {0: found}} for found in faithfulness}
    sides = zip(("Left", "Right"), faithfulness, strict=True)
    described = paragraphs([f"{side}: {found.convention.describe()}." for side, found in sides])
    return _drawn("Deletion curves", caption, lambda path: draw_curves(panels, path)) + described


def _drawn(heading: str, caption: str, draw: Callable[[Path], None]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(path)
        return figure(heading, caption, path)
