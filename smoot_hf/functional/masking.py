"""Masking: which pixels are replaced, and by what (Algorithm 2, line 2; Section 4.1)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

# Multipliers of well-mixing 32-bit integer hashes, written as the signed integers that torch's int32 holds.
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - (1 << 32)
_GOLDEN_64 = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1

# On a CPU torch sorts by radix where a single row holds at least so many integers. With more threads than these nothing
# was measured: `argsort` shares the rows among them, and a radix sort each row.
_RADIX_LENGTH, _RADIX_THREADS = 32768, 2

# Numbers that are drawn at a time on a CPU: 1 MB for each operand, which stays in the cache.
_PIECE = 1 << 18

# Which positions are masked: the method's, or a control's.
MaskPositions = Literal["least_salient", "random", "most_salient", "alternating"]


def ranking_key(values: Tensor, descending: bool = False) -> Tensor:
    """Numbers that sort upwards in the order of the values, with NaN behind every number.

    A map of unsigned integers cannot be negated (0 stays 0 and 1 becomes 255), one of booleans not at all, and not
    every type can be sorted on every device. Floating-point values are kept or negated, with one zero and one NaN;
    integers and booleans become int64, in which the bitwise complement turns the order round and cannot overflow.

    Args:
        values: any shape and any real type: floating point, signed or unsigned integers, booleans.
        descending: whether the largest value comes first.

    Returns:
        The same shape, on the same device, in a floating-point type or int64. Equal values stay equal.

    Raises:
        ValueError: complex values, which have no order.
    """
    if values.is_complex():
        raise ValueError(f"only real numbers can be ranked, got values of {values.dtype}: take .abs() or .real")
    if values.is_floating_point():
        # Below two bytes nothing can be negated or sorted.
        values = values.float() if values.itemsize < 2 else values
        values = -values if descending else values
        # Sorted by their bits, as on a GPU, -0.0 would come before 0.0 and a NaN of negative sign before every number.
        return torch.where(values.isnan(), math.nan, values + 0.0)
    if values.dtype == torch.uint64:
        # The upper half does not fit into int64: with the highest bit turned over, the signed order is the unsigned.
        values = values.view(torch.int64) ^ torch.iinfo(torch.int64).min
    values = values.to(torch.int64)
    return ~values if descending else values


def rising_positions(key: Tensor) -> Tensor:
    """The positions of each row in rising order of their key, ties by position.

    Args:
        key: (B, N) from `ranking_key`.

    Returns:
        int64 (B, N), each row a permutation of 0 .. N - 1.
    """
    is_long = key.shape[1] >= _RADIX_LENGTH and torch.get_num_threads() <= _RADIX_THREADS
    if key.device.type != "cpu" or not is_long:
        return key.argsort(dim=1, stable=True)
    if key.is_floating_point():
        # The bits of positive numbers rise with the numbers, those of negative ones fall: all but their sign turn over.
        bits = key.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[key.itemsize])
        key = torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)
    # Row by row, since torch sorts several rows at once by comparing, which takes a photograph five times as long.
    order = torch.empty_like(key, dtype=torch.int64)
    for row, positions in zip(key, order, strict=True):
        positions.copy_(row.argsort(stable=True))
    return order


def least_salient_mask(saliency: Tensor, k: Tensor) -> Tensor:
    """Mask of the k positions with the lowest saliency of each image, exactly k of them.

    Ties are broken by position, row by row. (A threshold would mask more positions, since pixels that play no part tie
    at zero.) NaN ranks above every number and is masked last.

    Args:
        saliency: (B, H, W) of any real type.
        k: (B,) integers, the number of positions to mask, between 0 and H*W.

    Returns:
        bool (B, 1, H, W), `True` = the pixel is replaced, in all channels.

    Raises:
        ValueError: complex saliency.
    """
    return _first_k(ranking_key(saliency), k)


def _first_k(key: Tensor, k: Tensor) -> Tensor:
    """Mask of the k positions of the lowest key of each image: (B, H, W), (B,) -> bool (B, 1, H, W)."""
    batch, height, width = key.shape
    order = rising_positions(key.reshape(batch, -1))
    in_budget = torch.arange(height * width, device=key.device) < k[:, None]
    is_masked = torch.empty_like(in_budget).scatter_(1, order, in_budget)
    return is_masked.reshape(batch, 1, height, width)


def masked_positions(
    saliency: Tensor, k: Tensor, positions: MaskPositions, epoch: int = 0, noise: Tensor | None = None
) -> Tensor:
    """The k positions of each image that are masked: the least salient ones, or those of a control.

    The controls show what the ranking itself is good for: a gain that a random mask of the same size brings as well
    cannot be credited to the saliency.

    Args:
        saliency: (B, H, W) of any real type.
        k: (B,) integers, as in `least_salient_mask`.
        positions: `"least_salient"` (Algorithm 2); `"most_salient"`; `"random"`, by rising `noise`; `"alternating"`:
            the least salient in even epochs and the most salient in odd ones, after the high and low gradient masking
            (HLGM) of ICIST 2024, whose abstract leaves the unit of the alternation open.
        epoch: number of the epoch, from 0; for `"alternating"` only.
        noise: (B, H, W) in [0, 1), for example from `counter_uniform`; for `"random"` only.

    Returns:
        bool (B, 1, H, W), `True` = the pixel is replaced, in all channels. Ties go by position, and NaN is masked last,
        whatever the choice.

    Raises:
        ValueError: an unknown choice, `"random"` without noise, or complex saliency.
    """
    if positions not in get_args(MaskPositions):
        raise ValueError(f"positions must be one of {', '.join(map(repr, get_args(MaskPositions)))}, got {positions!r}")
    if positions == "random":
        if noise is None:
            raise ValueError("positions='random' needs noise of shape (B, H, W), got None")
        return least_salient_mask(noise, k)
    is_reversed = positions == "most_salient" or (positions == "alternating" and epoch % 2 == 1)
    return _first_k(ranking_key(saliency, descending=is_reversed), k)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32; torch's own keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _hash32(x: Tensor, key: Tensor | None = None) -> Tensor:
    """Mix int32 `x` in place so that every input bit reaches every output bit; `key` enters between the rounds."""
    x.bitwise_xor_(_shift_right(x, 16)).mul_(_MIX_1)
    if key is not None:
        x.bitwise_xor_(key)
    x.bitwise_xor_(_shift_right(x, 15)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift_right(x, 16))


def _hash64(value: int) -> int:
    """Mix a 64-bit integer (the splitmix64 finaliser)."""
    value = (value + _GOLDEN_64) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _low_int32(value: int) -> int:
    """The low 32 bits of `value` as a signed integer."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def counter_uniform(seed: int, epoch: int, sample_idx: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform random numbers that are a pure function of (seed, epoch, sample, element).

    This is a counter-based generator without state. The numbers of a sample are therefore the same whatever batch it is
    in, and whatever the order of the data, the number of processes or the point at which training was resumed. It uses
    integer arithmetic only, so that they are the same on every device, bit for bit.

    Args:
        seed: any integer.
        epoch: any integer.
        sample_idx: (B,) int64 row of each sample in the training set.
        shape: shape of one sample's numbers, for example (C, H, W); fewer than 2**31 elements.

    Returns:
        float32 (B, *shape), in [0, 1), multiples of 2**-24.
    """
    device = sample_idx.device
    stream = _hash64(_hash64(seed & _MASK_64) ^ (epoch & _MASK_64))
    low = sample_idx.to(torch.int32)  # wraps: the low half of the index
    high = (sample_idx >> 32).to(torch.int32)
    key_1 = _hash32(_hash32(low ^ _low_int32(stream), high))
    key_2 = _hash32(_hash32(low ^ _low_int32(stream >> 32), ~high))
    counter = _hash32(torch.arange(math.prod(shape), dtype=torch.int32, device=device))
    noise = torch.empty(len(sample_idx), len(counter), dtype=torch.float32, device=device)
    # In one piece on a GPU, where every piece would be another twenty launches.
    rows = max(1, _PIECE // max(1, len(counter))) if device.type == "cpu" else max(1, len(noise))
    for first, second, piece in zip(key_1.split(rows), key_2.split(rows), noise.split(rows), strict=True):
        bits = _hash32(counter ^ first[:, None], second[:, None])
        piece.copy_(_shift_right(bits, 8)).mul_(2.0**-24)
    return noise.reshape(-1, *shape)


def uniform_fill(images: Tensor, is_masked: Tensor, noise: Tensor) -> Tensor:
    """Random replacement values for each pixel and channel, between the extremes of the pixels that remain.

    The extremes are those of the unmasked pixels of the same image and channel. If no pixel remains, those of the whole
    channel are used; a constant channel gives that constant.

    Args:
        images: (B, C, H, W).
        is_masked: bool (B, 1, H, W), `True` = replaced.
        noise: (B, C, H, W) in [0, 1), for example from `counter_uniform`.

    Returns:
        (B, C, H, W) in the dtype of `images`, between the minimum and maximum of the remaining pixels. Put it in place
        with `torch.where(is_masked, fill, images)`.
    """
    keep_all = is_masked.all(dim=(2, 3), keepdim=True)
    is_excluded = is_masked & ~keep_all
    lowest = images.masked_fill(is_excluded, math.inf).amin(dim=(2, 3), keepdim=True)
    highest = images.masked_fill(is_excluded, -math.inf).amax(dim=(2, 3), keepdim=True)
    noise = noise.to(images.dtype)
    # Not lowest + (highest - lowest) * noise: the difference can overflow. Rounding must not leave the range.
    return (lowest * (1 - noise) + highest * noise).clamp(lowest, highest)


def mean_fill(images: Tensor) -> Tensor:
    """Per-channel mean of each image: (B, C, H, W) -> (B, C, 1, 1), in the dtype of `images`."""
    return images.mean(dim=(2, 3), keepdim=True)


def other_image_fill(images: Tensor) -> Tensor:
    """The next image of the batch; the last image gets the first: (B, C, H, W) -> (B, C, H, W).

    What replaces a pixel then looks like a pixel of such images. It depends on the batch that an image is in, unlike
    the other fills, and a batch of one image is left as it is.
    """
    return images.roll(-1, dims=0)


def adversarial_fill(images: Tensor, gradient: Tensor, step: float) -> Tensor:
    """The images moved against the gradient of the score: `images - step * sign(gradient)`.

    This is the step of the fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572) on the score that gives
    the saliency. A pixel without a gradient stays as it is, and the result may leave the range of the images.

    Args:
        images: (B, C, H, W).
        gradient: of the score with respect to the images, (B, C, H, W).
        step: how far each value moves, in the units of `images`, at least 0.

    Returns:
        (B, C, H, W) in the dtype of `images`.
    """
    return images - step * gradient.sign().to(images.dtype)
