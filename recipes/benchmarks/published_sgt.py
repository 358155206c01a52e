"""The published training step of SGT, made again for comparison: what its code does, in the same order.

Saliency Guided Training (Ismail et al., NeurIPS 2021), `Scripts/interpretable.py` of its repository: captum's
`Saliency` of the model in eval mode, its channel mean fetched to the host, the K lowest positions by `topk`; a Python
loop over the samples, each of which asks the device for its minimum and maximum and gets NumPy's noise; then the clean
and the masked images in train mode, one loss, and three of its numbers for the progress bar.

One thing is mended, since it fails with colours: there K counts channel values and picks from positions. Here it counts
positions, as the paper says, and all channels of a position are replaced.
"""

from collections.abc import Callable

import numpy as np
import torch
from captum.attr import Saliency
from torch import Tensor, nn
from torch.nn import functional as F

from smoot_hf.models.logits import LogitsModel


def published_sgt_loss(
    model: nn.Module, images: Tensor, labels: Tensor, mask_ratio: float
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """The loss of one step, and what is done after its backward pass."""
    logits_of = LogitsModel(model)
    count = int(mask_ratio * images.shape[-2:].numel())
    seen: list[Tensor] = []

    def loss() -> Tensor:
        data = images.detach().clone().requires_grad_()
        logits_of.eval()
        masked = masked_images(logits_of, data, labels, count)
        logits_of.train()
        output = logits_of(data)
        ce = F.cross_entropy(output, labels)
        kl = F.kl_div(F.log_softmax(logits_of(masked), dim=1), output.softmax(dim=1), reduction="batchmean")
        seen[:] = [ce.detach(), kl.detach(), output.argmax(dim=1).eq(labels).sum()]
        return ce + kl

    def read() -> None:
        for value in seen:
            value.item()

    return loss, read


def masked_images(model: nn.Module, images: Tensor, labels: Tensor, count: int) -> Tensor:
    """The images with their `count` positions of lowest gradient replaced by noise, one sample after the other."""
    gradient = Saliency(model).attribute(images, labels, abs=False).mean(1).detach().cpu().float()
    lowest = gradient.flatten(1).topk(count, dim=1, largest=False).indices
    masked = images.detach().clone().flatten(2)
    for row in range(len(masked)):
        low, high = masked[row].min().item(), masked[row].max().item()
        noise = np.random.uniform(low, high, size=(masked.shape[1], count))  # noqa: NPY002 - as published
        masked[row][:, lowest[row].to(masked.device)] = torch.Tensor(noise).to(masked.device)
    return masked.reshape(images.shape)
