"""A short training of a tiny ViT, run by test_distributed.py in one or several processes; saves what came out of it."""

import sys

import torch
from conftest import QUICK, TinyImages, build

from smoot_hf import SmootTrainer, SmootTrainingArguments


def main(folder, batch_size, length):
    torch.use_deterministic_algorithms(True)
    args = SmootTrainingArguments(
        output_dir=folder, step_size=3000, optim="sgd", **(QUICK | {"per_device_train_batch_size": int(batch_size)})
    )
    trainer = SmootTrainer(build("vit"), args, train_dataset=TinyImages(int(length)))
    trainer.train()
    result = {
        "k": trainer.mask_budget.k,
        "world_size": args.world_size,
        "parameters": {name: p.detach() for name, p in trainer.model.named_parameters()},
        "logs": trainer.state.log_history,
    }
    torch.save(result, f"{folder}/rank{args.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
