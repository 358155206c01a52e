"""A folder that can be published as a Space: the demo's page, its models and examples, and the code that they need."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from transformers import AutoImageProcessor

from ..evaluation.attributions import Method
from ..markup import markdown_text
from .checkpoint import read_checkpoint, saved_model
from .page import Example, make_page

PACKAGE = Path(__file__).parents[1]
# What a wheel takes along beside the modules; as in pyproject.toml, which is not installed.
PACKAGE_DATA = ("py.typed", "*.pyi", "publishing/*.md", "evaluation/metrics/*/*.py", "evaluation/metrics/*/README.md")
_METADATA = "metadata.jsonl"

_APP = '''"""Serves the page; written by `smoot-hf demo --space`."""

from pathlib import Path

from smoot_hf.experiments.page import launch_settings
from smoot_hf.experiments.space import read_page

demo = read_page(Path(__file__).parent, "{attribution}")

if __name__ == "__main__":
    demo.launch(**launch_settings())
'''

_README = """---
title: What does the model look at?
sdk: gradio
sdk_version: {version}
python_version: "{python}"
app_file: app.py
tags: [smoot, saliency, interpretability, image-classification]
---

Saliency maps of {names}, and what is left of their predictions as the most salient pixels are removed.
Written by `smoot-hf demo --space`; the models are in `checkpoints`, the example images in `examples`.
"""


def write_space(
    folder: Path, checkpoints: Mapping[str, str], examples: Sequence[Example], attribution: Method = "gradient"
) -> None:
    """Write everything that the page needs.

    Args:
        folder: must not exist, or be empty.
        checkpoints: name on the page -> folder or Hub id.
        examples: test images.
        attribution: what ranks the pixels.

    Raises:
        ValueError: the folder holds something.
        ImportError: without gradio, or another package whose version the Space names.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the demo needs gradio: pip install 'smoot-hf[demo]'") from error
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--space {folder} must be a folder that is new or empty")
    (folder / "examples").mkdir(parents=True)
    for number, path in enumerate(checkpoints.values()):
        place = folder / _place(number)
        read_checkpoint(path, "cpu").model.save_pretrained(place)
        AutoImageProcessor.from_pretrained(saved_model(path)).save_pretrained(place)
    lines = []
    for number, (pixels, label, _) in enumerate(examples):
        file_name = f"{number:02}.png"
        picture = pixels.permute(1, 2, 0).numpy()
        Image.fromarray(picture[..., 0] if len(pixels) == 1 else picture).save(folder / "examples" / file_name)
        lines.append(json.dumps({"file_name": file_name, "label": label}) + "\n")
    (folder / "examples" / _METADATA).write_text("".join(lines), encoding="utf-8")
    (folder / "order.json").write_text(json.dumps(list(checkpoints)) + "\n", encoding="utf-8")
    for file in package_files():
        copy = folder / PACKAGE.name / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / file, copy)
    (folder / "requirements.txt").write_text("\n".join(installed_requirements()) + "\n", encoding="utf-8")
    (folder / "app.py").write_text(_APP.format(attribution=attribution), encoding="utf-8")
    # A Space's own default is older than this package allows.
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = ", ".join(map(markdown_text, checkpoints))
    readme = _README.format(version=gradio.__version__, python=python, names=names)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def package_files() -> list[Path]:
    """What a wheel of this package holds, as it lies on this disk: paths from the folder of the package."""
    modules = {file for folder in _packages(PACKAGE) for file in folder.glob("*.py")}
    data = {file for pattern in PACKAGE_DATA for file in PACKAGE.glob(pattern)}
    return sorted(file.relative_to(PACKAGE) for file in modules | data)


def _packages(folder: Path) -> list[Path]:
    """A package and all packages inside it; another folder may hold anything."""
    inner = [file.parent for file in folder.glob("*/__init__.py")]
    return [folder, *(package for one in inner for package in _packages(one))]


def installed_requirements() -> list[str]:
    """The packages that the code needs, in the versions installed here, with which the page was tried.

    Raises:
        ImportError: this package, or one of those that it needs, is not installed.
    """
    needed = [Requirement(text) for text in requires("smoot-hf") or []]
    # Those without a condition, and those of the digits and the figures.
    names = [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": "recipes"})]
    # Without what only names the build, as in 2.11.0+cpu.
    return [f"{name}=={Version(version(name)).public}" for name in names]


def _place(number: int) -> str:
    """Folder of a model in the Space, by its place among them: a name may be any text."""
    return f"checkpoints/{number:02}"


def read_page(folder: Path, attribution: Method = "gradient") -> Any:
    """The page of a folder that `write_space` wrote, with the attribution that ranks the pixels."""
    names = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    checkpoints = {name: read_checkpoint(str(folder / _place(number)), "cpu") for number, name in enumerate(names)}
    examples = []
    for line in (folder / "examples" / _METADATA).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        picture = np.array(Image.open(folder / "examples" / row["file_name"]))
        channels_last = torch.from_numpy(picture.reshape(*picture.shape[:2], -1))
        examples.append(Example(channels_last.permute(2, 0, 1), row["label"]))
    return make_page(checkpoints, examples, attribution)
