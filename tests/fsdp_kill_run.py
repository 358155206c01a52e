"""One training under FSDP 2 in two processes, which test_fsdp_kill.py kills, resumes and compares."""

import os
import socket
import sys
from pathlib import Path

import torch
from fsdp_run import make_trainer

# Dropout and AdamW: the random state and the optimizer's must come back as well.
SETTINGS = {
    "dropout": 0.1,
    "max_steps": 40,
    "step_size": 300,
    "save_steps": 2,
    "save_total_limit": 2,
    "learning_rate": 1e-3,
}


def train(rank, folder, port, resumes):
    """What each process does; the first writes `begun`, the weights and the logs."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    trainer = make_trainer("adamw", folder, 2, **SETTINGS)
    if rank == 0:
        (folder / "begun").touch()
    trainer.train(resume_from_checkpoint=resumes)
    if rank == 0:
        (folder / "trained").touch()
    trainer.save_model()
    trainer.save_state()
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    # Forked, and so of one process group, which is killed as a whole; torchrun gives each process a group of its own.
    torch.multiprocessing.start_processes(
        train, (Path(sys.argv[1]), free_port(), "resume" in sys.argv), nprocs=2, start_method="fork"
    )
