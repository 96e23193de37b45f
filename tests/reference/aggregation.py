"""What Flower's strategies do to replies, from their papers, in float64 on flat vectors; nothing of Flower is used.

`sent` (d,) is the global model of a round, `replies` (n, d) what came back, `examples` (n,) their weights.
"""

import math

import numpy as np


def weighted_mean(replies, examples):
    """FedAvg (McMahan et al., 2017)."""
    return sum(n * reply for n, reply in zip(examples, replies, strict=True)) / sum(examples)


def median(replies):
    """Of every coordinate (Yin et al., 2018)."""
    ordered, n = np.sort(replies, axis=0), len(replies)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(replies, share):
    """Of every coordinate without the `share` smallest and largest (Yin et al., 2018)."""
    cut = int(share * len(replies))
    return np.sort(replies, axis=0)[cut : len(replies) - cut].mean(0)


def krum_order(replies, malicious):
    """Replies from the most to the least trusted: squared distances to the n - f - 2 nearest (Blanchard et al.)."""
    nearest = max(1, len(replies) - malicious - 2)
    scores = []
    for i, one in enumerate(replies):
        away = sorted(float(((one - other) ** 2).sum()) for j, other in enumerate(replies) if j != i)
        scores.append(sum(away[:nearest]))
    return sorted(range(len(replies)), key=scores.__getitem__)


def multi_krum(replies, examples, malicious, selected):
    """Weighted mean of the `selected` most trusted; Krum is 1 of them."""
    chosen = krum_order(replies, malicious)[:selected]
    return weighted_mean(replies[chosen], examples[chosen])


def bulyan(replies, malicious):
    """Of n - 2f replies, in every coordinate, the mean of the n - 4f that are nearest the median (El Mhamdi et al.)."""
    chosen = replies[krum_order(replies, malicious)[: len(replies) - 2 * malicious]]
    nearest = np.argsort(np.abs(chosen - median(chosen)), axis=0, kind="stable")[: len(replies) - 4 * malicious]
    return np.take_along_axis(chosen, nearest, axis=0).mean(0)


def q_fair(sent, replies, losses, q, learning_rate):
    """q-FedAvg (Li et al., 2020), with the 1e-10 that Flower adds to a loss."""
    lipschitz, moved, scale = 1 / learning_rate, 0.0, 0.0
    for reply, loss in zip(replies, losses, strict=True):
        gradient = lipschitz * (sent - reply)
        moved = moved + (loss + 1e-10) ** q * gradient
        scale += q * (loss + 1e-10) ** (q - 1) * float(gradient @ gradient) + lipschitz * (loss + 1e-10) ** q
    return sent - moved / scale


class Momentum:
    """FedAvgM (Hsu et al., 2019): v = momentum v + (sent - mean), and a step of v."""

    def __init__(self, momentum, learning_rate=1.0):
        self.momentum, self.learning_rate, self.velocity = momentum, learning_rate, 0.0

    def __call__(self, sent, replies, examples):
        self.velocity = self.momentum * self.velocity + sent - weighted_mean(replies, examples)
        return sent - self.learning_rate * self.velocity


class Adaptive:
    """FedAdam, FedYogi or FedAdagrad (Reddi et al., 2021); Adam's rate with the bias correction of Kingma and Ba.

    Flower counts that correction's steps from 2, not from 1.
    """

    def __init__(self, kind, eta, tau, beta_1=0.0, beta_2=0.0):
        self.kind, self.eta, self.tau, self.beta_1, self.beta_2 = kind, eta, tau, beta_1, beta_2
        self.first, self.second, self.round = 0.0, 0.0, 0

    def __call__(self, sent, replies, examples):
        self.round += 1
        delta = weighted_mean(replies, examples) - sent
        square, rate = delta**2, self.eta
        self.first = self.beta_1 * self.first + (1 - self.beta_1) * delta
        if self.kind == "adagrad":
            self.second = self.second + square
        elif self.kind == "yogi":
            self.second = self.second - (1 - self.beta_2) * square * np.sign(self.second - square)
        else:
            self.second = self.beta_2 * self.second + (1 - self.beta_2) * square
            rate *= math.sqrt(1 - self.beta_2 ** (self.round + 1)) / (1 - self.beta_1 ** (self.round + 1))
        return sent + rate * self.first / (np.sqrt(self.second) + self.tau)


def clip(sent, replies, norm):
    """Replies (n, d) whose distance to `sent` is at most `norm`, and whether each was cut (McMahan et al., 2018)."""
    away = np.sqrt(((replies - sent) ** 2).sum(1))
    return sent + (replies - sent) * np.minimum(1, norm / away)[:, None], away > norm


def adapt_norm(norm, cut, quantile, rate):
    """The next round's norm: geometric, from the share of updates that were cut, with Flower's sign."""
    return norm * math.exp(-rate * (float(np.mean(cut)) - quantile))
