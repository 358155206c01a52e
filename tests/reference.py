"""Algorithms 1 and 2 and Equations 1 to 7 of the paper, slowly: float64, one Python loop per sample and pixel.

Written from the equations alone and sharing no code with the package, as the oracle that the fast code is held to.
"""

import math


def rank_least_salient(saliency):
    """Algorithm 2, line 2: pixel positions (row, column) by rising saliency, ties by position; NaN last."""
    positions = [(row, column) for row in range(len(saliency)) for column in range(len(saliency[0]))]
    return sorted(positions, key=lambda rc: (math.isnan(saliency[rc[0]][rc[1]]), saliency[rc[0]][rc[1]]))


def least_salient_mask(saliency, k):
    """The k positions of least rank as rows of booleans, True = replaced."""
    chosen = set(rank_least_salient(saliency)[: max(k, 0)])
    return [[(row, column) in chosen for column in range(len(saliency[0]))] for row in range(len(saliency))]


def cell_sum(values, cell):
    """Sums over cells of cell x cell pixels, cut from the top left; those at the far edges are of fewer pixels."""
    sums = [[0.0] * -(-len(values[0]) // cell) for _ in range(-(-len(values) // cell))]
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            sums[row // cell][column // cell] += value
    return sums


def spread_cells(values, cell, height, width):
    """The value of its cell for every pixel."""
    return [[values[row // cell][column // cell] for column in range(width)] for row in range(height)]


def uniform_fill(channel, is_masked, noise):
    """Section 4.1: uniform between the minimum and maximum of the remaining pixels of one channel of one image."""
    flat = [
        (value, masked)
        for values, flags in zip(channel, is_masked, strict=True)
        for value, masked in zip(values, flags, strict=True)
    ]
    remaining = [value for value, masked in flat if not masked] or [value for value, _ in flat]
    low, high = min(remaining), max(remaining)
    return [[low + (high - low) * u for u in row] for row in noise]


def softmax(logits):
    largest = max(logits)
    powers = [math.exp(value - largest) for value in logits]
    return [value / sum(powers) for value in powers]


def cross_entropy(logits, label, label_smoothing=0.0):
    """Equation 5, first term; smoothing spreads a share of the target evenly over all classes."""
    largest = max(logits)
    log_sum = largest + math.log(sum(math.exp(value - largest) for value in logits))
    log_p = [value - log_sum for value in logits]
    return -(1 - label_smoothing) * log_p[label] - label_smoothing * sum(log_p) / len(log_p)


def soft_cross_entropy(logits, weights, label_smoothing=0.0):
    """Equation 5, first term, where the label is a distribution: the mean of the classes' cross-entropies."""
    return sum(
        weight * cross_entropy(logits, label, label_smoothing) for label, weight in enumerate(weights) if weight > 0
    )


def score_derivative(logits, weights, score):
    """Derivative of the sum of w_j z_j, or of w_j log p_j, with respect to the logits."""
    if score == "logit":
        return list(weights)
    p = softmax(logits)
    return [sum(weight * ((1 if i == j else 0) - p[i]) for j, weight in enumerate(weights)) for i in range(len(logits))]


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def binary_cross_entropy(logits, labels):
    """Minus the log-likelihood of independent labels, summed over them."""
    return -sum(
        label * math.log(sigmoid(z)) + (1 - label) * math.log(sigmoid(-z))
        for z, label in zip(logits, labels, strict=True)
    )


def bernoulli_divergence(logits, masked_logits):
    """Equation 6 for independent labels: the sum of the divergences of each."""
    total = 0.0
    for z, masked in zip(logits, masked_logits, strict=True):
        for sign in (1, -1):
            p, q = sigmoid(sign * z), sigmoid(sign * masked)
            total += p * (math.log(p) - math.log(q))
    return total


def multi_label_target(logits, labels):
    """The image's own labels, or where it has none the one of the highest output."""
    if any(label > 0 for label in labels):
        return list(labels)
    return [1.0 if i == logits.index(max(logits)) else 0.0 for i in range(len(logits))]


def multi_label_shift(logits, masked_logits, alpha, top_n, mode="rank", labels=None):
    """Equations 1 to 3 with sigmoid outputs in place of softmax outputs."""
    p, q = [sigmoid(z) for z in logits], [sigmoid(z) for z in masked_logits]
    by_p = sorted(range(len(p)), key=lambda i: -p[i])
    by_q = sorted(range(len(q)), key=lambda i: -q[i]) if mode == "rank" else by_p
    if mode == "label":
        by_p = by_q = sorted(by_p, key=lambda i: -labels[i])
    return weighted_change([q[j] - p[i] for i, j in zip(by_p, by_q, strict=True)], alpha, min(top_n, len(p)))


def weighted_change(changes, alpha, n):
    """Equations 1 to 3 of the changes of the outputs in their order."""
    if n == 1:
        return changes[0]  # Equation 1
    return alpha * changes[0] + (1 - alpha) * sum(changes[1:n]) / (n - 1)  # Equations 2 and 3


def kl_divergence(logits, masked_logits):
    """Equation 6 with the sign of a divergence: sum over classes of p log(p / p~)."""
    p, q = softmax(logits), softmax(masked_logits)
    return sum(pi * (math.log(pi) - math.log(qi)) for pi, qi in zip(p, q, strict=True) if pi > 0)


def probability_shift(logits, masked_logits, alpha, top_n, mode="rank", label=None):
    """Equations 1 to 3."""
    p, q = softmax(logits), softmax(masked_logits)
    n = min(top_n, len(p))
    by_p = sorted(range(len(p)), key=lambda i: -p[i])
    by_q = sorted(range(len(q)), key=lambda i: -q[i])
    if mode == "class":
        by_q = by_p
    elif mode == "label":
        by_p = by_q = [label] + [i for i in by_p if i != label]
    return weighted_change([q[j] - p[i] for i, j in zip(by_p, by_q, strict=True)], alpha, n)


def update_budget(k, delta, step_size, k_min, k_max, rounding="floor"):
    """Equation 4."""
    if not math.isfinite(delta):
        return k
    step = {"floor": math.floor, "trunc": math.trunc, "nearest": round}[rounding](step_size * delta)
    return min(max(k + step, k_min), k_max)


def counter_uniform(seed, epoch, index, count):
    """The package's counter-based noise, one element at a time in unbounded integers."""

    def hash64(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    def hash32(x, key=0):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x ^= key
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    stream = hash64(hash64(seed % 2**64) ^ (epoch % 2**64))
    low, high = index % 2**32, index // 2**32
    key_1 = hash32(hash32(low ^ (stream % 2**32), high))
    key_2 = hash32(hash32(low ^ (stream // 2**32), high ^ 0xFFFFFFFF))
    return [(hash32(hash32(counter) ^ key_1, key_2) >> 8) / 2**24 for counter in range(count)]


def in_masked_share(seed, epoch, index, share):
    """Whether a sample is masked in an epoch: one number of the noise, of a stream of its own ("share")."""
    return counter_uniform(seed ^ int.from_bytes(b"share"), epoch, index, 1)[0] < share


def loss(ce, kl, is_chosen, kl_weight, share, every=1):
    """Equation 5 where a share of the samples is masked in one of `every` steps: its expectation is Equation 5."""
    total = 0.0
    for one_ce, one_kl, chosen in zip(ce, kl, is_chosen, strict=True):
        total += one_ce + (kl_weight * one_kl * every / share if chosen else 0.0)
    return total / len(ce)


def _positions_of(attribution, evidence):
    """(value, on the evidence) of every position of one image."""
    return [
        (value, on)
        for values, flags in zip(attribution, evidence, strict=True)
        for value, on in zip(values, flags, strict=True)
    ]


def expected_hits(positions, count):
    """Evidence positions among the `count` highest, one place at a time; a place goes in equal parts to those tied."""
    hits, taken = 0.0, 0
    for value in sorted({value for value, _ in positions}, reverse=True):
        tied = [on for other, on in positions if other == value]
        places = min(count - taken, len(tied))
        hits += places * sum(tied) / len(tied)
        taken += places
    return hits


def _relevance_mass(positions):
    total = on_evidence = 0.0
    for value, on in positions:
        if value > 0:
            total += value
            on_evidence += value if on else 0.0
    return on_evidence / total if total else sum(on for _, on in positions) / len(positions)


def _roc_auc(positions):
    """Every pair of a position on the evidence and one outside."""
    wins = [
        1.0 if on_value > off_value else 0.5 if on_value == off_value else 0.0
        for on_value, on in positions
        if on
        for off_value, off in positions
        if not off
    ]
    return sum(wins) / len(wins) if wins else math.nan


def localisation_scores(attribution, evidence, top):
    """Every localisation score of one image by its name; lists of rows."""
    positions = _positions_of(attribution, evidence)
    size = sum(on for _, on in positions)
    count = max(1, math.floor(round(top * len(positions), 9)))
    return {
        "relevance_mass": _relevance_mass(positions),
        "rank_accuracy": expected_hits(positions, size) / size if size else math.nan,
        "pointing_game": expected_hits(positions, 1),
        "roc_auc": _roc_auc(positions),
        "top_outside": 1 - expected_hits(positions, count) / count,
    }


def average_precision(outputs, labels):
    """Of one label: the mean, over the images that have it, of the precision at their output; NaN where none has."""
    precisions = []
    for output, has_label in zip(outputs, labels, strict=True):
        if has_label:
            as_high = [other for value, other in zip(outputs, labels, strict=True) if value >= output]
            precisions.append(sum(as_high) / len(as_high))
    return sum(precisions) / len(precisions) if precisions else math.nan


def mean_average_precision(outputs, labels):
    """Rows of outputs and of 0 and 1, one of each per image; the mean over the labels that occur."""
    columns = zip(zip(*outputs, strict=True), zip(*labels, strict=True), strict=True)
    found = [average_precision(*column) for column in columns]
    known = [value for value in found if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def linear_outputs(image, weights, bias):
    """One output for each label: its bias, and the sum of weight times pixel over channels, rows and columns."""
    outputs = []
    for of_label, constant in zip(weights, bias, strict=True):
        total = constant
        for channel, of_channel in zip(image, of_label, strict=True):
            for row, of_row in zip(channel, of_channel, strict=True):
                for pixel, weight in zip(row, of_row, strict=True):
                    total += pixel * weight
        outputs.append(total)
    return outputs


def multi_label_saliency(weights, target):
    """Magnitude of the gradient of the sum of the target labels' `linear_outputs`, its mean over the channels."""
    channels, height, width = len(weights[0]), len(weights[0][0]), len(weights[0][0][0])
    rows = []
    for row in range(height):
        line = []
        for column in range(width):
            total = 0.0
            for channel in range(channels):
                slopes = [
                    of_label[channel][row][column]
                    for of_label, is_target in zip(weights, target, strict=True)
                    if is_target
                ]
                total += abs(sum(slopes))
            line.append(total / channels)
        rows.append(line)
    return rows


def deletion_outputs(image, saliency, weights, bias, counts):
    """Outputs of `linear_outputs` while the most salient positions of an image are replaced by zero, all channels."""
    falling = list(reversed(rank_least_salient(saliency)))
    found = []
    for count in counts:
        removed = set(falling[:count])
        left = [
            [[0.0 if (r, c) in removed else pixel for c, pixel in enumerate(row)] for r, row in enumerate(channel)]
            for channel in image
        ]
        found.append(linear_outputs(left, weights, bias))
    return found


def label_probability(outputs, target):
    """The mean sigmoid output of the target labels."""
    found = [sigmoid(value) for value, is_target in zip(outputs, target, strict=True) if is_target]
    return sum(found) / len(found)
