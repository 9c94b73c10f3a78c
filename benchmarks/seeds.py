"""Means over seeds, and differences of two variants in pairs of the same seed."""

import statistics
from collections.abc import Mapping, Sequence

from scipy.stats import ttest_rel

# By variant, seed and metric.
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]


def summary(scores: Scores) -> dict[str, dict[str, float]]:
    """By variant: how many seeds, 'METRIC mean', and of several seeds 'METRIC deviation'."""
    table: dict[str, dict[str, float]] = {}
    for name, by_seed in scores.items():
        row = table.setdefault(name, {'seeds': len(by_seed)})
        for metric in next(iter(by_seed.values()), {}):
            values = [one[metric] for one in by_seed.values()]
            row[f'{metric} mean'] = statistics.mean(values)
            if len(values) > 1:
                row[f'{metric} deviation'] = statistics.stdev(values)
    return table


def compare(scores: Scores, questions: Mapping[str, Sequence[tuple[str, str]]]) -> list[dict]:
    """What tells one variant from another, by a paired t-test.

    Args:
        scores: What was measured.
        questions: By question the pairs that answer it, a variant and what it is compared with.

    Returns:
        For each pair and metric that both have: question, variant, against, metric, seeds (of
        both), difference (its mean), and where seeds differ in it low, high (of its 95 % interval)
        and p.
    """
    rows = []
    for question, pairs in questions.items():
        for variant, against in pairs:
            ours, theirs = scores.get(variant, {}), scores.get(against, {})
            seeds = sorted(ours.keys() & theirs.keys())
            for metric in ours[seeds[0]] if seeds else ():
                if metric not in theirs[seeds[0]]:
                    continue
                one, other = ([of[seed][metric] for seed in seeds] for of in (ours, theirs))
                # Scores have a few digits: what is less is rounding, and would look like certainty.
                differences = [round(a - b, 6) for a, b in zip(one, other, strict=True)]
                row = dict(question=question, variant=variant, against=against, metric=metric)
                row |= dict(seeds=len(seeds), difference=statistics.mean(differences))
                if len(set(differences)) > 1:
                    test = ttest_rel(one, other)
                    low, high = test.confidence_interval()
                    row |= dict(low=float(low), high=float(high), p=float(test.pvalue))
                rows.append(row)
    return rows
