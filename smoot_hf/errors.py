"""Errors that the package raises beside the built-in ones, when they are raised, and what they say in one line."""

import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError


class SaveError(OSError):
    """A file could not be written. What had been saved before is unchanged."""


class PushError(OSError):
    """A push to the Hub failed. The complete result is in the output folder."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line, with its cause where it says no more than that something failed."""
    # Requests of the Hub's client have their number on a line of its own.
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    lines = lines or [type(error).__name__]
    line = lines[0].strip().rstrip(".:")
    if error.__cause__ is None or len(lines) > 1 or first_line(error.__cause__) in line:
        return line
    return f"{line} ({first_line(error.__cause__)})"


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """Say which folder could not be written: torch names neither file nor reason, safetensors no file.

    Any other error passes as it is: memory that is used up, or a model whose state cannot be gathered.

    Raises:
        SaveError: a file could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_a_file(error):
            raise
        raise SaveError(
            f"cannot write to {folder} ({first_line(error)}; {_free(folder)}): free space or set output_dir to a "
            "folder that can be written. What was saved before is whole: resume from the last complete checkpoint"
        ) from error


def _is_of_a_file(error: BaseException) -> bool:
    """Whether an error in a save says that a file could not be written."""
    if isinstance(error, SaveError | ConnectionError | TimeoutError | HfHubHTTPError):
        return False
    if isinstance(error, OSError | SafetensorError):
        return True
    # torch.save reports a full disk by a plain RuntimeError of changing words: the place it comes from tells.
    places = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return type(error) is RuntimeError and "torch.serialization" in places


def _free(folder: str) -> str:
    """How much room there is on the disk of a folder that may not exist."""
    place = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return f"{shutil.disk_usage(place).free >> 20} MiB are free on its disk"
