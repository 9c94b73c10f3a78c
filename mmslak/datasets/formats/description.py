"""What is known of a person's data after it was recognised, whatever its format."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ('train', 'val', 'test')


@dataclass(frozen=True)
class Sample:
    """A picture with its labels.

    Attributes:
        path: The picture, below the root of the data.
        classes: Numbers of the classes that occur in it.
        label: The path of its label map, the number of its class, or its objects: a list of COCO's
            annotations, whose category_id is the number of the class.
        size: (width, height) of the picture, where the format needs it.
    """

    path: str
    classes: frozenset[int] = frozenset()
    label: object = None
    size: tuple[int, int] | None = None


@dataclass
class DataSet:
    """A data set of a known format.

    Attributes:
        root: The folder of the data.
        format: Name of the format, a key of `mmslak.datasets.formats.FORMATS`.
        kind: 'segmentation', 'masks' (objects with masks), 'boxes' or 'classification'.
        sign: By what the format was recognised.
        classes: Names of the classes, by number.
        splits: Samples of 'train', 'val' and 'test'; of '' where the data has no split.
        direct: By split, settings of a data set class that reads the data as it is.
        values: Of label maps: each value and its share of the pixels.
        palette: Of label maps: colours of the values, where the files have them.
        ignore_zero: Of label maps: 0 is no class, and 1 is the first one.
        notes: What a person should know.
    """

    root: Path
    format: str
    kind: str
    sign: str
    classes: tuple[str, ...] = ()
    splits: dict[str, list[Sample]] = field(default_factory=dict)
    direct: dict[str, dict] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)
    palette: list[list[int]] = field(default_factory=list)
    ignore_zero: bool = False
    notes: list[str] = field(default_factory=list)

    def pictures(self, split: str) -> int:
        """Number of pictures in a split."""
        return len(self.splits.get(split, ()))

    def pictures_of_classes(self, split: str) -> Counter:
        """In how many pictures of a split each class occurs, by its number."""
        return Counter(number for sample in self.splits.get(split, ()) for number in sample.classes)
