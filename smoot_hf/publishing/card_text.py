"""The text of a model card: Markdown from what a run has measured and what is known of it.

Nothing that another wrote (names of classes, data, models, values of arguments) goes in without `markup`.
"""

import json
from collections.abc import Mapping
from typing import Any

from ..evaluation.results import Results, Row, left_out_notes
from ..markup import markdown_code, markdown_link, markdown_text, one_line

_METHODS = {
    "smoot": "**SMOOT** (*Saliency Guided Mask Optimized Online Training*): in every step of training the K least "
    "salient pixels of each image were replaced by noise, the prediction was held to what it was before, and that "
    "image's own K moved up or down",
    "sgt": "**SGT** (*Saliency Guided Training*): in every step of training the K least salient pixels of each image "
    "were replaced by noise, K being the same for all images, and the prediction was held to what it was before",
    "standard": "standard training (cross-entropy alone)",
}
_COLUMNS = {
    "accuracy": "Accuracy (%)",
    "deletion_auc": "Deletion AUC (%, lower is better)",
    "random_auc": "The same in random order",
    "insertion_auc": "Insertion AUC (%, higher is better)",
    "gap": "Gap (higher is better)",
}
_MOST_NAMES = 20


def card_text(results: Results, about: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """Everything below the metadata.

    Args:
        results: of `model_card.run_results`: the final weights first, then a row for each convention.
        about: of `model_card`: names, data, model.
        figures: name -> path from the card.
    """
    sections = {
        "Results": _results(results, about, figures),
        "K: how many pixels each image could lose": _budget(results.rows[0], figures),
        "Use": _use(about),
        "Training": _training(results, about),
        "Versions": _table(_versions(results.environment), ("item", "value")),
        "Limits": _limits(results, about),
        "Citation": _CITATION,
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items() if text)
    return f"# {markdown_text(about['name'])}\n\n{_introduction(results, about)}\n\n{body}\n"


def _introduction(results: Results, about: Mapping[str, Any]) -> str:
    if about["base_model_id"]:
        start = markdown_link(about["base_model_id"], f"https://huggingface.co/{about['base_model_id']}")
    elif about["base_model"]:
        start = markdown_text(about["base_model"])
    else:
        start = "a local checkpoint" if about["is_finetuned"] else "random weights"
    data = markdown_text(about["dataset"] or "a data set that was not named")
    classes = [markdown_text(name) for name in about["classes"]]
    names = ", ".join(classes[:_MOST_NAMES]) + (", ..." if len(classes) > _MOST_NAMES else "")
    return (
        f"An image classifier of {len(classes)} classes ({names}): a {markdown_code(about['model'])} of "
        f"{about['parameters']:,} parameters, trained from {start} on {data} by {_METHODS[results.settings['method']]}."
    )


def _results(results: Results, about: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    first, *measured = results.rows
    reported = {name: m.mean for name, m in first.metrics.items() if m.unit == "as reported"}
    parts = []
    if reported:
        images = f" ({about['eval_images']:,} images)" if about["eval_images"] else ""
        sets = "sets" if about["has_eval_sets"] else "set"
        parts.append(f"On the evaluation {sets}{images}, as the metrics report them:")
        parts.append("\n".join(f"- {markdown_text(name)}: {value:.4f}" for name, value in reported.items()))
    if measured:
        columns = {n: title for n, title in _COLUMNS.items() if any(n in row.metrics for row in measured)}
        n = {detail["n"] for row in measured for detail in row.details["by_seed"].values()}
        parts.append(
            f"Faithfulness of the saliency, on {' and '.join(f'{count:,}' for count in sorted(n))} images of it: what "
            "is left of the accuracy when the pixels that the saliency points at are removed (deletion), or when they "
            "alone are there (insertion). **The convention is part of the number**: only numbers of one convention "
            "compare."
        )
        # One run: its seed stands in the settings, and the limits say what that means.
        parts.append(Results("", {}, {}, measured).markdown_table(columns).replace(" (n=1)", "").strip())
        parts += left_out_notes(measured)
        parts += [sentence for i, row in enumerate(measured, 1) for sentence in _reading(i, row)]
    if "curves" in figures:
        parts.append(f"![Deletion and insertion curves, with a random order as the control]({figures['curves']})")
    if "saliency" in figures:
        parts.append(f"![Evaluation images and their saliency]({figures['saliency']})")
        parts.append(
            "*Evaluation images, spread evenly over the set, and the magnitude of the gradient of their label's logit "
            "(mean over the channels), each as a share of its own maximum.*"
        )
    return "\n\n".join(parts)


def _reading(number: int, row: Row) -> list[str]:
    """The interval of an area, and whether it says anything."""
    sentences = []
    for detail in row.details["by_seed"].values():
        if detail["deletion"]["interval"]:
            low, high = detail["deletion"]["interval"]
            sentences.append(f"[{number}] 95 % interval of the deletion AUC over the images: {low:.2f} to {high:.2f}.")
    if "random_auc" in row.metrics and row.metrics["deletion_auc"].mean >= row.metrics["random_auc"].mean:
        sentences.append(
            f"[{number}] **The deletion AUC is not below that of a random order: in this convention the saliency "
            "points at nothing that matters to the model.**"
        )
    return sentences


def _budget(first: Row, figures: Mapping[str, str]) -> str:
    histogram = first.details.get("k_histogram")
    if histogram is None:
        return ""
    height, width = histogram["image_size"]
    counts, lowest = histogram["counts"], histogram["lowest"]
    if len(counts) == 1:
        return f"K was {lowest} of {height * width} pixels for every training image."
    k = {name: first.metrics[name].mean for name in ("k_min", "k_median", "k_max")}
    text = (
        f"At the end of training K was {k['k_min']:g} / {k['k_median']:g} / {k['k_max']:g} of {height * width} pixels "
        f"(minimum, median, maximum over {sum(counts):,} training images); {counts[0]:,} images were at the lower "
        f"bound of {lowest} and {counts[-1]:,} at the upper one of {lowest + len(counts) - 1}."
    )
    return text + (
        f"\n\n![How many training images have which K]({figures['k_histogram']})" if "k_histogram" in figures else ""
    )


def _use(about: Mapping[str, Any]) -> str:
    if not about["has_processor"]:
        return ""
    trust = ", trust_remote_code=True" if about["needs_code"] else ""
    code = (
        "\nThe repository brings the code of this model along, which `trust_remote_code=True` runs: look at its `.py` "
        "files first.\n"
    )
    pixels = {
        True: "Images are resized and normalised as in the evaluation.",
        False: "**The image processor of this repository makes other pixels than the evaluation did: the results above "
        "are not those of the code here.**",
        None: "Images are resized and normalised by the image processor of this repository.",
    }[about["processor_agrees"]]
    pixels += " Colours are made grey." if about["is_grey"] else ""
    libraries = "transformers and timm" if about["needs_timm"] else "transformers"
    # The same text means the same in JSON and in Python, and stays on its line of the code.
    repo = json.dumps(one_line(about["repo"]), ensure_ascii=False)
    return _USE.format(repo=repo, trust=trust, code=code if trust else "", pixels=pixels, libraries=libraries)


_USE = """With {libraries} alone:

```python
from transformers import pipeline

classify = pipeline("image-classification", {repo}{trust})
classify("photo.png")
```
{code}
{pixels} To draw the saliency of a prediction, with
[captum](https://captum.ai):

```python
import matplotlib.pyplot as plt
from captum.attr import Saliency
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

repo = {repo}
processor = AutoImageProcessor.from_pretrained(repo{trust})
model = AutoModelForImageClassification.from_pretrained(repo{trust})
model.eval()
photo = Image.open("photo.png").convert("RGB")
pixels = processor(photo, return_tensors="pt")["pixel_values"].requires_grad_()


def logits(pixel_values):
    return model(pixel_values=pixel_values).logits


predicted = logits(pixels).argmax(dim=1)
saliency = Saliency(logits).attribute(pixels, target=predicted).mean(dim=1)  # (1, H, W)
plt.imshow(saliency[0], cmap="magma")
plt.savefig("saliency.png")
```"""


_OF_THE_DATA = {
    "configuration": "dataset_config",
    "revision": "dataset_revision",
    "fingerprint of the training set": "dataset_fingerprint",
}


def _training(results: Results, about: Mapping[str, Any]) -> str:
    settings = dict(results.settings)
    data = markdown_text(about["dataset"] or "not named")
    if about["dataset_id"]:
        data = markdown_link(about["dataset"], f"https://huggingface.co/datasets/{about['dataset_id']}")
    facts = {
        "data set": data,
        **{name: markdown_text(about[key]) for name, key in _OF_THE_DATA.items() if about[key] is not None},
        "training images": None if about["train_images"] is None else f"{about['train_images']:,}",
        "epochs": f"{epochs:.4g}" if (epochs := settings.pop("epochs")) is not None else None,
        "steps": settings.pop("steps"),
    }
    known = {name: value for name, value in facts.items() if value is not None}
    heading = "Method, seed, the arguments that differ from their defaults, and what no argument says:"
    return (
        f"{_table(known, ('item', 'value'))}\n\n{heading}\n\n"
        f"{_table({markdown_code(k): markdown_code(v) for k, v in settings.items()}, ('argument', 'value'))}"
    )


def _versions(environment: Mapping[str, Any]) -> dict[str, Any]:
    known = {markdown_text(name): markdown_text(value) for name, value in environment.items() if value is not None}
    if "commit" in known:
        known["commit of smoot_hf"] = known.pop("commit")
    return known


def _table(values: Mapping[str, Any], heads: tuple[str, str]) -> str:
    """A table of two columns; names and values are Markdown already."""
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in values.items())])


