"""Identity of a data set: what tells the data that a saved mask budget belongs to from any other."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from huggingface_hub import constants
from torch.utils.data import ConcatDataset, Subset

# How the fingerprints that are made here begin; those of version 0.1.0, of 64 rows, are 16 hexadecimal digits alone.
_SCHEME = "v2-"
_FIRST_SCHEME = re.compile("[0-9a-f]{16}")
_PARTLY = "?"
_BATCH = 1000
_END = 4096
_COMMIT = re.compile("[0-9a-f]{40}")


def dataset_fingerprint(dataset: Any) -> str | None:
    """A short hash of a data set's content, the same in every process and under every transform.

    For an HF `Dataset`: the columns, and the stored bytes of every row, in order. Of an image or another file in a
    row: its length, its first 8192 and its last 4096 bytes, so that large photographs need not be read to their end; of
    a file that does not exist: its name. The fingerprint that HF Datasets keeps will not do: it changes with
    `with_transform`, and at random where a transform cannot be pickled.

    For a torch `Subset`: its indices, in order, and the data set that they are of, so that a `random_split` drawn anew
    is another one. For a `ConcatDataset`: its parts and their lengths, in order. Both may be nested. Any other data set
    may say its own in an attribute `fingerprint`.

    Args:
        dataset: an HF `Dataset`, or any object.

    Returns:
        "v2-" and 16 hexadecimal digits, with a "?" behind them where some part of the data set has no identity, so that
        its length and indices alone are known; or the data set's own `fingerprint`; `None` where nothing is known.
    """
    if isinstance(dataset, datasets.Dataset):
        return _SCHEME + _rows_digest(dataset)
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    if isinstance(dataset, Subset):
        indices = hashlib.sha256(np.asarray(dataset.indices, dtype=np.int64).tobytes()).hexdigest()
        return _composed("subset", [(indices, dataset_fingerprint(dataset.dataset))])
    if isinstance(dataset, ConcatDataset):
        return _composed("concat", [(len(part), dataset_fingerprint(part)) for part in dataset.datasets])
    return None


def is_identified(fingerprint: str | None) -> bool:
    """Whether a fingerprint tells all of a data set: other rows, or rows in another order, would have another one."""
    return fingerprint is not None and not (fingerprint.startswith(_SCHEME) and fingerprint.endswith(_PARTLY))


def fingerprints_differ(one: str | None, other: str | None) -> bool:
    """Whether two fingerprints are known to be of different data; one of version 0.1.0 says nothing of a later one."""
    if one is None or other is None:
        return False
    for first, second in ((one, other), (other, one)):
        if _FIRST_SCHEME.fullmatch(first) and second.startswith(_SCHEME):
            return False
    return one != other


def _composed(kind: str, parts: list[tuple[Any, str | None]]) -> str:
    digest = hashlib.sha256(repr([kind, *parts]).encode()).hexdigest()[:16]
    is_partial = any(not is_identified(fingerprint) for _, fingerprint in parts)
    return f"{_SCHEME}{digest}{_PARTLY if is_partial else ''}"


def _rows_digest(dataset: datasets.Dataset) -> str:
    digest = hashlib.sha256(f"{len(dataset)} {dataset.features}".encode())
    for table in dataset.with_format("arrow").iter(_BATCH):
        for name in sorted(table.column_names):
            digest.update(name.encode())
            pixels = _fixed_size_bytes(table[name])
            if pixels is not None:
                for part in pixels:
                    digest.update(part.data)
                continue
            column = _stored(table[name])
            if pa.types.is_struct(column.type) and {field.name for field in column.type} == {"bytes", "path"}:
                for value in column:
                    digest.update(_content(value))
            else:
                digest.update(_body(column))
    return digest.hexdigest()[:16]


def _fixed_size_bytes(column: pa.ChunkedArray) -> list[np.ndarray] | None:
    """What `_body` gives for lists of fixed sizes, such as pixels, in parts and without a copy; `None` for others.

    A thousand photographs are 150 MB, of which `_stored` and `_body` hold four copies.
    """
    if not pa.types.is_fixed_size_list(column.type):
        return None
    parts = []
    for chunk in column.chunks:
        while pa.types.is_fixed_size_list(chunk.type):
            if chunk.null_count:
                return None
            chunk = chunk.flatten()
        if chunk.null_count or not (pa.types.is_integer(chunk.type) or pa.types.is_floating(chunk.type)):
            return None
        parts.append(chunk.to_numpy(zero_copy_only=True).view(np.uint8))
    # The format fills up to a multiple of eight bytes.
    padding = -sum(map(len, parts)) % 8
    return [*parts, np.zeros(padding, dtype=np.uint8)]


def _stored(column: pa.ChunkedArray) -> pa.Array:
    """One array of a column's values, whatever pieces they lie in, of the type that they are stored as."""
    chunks = [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in column.chunks]
    return pa.concat_arrays(chunks)


def _body(column: pa.Array) -> pa.Buffer:
    """The values as Arrow's IPC format lays them out, without its header, which differs between versions of Arrow."""
    # A copy: of a slice the format writes a few bytes of its neighbours as well.
    copy = column.take(pa.array(np.arange(len(column))))
    return pa.ipc.read_message(pa.record_batch([copy], names=["values"]).serialize()).body


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


def _content(value: pa.StructScalar) -> bytes:
    """Hash of a stored file, wherever it lies: the same data in another folder are the same data."""
    if not value.is_valid:
        return hashlib.sha256(b"none").digest()
    content, path = value["bytes"], value["path"].as_py()
    if content.is_valid:
        buffer = memoryview(content.as_buffer())
        return _of_ends(len(buffer), bytes(buffer[: 2 * _END]), bytes(buffer[-_END:]))
    if path is not None and os.path.isfile(path):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(2 * _END)
            file.seek(max(size - _END, 0))
            return _of_ends(size, first, file.read())
    return hashlib.sha256(f"named {os.path.basename(path or '')}".encode()).digest()


def _of_ends(size: int, first: bytes, last: bytes) -> bytes:
    """Hash of a file's size, its first 8192 and its last 4096 bytes."""
    return hashlib.sha256(f"{size} ".encode() + first + last).digest()
