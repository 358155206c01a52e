"""A network for campaigns of hundreds of runs: the paper's CNN at half its widths, a quarter of its arithmetic."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput


class SmallCnn(nn.Module):
    """Two 3x3 convolutions (16 and 32 channels), 2x2 max pooling, two fully connected layers (64 units), dropout.

    The layers and dropout rates are those of `PaperCnnForImageClassification`, the widths half of them. A smaller
    network was tried and dropped: with pooling after each convolution and no dropout, 43 % of the most salient tenth of
    BlockMNIST's pixels lay in the null block, hardly less than chance, whatever the training method was.

    Args:
        image_shape: (C, H, W), H and W at least 6.
        num_labels: number of classes.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_labels: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < 6:
            raise ValueError(f"images must be at least 6x6 pixels for the small network, got {height}x{width}")
        self.convolution_1 = nn.Conv2d(channels, 16, kernel_size=3)
        self.convolution_2 = nn.Conv2d(16, 32, kernel_size=3)
        self.feature_dropout = nn.Dropout(0.25)
        self.hidden = nn.Linear(32 * ((height - 4) // 2) * ((width - 4) // 2), 64)
        self.classifier_dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(64, num_labels)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """(B, C, H, W) normalised images -> an output with `logits` (B, num_labels)."""
        features = F.relu(self.convolution_2(F.relu(self.convolution_1(pixel_values))))
        features = self.feature_dropout(F.max_pool2d(features, 2)).flatten(1)
        hidden = self.classifier_dropout(F.relu(self.hidden(features)))
        return ImageClassifierOutput(logits=self.classifier(hidden))
