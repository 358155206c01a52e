"""Identity of a data set: what tells the data that a saved mask budget belongs to from any other."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import constants
from torch.utils.data import Subset

_ROWS_HASHED = 64
_COMMIT = re.compile("[0-9a-f]{40}")


def dataset_fingerprint(dataset: Any) -> str | None:
    """A short hash of a data set's content, the same in every process and under every transform.

    For an HF `Dataset`: the columns, the number of rows, and the stored bytes of 64 rows spread evenly over it. The
    fingerprint that HF Datasets keeps will not do: it changes with `with_transform`, and at random where a transform
    cannot be pickled. For a torch `Subset`: its indices and the data set that they are of, so that a `random_split`
    drawn anew is another one. Any other data set may say its own in an attribute `fingerprint`.

    Args:
        dataset: an HF `Dataset`, or any object.

    Returns:
        16 hexadecimal digits (or the data set's own `fingerprint`); `None` where nothing identifies the data.
    """
    if not isinstance(dataset, datasets.Dataset):
        own = getattr(dataset, "fingerprint", None)
        if isinstance(own, str) or not isinstance(dataset, Subset):
            return own if isinstance(own, str) else None
        chosen = hashlib.sha256(np.asarray(dataset.indices, dtype=np.int64).tobytes())
        chosen.update(str(dataset_fingerprint(dataset.dataset)).encode())
        return chosen.hexdigest()[:16]
    stored = dataset.with_format("arrow")
    digest = hashlib.sha256(f"{len(dataset)} {dataset.features}".encode())
    rows = np.unique(np.linspace(0, max(len(dataset) - 1, 0), _ROWS_HASHED).astype(np.int64))
    for row in rows[: len(dataset)]:
        columns = stored[int(row)].to_pydict()
        digest.update(repr([(name, [_content(value) for value in columns[name]]) for name in sorted(columns)]).encode())
    return digest.hexdigest()[:16]


def hub_revision(dataset: Any) -> tuple[str, str] | None:
    """Hub id and commit that a data set was downloaded from; `None` where nothing says so.

    HF Datasets names the folder of its cached rows after the commit, and writes the id there in lower case; the Hub's
    client keeps a folder for the same commit, with the id as it is.

    Args:
        dataset: an HF `Dataset`, or an object that wraps one in its attribute `dataset`.
    """
    while not isinstance(dataset, datasets.Dataset) and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    files = dataset.cache_files if isinstance(dataset, datasets.Dataset) else []
    commits = {Path(file["filename"]).parent.name for file in files}
    if len(commits) != 1 or not _COMMIT.fullmatch(commit := commits.pop()):
        return None
    found = [path.parts[-3] for path in Path(constants.HF_HUB_CACHE).glob(f"datasets--*/snapshots/{commit}")]
    return (found[0].removeprefix("datasets--").replace("--", "/"), commit) if len(found) == 1 else None


def _content(value: Any) -> Any:
    """A stored value; of a file its bytes, wherever it lies: the same data in another folder are the same data."""
    if not (isinstance(value, dict) and value.keys() == {"bytes", "path"}):
        return value
    content, path = value["bytes"], value["path"]
    if content is None and path is not None and os.path.isfile(path):
        with open(path, "rb") as file:
            content = file.read()
    return os.path.basename(path or "") if content is None else hashlib.sha256(content).hexdigest()
