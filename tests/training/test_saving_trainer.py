"""Which errors of a save are said to be of a file, and which are not."""

import errno

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors import SafetensorError

from smoot_hf.errors import SaveError
from smoot_hf.training.checkpoints import writing

NOT_OF_A_FILE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("Some tensors share memory"),
    NotImplementedError("Cannot copy out of meta tensor"),
    MemoryError(),
    ConnectionResetError("the peer"),
    TimeoutError("no answer"),
    OfflineModeIsEnabled("offline"),
    ValueError("something else"),
    SaveError("cannot write to elsewhere"),
]


@pytest.mark.parametrize("error", NOT_OF_A_FILE, ids=lambda error: type(error).__name__)
def test_what_is_no_fault_of_a_file_passes_as_it_is(error, tmp_path):
    """Fault: memory that is used up, or a model that cannot be gathered, told as a full disk."""
    with pytest.raises(type(error)) as caught, writing(str(tmp_path)):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error")])
def test_what_is_a_fault_of_a_file_is_said_so(error, tmp_path):
    """Fault: no word of the folder."""
    with pytest.raises(SaveError, match=r"cannot write to .*free space"), writing(str(tmp_path)):
        raise error


def test_the_runtime_errors_of_torch_save_are_of_a_file(tmp_path):
    """Fault: torch's own words for a folder that is not there, or a disk that is full."""
    with pytest.raises(SaveError, match="cannot write to"), writing(str(tmp_path)):
        torch.save({}, tmp_path / "nowhere" / "file.pt")
    with pytest.raises(SaveError, match="cannot write to"), writing("/dev"), open("/dev/full", "wb") as full:
        torch.save(torch.zeros(10**6), full)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no such collective")])
def test_a_model_that_cannot_be_gathered_says_why(quick_trainer, monkeypatch, error):
    """Fault: "free space" for a state_dict that does not fit into memory."""
    trainer = quick_trainer()

    def state_dict(*_, **__):
        raise error

    monkeypatch.setattr(trainer.model, "state_dict", state_dict)
    with pytest.raises(type(error)) as caught:
        trainer.save_model()
    assert caught.value is error
