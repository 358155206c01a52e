"""A folder that can be published as a Space: the demo's page, its models and examples, and the code that they need."""

import json
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from transformers import AutoImageProcessor

from ..markup import markdown_text
from .checkpoint import read_checkpoint, saved_model
from .page import Example, make_page

ROOT = Path(__file__).parent.parent
# What brings everything else that a page needs.
_FIRST_MODULE = "space"
_METADATA = "metadata.jsonl"

_APP = '''"""Serves the page; written by recipes/demo.py."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "recipes")]

from page import launch_settings  # noqa: E402
from space import read_page  # noqa: E402

demo = read_page(HERE)

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
Written by `recipes/demo.py` of smoot_hf; the models are in `checkpoints`, the example images in `examples`.
"""


def write_space(folder: Path, checkpoints: Mapping[str, str], examples: Sequence[Example]) -> None:
    """Write everything that the page needs.

    Args:
        folder: must not exist, or be empty.
        checkpoints: name on the page -> folder or Hub id.
        examples: test images.

    Raises:
        ValueError: the folder holds something.
        ImportError: without gradio, whose version the Space names.
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
    for number, (pixels, label) in enumerate(examples):
        file_name = f"{number:02}.png"
        picture = pixels.permute(1, 2, 0).numpy()
        Image.fromarray(picture[..., 0] if len(pixels) == 1 else picture).save(folder / "examples" / file_name)
        lines.append(json.dumps({"file_name": file_name, "label": label}) + "\n")
    (folder / "examples" / _METADATA).write_text("".join(lines), encoding="utf-8")
    (folder / "order.json").write_text(json.dumps(list(checkpoints)) + "\n", encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for file in [*package_files(project), *page_files()]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / file)
    (folder / "requirements.txt").write_text("\n".join(requirements(project)) + "\n", encoding="utf-8")
    (folder / "app.py").write_text(_APP, encoding="utf-8")
    # A Space's own default is older than this package allows.
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = ", ".join(map(markdown_text, checkpoints))
    readme = _README.format(version=gradio.__version__, python=python, names=names)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def package_files(project: Mapping[str, Any]) -> list[Path]:
    """What an installed `smoot_hf` consists of, by `pyproject.toml`: paths from the repository's root."""
    settings = project["tool"]["setuptools"]
    folders = {name: ROOT / name.replace(".", "/") for name in settings["packages"]}
    patterns = [(name, "*.py") for name in folders]
    patterns += [(name, pattern) for name, several in settings["package-data"].items() for pattern in several]
    found = {file for name, pattern in patterns for file in folders[name].glob(pattern)}
    return sorted(file.relative_to(ROOT) for file in found)


def page_files() -> list[Path]:
    """The recipes that a page imports, and they alone: whatever else lies in their folder is nobody's business."""
    recipes = Path(__file__).parent
    finder = ModuleFinder(path=[str(recipes)])
    finder.import_hook(_FIRST_MODULE)
    # Modules that are built into Python have no file.
    files = [getattr(module, "__file__", None) for module in finder.modules.values()]
    return sorted(Path(file).relative_to(ROOT) for file in files if file is not None)


def requirements(project: Mapping[str, Any]) -> list[str]:
    """The packages that the code needs, in the versions installed here, with which the page was tried."""
    needed = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["recipes"]]
    names = [Requirement(text).name for text in needed]
    # Without what only names the build, as in 2.11.0+cpu.
    return [f"{name}=={Version(version(name)).public}" for name in names]


def _place(number: int) -> str:
    """Folder of a model in the Space, by its place among them: a name may be any text."""
    return f"checkpoints/{number:02}"


def read_page(folder: Path) -> Any:
    """The page of a folder that `write_space` wrote."""
    names = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    checkpoints = {name: read_checkpoint(str(folder / _place(number)), "cpu") for number, name in enumerate(names)}
    examples = []
    for line in (folder / "examples" / _METADATA).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        picture = np.array(Image.open(folder / "examples" / row["file_name"]))
        channels_last = torch.from_numpy(picture.reshape(*picture.shape[:2], -1))
        examples.append(Example(channels_last.permute(2, 0, 1), row["label"]))
    return make_page(checkpoints, examples)
