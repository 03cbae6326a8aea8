"""Who gets how many tokens: decay weights over age, and their exact split into whole tokens (PackCache §3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def decay_weights(frames: int, rho: float) -> list[Fraction]:
    """Shares b_1 ≥ b_2 ≥ … of `frames` retained frames, newest first; they sum to 1.

    For ρ ≤ ½ the geometric series with its whole tail given to the oldest: at ½ that is ½, ¼, ⅛, ⅛. For ρ > ½ the tail
    would outweigh its neighbour, so the series is cut and renormalised.
    """
    r = Fraction(rho)
    if r <= Fraction(1, 2):
        return [(1 - r) * r**d for d in range(frames - 1)] + [r ** (frames - 1)]
    powers = [r**d for d in range(frames)]
    return [p / sum(powers) for p in powers]


def allocate(budget: int, owned: Sequence[int], weights: Sequence[Fraction]) -> list[int]:
    """Tokens for each age, newest first: the budget, or all that is owned if that is less, to the last token.

    No age gets more than it owns: what is evicted cannot come back. What a full age cannot take goes to the others in
    proportion to their weights; fractions are settled by the largest remainder, ties to the newer frame.
    """
    total = min(budget, sum(owned))
    shares = [Fraction(0)] * len(owned)
    left = Fraction(total)
    hungry = [i for i, n in enumerate(owned) if n > 0 and weights[i] > 0]
    while left > 0 and hungry:
        unit = left / sum(weights[i] for i in hungry)
        for i in hungry:
            shares[i] = min(Fraction(owned[i]), shares[i] + unit * weights[i])
        left = total - sum(shares, Fraction(0))
        hungry = [i for i in hungry if shares[i] < owned[i]]
    given = [int(share) for share in shares]
    rest = sorted((i for i in range(len(owned)) if given[i] < owned[i]), key=lambda i: (given[i] - shares[i], i))
    for i in rest[: total - sum(given)]:
        given[i] += 1
    return given
