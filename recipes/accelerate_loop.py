"""SMOOT without a Trainer: Algorithm 2 in a plain Accelerate loop, on scikit-learn's handwritten digits.

    accelerate launch recipes/accelerate_loop.py [--method smoot|sgt] [--num_train_epochs 20] [flags]

Time: 10 s on two CPU cores.
Expected: as train_digits.py, of which these are the settings; a test holds `train` to the weights and the K of
SmootTrainer.

The function `train` is what to copy. Each batch brings the rows of its samples in the training set, by which K is kept
and the noise is drawn; everything else is a plain loop of Accelerate. SmootTrainer does more: checkpoints that hold K
and give it back, evaluation, logs, checks of every batch, steps that fp16 skips, and the Hub.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import HfArgumentParser, set_seed

from smoot_hf import (
    InputPipeline,
    MaskBudget,
    PaperCnnConfig,
    PaperCnnForImageClassification,
    SmootSettings,
    SmootTrainingArguments,
    load_image_dataset,
    masked_step,
)
from smoot_hf.data import DecodedImages, decode_images
from smoot_hf.training.mask_budget_file import MASK_BUDGET_NAME

DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/digits-cnn-loop",
    "num_train_epochs": 20,
    "per_device_train_batch_size": 64,
    "learning_rate": 1.0,
    "rounding": "trunc",
    "saliency_score": "log_prob",
}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    budget: MaskBudget,
    settings: SmootSettings,
    accelerator: Accelerator,
    num_epochs: int = 1,
) -> None:
    """Train on batches of images (B, C, H, W), labels (B,) and their rows in the training set (B,)."""
    network = accelerator.unwrap_model(model).train()
    step_size = settings.step_in_positions(budget.image_size)
    for epoch in range(num_epochs):
        budget.begin_epoch(epoch)
        seen = []
        for images, labels, rows in loader:
            with accelerator.accumulate(model):
                k = budget.read(rows)
                step = masked_step(model, images, labels, rows, k, epoch, settings, saliency_model=network)
                accelerator.backward((step.ce + settings.kl_factor * step.kl).mean())
                optimizer.step()
                optimizer.zero_grad()
            seen.append(accelerator.gather((rows, step.delta)))
            if accelerator.sync_gradients:
                # K moves when the weights do, on every process by what all of them saw.
                rows, delta = (torch.cat(column) for column in zip(*seen, strict=True))
                budget.update(rows, delta, step_size, settings.rounding)
                seen = []


def main() -> None:
    """Train the paper's CNN on digits, print accuracy and K, save both."""
    parser = HfArgumentParser(SmootTrainingArguments, description=__doc__.partition("\n")[0])
    parser.set_defaults(**DEFAULTS)
    (args,) = parser.parse_args_into_dataclasses()
    if args.method == "standard":
        parser.error("method='standard' masks nothing: it needs no loop of its own")
    if args.masked_every != 1:
        parser.error(f"masked_every={args.masked_every}: this loop masks in every step; SmootTrainer knows others")
    set_seed(args.seed)
    splits = decode_images(load_image_dataset("digits"))
    train_split, test_split = DecodedImages(splits["train"]), DecodedImages(splits["test"])
    pipeline = InputPipeline(*train_split.channel_statistics())
    model = PaperCnnForImageClassification(PaperCnnConfig(image_size=8, num_channels=1, num_labels=10))
    optimizer = torch.optim.Adadelta(model.parameters(), lr=args.learning_rate)
    loader = DataLoader(with_rows(train_split, pipeline), args.per_device_train_batch_size, shuffle=True)

    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=args.use_cpu)
    budget = MaskBudget.for_training(args.settings, len(train_split), (8, 8), device=accelerator.device)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    train(model, optimizer, loader, budget, args.settings, accelerator, int(args.num_train_epochs))

    if accelerator.is_main_process:
        network = accelerator.unwrap_model(model).eval()
        images, labels, _ = with_rows(test_split, pipeline).tensors
        with torch.no_grad():
            predicted = network(images.to(accelerator.device)).logits.argmax(dim=1).cpu()
        network.save_pretrained(args.output_dir)
        budget.save(f"{args.output_dir}/{MASK_BUDGET_NAME}")
        k = budget.statistics()
        print(f"test accuracy {(predicted == labels).float().mean():.2%} of {len(labels)} images")
        print(f"K min/median/max {k['k_min']:g} / {k['k_median']:g} / {k['k_max']:g} {budget.unit} per training image")
        print(f"model and K saved in {args.output_dir}, {accelerator.num_processes} process(es)")


def with_rows(split: DecodedImages, pipeline: InputPipeline) -> TensorDataset:
    """Normalised images, labels, and the row of each."""
    batch = split.__getitems__(range(len(split)))
    return TensorDataset(pipeline.normalize(batch["pixel_values"]), batch["labels"], torch.arange(len(split)))


if __name__ == "__main__":
    main()
