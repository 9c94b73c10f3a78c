"""A division into pictures to train on and to validate, that adding pictures changes least."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import blake2b

from mmslak.datasets.formats.description import Sample

SHARE = 0.2  # of the pictures, for validation


def divide(samples: Sequence[Sample], share: float = SHARE) -> tuple[list[Sample], list[Sample]]:
    """Divides samples by a hash of their paths, for each class alike.

    Each class gets its share, the rarest first; what is left goes to those that lack most of it.
    Every class is in training, the more so one with a single picture. Which pictures are chosen
    depends on names alone, so that the same data gives the same division, and a new picture moves
    few others.

    Args:
        samples: At least one.
        share: Of the samples, for validation.

    Returns:
        (train, val). With so few samples that none can be spared, val is train.
    """
    total = min(max(1, round(share * len(samples))), len(samples) - 1)
    groups = defaultdict(list)  # the samples of each class
    for sample in sorted(samples, key=_hash):
        for number in sample.classes or {-1}:
            groups[number].append(sample)
    left = Counter({number: len(group) for number, group in groups.items()})  # in training
    wanted = {number: share * len(group) for number, group in groups.items()}
    chosen = set()

    def choose(candidates: Sequence[Sample], most: int) -> None:
        for sample in candidates:
            if most < 1 or len(chosen) >= total:
                return
            classes = sample.classes or {-1}
            if sample.path not in chosen and all(left[n] > 1 or n == -1 for n in classes):
                chosen.add(sample.path)
                left.subtract(classes)
                most -= 1

    def lacking(number: int) -> float:
        return wanted[number] - (len(groups[number]) - left[number])

    for number in sorted(groups, key=lambda n: (wanted[n], n)):  # the rarest first
        choose(groups[number], int(lacking(number) + 1e-9))
    for number in sorted(groups, key=lambda n: (-lacking(n), n)):
        choose(groups[number], lacking(number) > 0)
    choose(sorted(samples, key=_hash), total)
    train = [sample for sample in samples if sample.path not in chosen]
    return train, [sample for sample in samples if sample.path in chosen] or train


def _hash(sample: Sample) -> bytes:
    return blake2b(sample.path.encode('utf-8', 'surrogateescape'), digest_size=8).digest()
