"""What a number was computed with: versions, device, commit."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
import transformers


def describe_environment(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Versions, the device that was computed on, and the commit of the package ("+changes" where files differ from it).

    `commit` is `None` where the package does not run from a git checkout.
    """
    from . import __version__  # the package imports its modules before it has one

    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "timm": version("timm"),
        "datasets": version("datasets"),
        "smoot_hf": __version__,
        "device": f"{device.type}: {name}",
        "commit": _commit(Path(__file__)),
    }


def _commit(source: Path) -> str | None:
    git = ["git", "-C", str(source.parent)]
    # Installed below some other project's checkout, the file is not one of that project's.
    commands = ["ls-files", "--error-unmatch", source.name], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"]
    try:
        runs = [subprocess.run([*git, *c], capture_output=True, text=True, check=True) for c in commands]
    except (OSError, subprocess.CalledProcessError):
        return None
    return runs[1].stdout.strip() + ("+changes" if runs[2].stdout.strip() else "")
