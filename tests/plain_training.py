"""SMOOT from the equations alone, without a Trainer: the oracle that a training with any feature is held to."""

import math

import reference
import torch
from torch.distributions import Bernoulli
from torch.nn import functional as F

from smoot_hf import functional as SF


class PlainTraining:
    """Plain gradient descent on Equation 5, a K for every sample by Equation 4; mask, delta and K by `reference`.

    Args:
        model: with the weights at the start; trained in place.
        data: with `images` (N, C, H, W) and `labels`.
        args: of the training that is compared; SGD at a constant rate.
        is_mixed: images and labels are those of the recorded calls, which a collator has mixed.
    """

    def __init__(self, model, data, args, is_mixed=False):
        self.is_mixed = is_mixed
        self.is_multi_label = getattr(model.config, "problem_type", None) == "multi_label_classification"
        self.model, self.data, self.args = model.train(), data, args
        self.image_size = data.images.shape[2:]
        positions = math.prod(math.ceil(side / args.mask_cell) for side in self.image_size)
        self.k = [int(args.mask_ratio * positions)] * len(data)
        self.bounds = [int(ratio * positions) for ratio in (args.mask_ratio_min, args.mask_ratio_max)]
        self.has_moved, self.epoch, self.losses = set(), None, []

    def follow(self, calls):
        """Take the steps whose samples, epochs and random states (dropout) are those of the recorded calls."""
        self.has_moved, self.epoch = set(), None
        for call in calls:
            if call["epoch"] != self.epoch:
                self.has_moved, self.epoch = set(), call["epoch"]
            rows = call["sample_idx"].tolist()
            images, labels = self.data.images[rows], torch.tensor([self.data.labels[row] for row in rows])
            if self.is_mixed:
                images, labels = call["images"], call["labels"]
            self.step(rows, images, labels, call["random_state"])
        return self

    def step(self, rows, images, labels, random_state):
        leaf = images.clone().requires_grad_()
        torch.set_rng_state(random_state)
        logits = self.model(pixel_values=leaf).logits
        score = (logits * self._target(logits, labels)).sum()
        (gradient,) = torch.autograd.grad(score, leaf, retain_graph=True)
        assert gradient.flatten(1).any(dim=1).all(), "an image without saliency"
        ranked = gradient if self.args.signed_saliency else gradient.abs()
        masks = zip(ranked.mean(1).tolist(), [self.k[row] for row in rows], strict=True)
        mask = torch.tensor([self._mask(saliency, k) for saliency, k in masks])[:, None]
        noise = SF.counter_uniform(self.args.seed, self.epoch, torch.tensor(rows), images.shape[1:])
        torch.set_rng_state(random_state)
        masked = self.model(pixel_values=torch.where(mask, SF.uniform_fill(images, mask, noise), images)).logits
        loss = self._loss(logits, masked, labels)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    parameter -= self.args.learning_rate * gradient
        self.losses.append(loss.item())
        self._move(rows, logits.tolist(), masked.tolist())

    def _target(self, logits, labels):
        if self.is_multi_label:
            rows = zip(logits.tolist(), labels.tolist(), strict=True)
            return torch.tensor([reference.multi_label_target(*row) for row in rows])
        return labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1])

    def _loss(self, logits, masked, labels):
        if self.is_multi_label:
            clean_outputs, masked_outputs = (Bernoulli(logits=z) for z in (logits, masked))
            kl = torch.distributions.kl_divergence(clean_outputs, masked_outputs).mean()
            return F.binary_cross_entropy_with_logits(logits, labels) + self.args.kl_weight * kl
        log_p, log_q = logits.log_softmax(1), masked.log_softmax(1)
        ce = F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing_factor)
        return ce + self.args.kl_weight * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def _mask(self, saliency, k):
        cell = self.args.mask_cell
        masked = reference.least_salient_mask(reference.cell_sum(saliency, cell), k)
        return reference.spread_cells(masked, cell, *self.image_size)

    def _move(self, rows, logits, masked):
        for row, one, other in zip(rows, logits, masked, strict=True):
            if row in self.has_moved:
                continue
            self.has_moved.add(row)
            shift = reference.multi_label_shift if self.is_multi_label else reference.probability_shift
            delta = shift(one, other, self.args.alpha, self.args.top_n)
            self.k[row] = reference.update_budget(
                self.k[row], delta, self.args.step_size, *self.bounds, self.args.rounding
            )
