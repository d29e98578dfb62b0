"""How sure a figure is: 95% intervals of shares, of ratios of sums, and of paired differences."""

import math

import numpy as np

Z = 1.959964  # the normal distribution holds 95% within Z standard deviations of its mean
RESAMPLES = 1000


def number_text(value):
    """A figure as text: four decimals, or four digits where it is large."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def wilson(successes, n):
    """The interval (low, high) of the share of successes among n trials.

    successes may be a sum of shares. Source: Wilson 1927, "Probable inference, the law of
    succession, and statistical inference".
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + Z * Z / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def resampled_ratios(numerators, denominators, seed=1337):
    """The ratio of sums in RESAMPLES samples of the pairs, drawn with replacement: (RESAMPLES,)."""
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    rng, ratios = np.random.default_rng(seed), np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(len(numerators), size=len(numerators))
        ratios[i] = numerators[drawn].sum() / denominators[drawn].sum()
    return ratios


def bootstrap_ratio(numerators, denominators):
    """The interval of sum(numerators) / sum(denominators), by resampling the pairs.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; percentiles.
    """
    if len(numerators) < 2:
        return -math.inf, math.inf
    low, high = np.percentile(resampled_ratios(numerators, denominators), [2.5, 97.5])
    return float(low), float(high)


def paired_difference(ours, theirs, weights=None):
    """The interval of the mean of ours - theirs, two figures of each item.

    weights: what each item counts, 1 if not given. A ratio of sums over the same denominators is
    such a mean.
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    weights = np.ones(len(ours)) if weights is None else np.asarray(weights, float)
    return bootstrap_ratio((ours - theirs) * weights, weights)
