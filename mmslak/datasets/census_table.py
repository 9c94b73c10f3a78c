"""What a data set has to teach, as counted."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace

from mmslak.datasets.findings import Finding

# Shows the progress of a loop: (items, description) -> the same items.
Progress = Callable[[Iterable, str], Iterable]


def size_range(sizes: Iterable[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The smallest and the largest of some sizes (width, height), by their area."""
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return dict(smallest=by_area[0], largest=by_area[-1])


@dataclass(frozen=True)
class Row:
    """One class of a data set.

    Attributes:
        name: Of the class.
        pictures: Number of pictures in which it occurs.
        amount: Number of its objects or pixels, or of its pictures.
    """

    name: str
    pictures: int
    amount: int


@dataclass
class Census:
    """What a data set has to teach.

    Attributes:
        loader: Part of the config, such as 'train_dataloader'.
        unit: What `Row.amount` counts: 'objects', 'pixels' or 'pictures'; '' if the data set is of
            no known form, so that nothing was counted.
        table: A row per class, in the order of the classes.
        pictures: Number of pictures.
        empty: Number of pictures without any label.
        sampled: (label maps read, label maps in all); None if everything was read.
        ignored: Share of the pixels without a class, 0 to 1; None if pixels were not counted.
        dropped: Number of objects or pictures that a filter leaves out, by its reason.
        sizes: Smallest and largest (width, height), and numbers of objects by size.
        names: The classes that the files have, in their order.
        findings: What a person should know.
        files: Paths of the pictures, of a census that was just taken; not a part of `to_dict`.
    """

    loader: str = ''
    unit: str = ''
    table: list[Row] = field(default_factory=list)
    pictures: int = 0
    empty: int = 0
    sampled: tuple[int, int] | None = None
    ignored: float | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, object] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    files: list[str] = field(default_factory=list, repr=False, compare=False)

    def to_dict(self) -> dict:
        """The census as plain values, for JSON."""
        return asdict(replace(self, files=[]), dict_factory=_without_files)

    @classmethod
    def from_dict(cls, values: dict) -> 'Census':
        """The census of `to_dict`, also after it was JSON.

        Raises:
            TypeError: If it is none.
        """
        findings = [Finding(**{**f, 'files': tuple(f['files'])}) for f in values['findings']]
        table = [Row(**row) for row in values['table']]
        sampled = tuple(values['sampled']) if values['sampled'] else None
        sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in values['sizes'].items()}
        whole = cls(**values)
        return replace(whole, findings=findings, table=table, sampled=sampled, sizes=sizes)


def _without_files(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if 'findings' in values:  # a census; files of findings stay
        del values['files']
    return values
