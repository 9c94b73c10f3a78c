"""A division into pictures to train on and to validate, that adding pictures changes least."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import blake2b

from mmslak.datasets.formats.description import Sample

SHARE = 0.2  # of the pictures, for validation


def divide(samples: Sequence[Sample], share: float = SHARE) -> tuple[list[Sample], list[Sample]]:
    """Divides samples by a hash of their paths, for each class alike.

    A picture counts for the rarest of its classes. Every class is in training, the more so one with
    a single picture. Which pictures are chosen depends on names alone, so that the same data gives
    the same division, and a new picture moves few others.

    Args:
        samples: At least one.
        share: Of the samples, for validation.

    Returns:
        (train, val). With so few samples that none can be spared, val is train.
    """
    count = Counter(number for sample in samples for number in sample.classes)
    left = count.copy()  # pictures of each class in training
    groups = defaultdict(list)
    for sample in sorted(samples, key=_hash):
        rarest = min(sample.classes, key=lambda n: (count[n], n), default=-1)
        groups[rarest].append(sample)

    chosen = set()

    def choose(candidates: Sequence[Sample], wanted: int) -> None:
        for sample in candidates:
            if wanted < 1:
                return
            if sample.path not in chosen and all(left[n] > 1 for n in sample.classes):
                chosen.add(sample.path)
                left.subtract(sample.classes)
                wanted -= 1

    for rarest in sorted(groups, key=lambda n: (count[n], n)):
        choose(groups[rarest], int(share * len(groups[rarest])))
    total = min(max(1, round(share * len(samples))), len(samples) - 1)
    choose(sorted(samples, key=_hash), total - len(chosen))
    train = [sample for sample in samples if sample.path not in chosen]
    return train, [sample for sample in samples if sample.path in chosen] or train


def _hash(sample: Sample) -> bytes:
    return blake2b(sample.path.encode('utf-8', 'surrogateescape'), digest_size=8).digest()