def _limits(results: Results, about: Mapping[str, Any]) -> str:
    limits = [
        f"One training run (seed {results.settings['seed']}): how much the numbers move with the seed is not known.",
        "A saliency map shows what the model's output reacts to, not why the label is right; it is no proof that the "
        "model decides for good reasons.",
    ]
    if len(results.rows) == 1:
        limits.append("The faithfulness of this model's saliency was not measured.")
    else:
        limits.append(
            "Faithfulness was measured on the images above only, and in no other convention than those stated."
        )
    if results.settings["method"] != "standard":
        limits.append(
            "A model trained on masked images takes the removal of any pixels otherwise than one that was not: compare "
            "with the random order, not with the numbers of other models alone."
        )
    data = markdown_text(about["dataset"] or "its training set")
    limits.append(f"It knows the classes of {data}, and takes every image for one of them.")
    return "\n".join(f"- {limit}" for limit in limits)


_CITATION = """SMOOT: *Saliency Guided Mask Optimized Online Training*. SGT: Ismail, Corrada Bravo, Feizi: *Improving
Deep Learning Interpretability by Saliency Guided Training*, NeurIPS 2021.

```bibtex
@misc{smoot,
  title = {Saliency Guided Mask Optimized Online Training}
}
@inproceedings{sgt,
  title = {Improving Deep Learning Interpretability by Saliency Guided Training},
  author = {Ismail and {Corrada Bravo} and Feizi},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021}
}
```"""
