"""A small network for campaigns of hundreds of runs: a sixteenth of the multiplications of the paper's CNN."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput


class SmallCnn(nn.Module):
    """Two 3x3 convolutions (16 and 32 channels), each with 2x2 max pooling and a ReLU, then 64 hidden units.

    No dropout, so that what moves the prediction of the masked images is the mask alone.

    Args:
        image_shape: (C, H, W), H and W at least 10.
        num_labels: number of classes.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_labels: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.convolution_1 = nn.Conv2d(channels, 16, kernel_size=3)
        self.convolution_2 = nn.Conv2d(16, 32, kernel_size=3)
        left = [((side - 2) // 2 - 2) // 2 for side in (height, width)]
        if min(left) < 1:
            raise ValueError(f"images must be at least 10x10 pixels for the small network, got {height}x{width}")
        self.hidden = nn.Linear(32 * left[0] * left[1], 64)
        self.classifier = nn.Linear(64, num_labels)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """(B, C, H, W) normalised images -> an output with `logits` (B, num_labels)."""
        features = F.relu(F.max_pool2d(self.convolution_1(pixel_values), 2))
        features = F.relu(F.max_pool2d(self.convolution_2(features), 2)).flatten(1)
        return ImageClassifierOutput(logits=self.classifier(F.relu(self.hidden(features))))
