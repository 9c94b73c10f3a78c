"""What a person should know about a data set before training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

EXAMPLES = 12  # files that a finding names at most


@dataclass(frozen=True)
class Finding:
    """Something that a person should know about a data set before training.

    Attributes:
        kind: Short stable name in kebab case, such as 'class-never-occurs'.
        message: One line: what was found, what was expected, what to type.
        loader: Part of the config, such as 'train_dataloader'; '' where it is unknown.
        stops: Whether nothing could be learnt, so that a run should not start.
        files: Examples, at most `EXAMPLES`: pictures, label maps or annotation files.
        count: Number of files or annotations that it concerns; 0 where nothing is counted.
    """

    kind: str
    message: str
    loader: str = ''
    stops: bool = False
    files: tuple[str, ...] = ()
    count: int = 0

    @classmethod
    def of_files(
        cls, kind: str, message: str, files: Iterable[object], stops: bool = False
    ) -> 'Finding':
        """A finding about all of some files, of which the first ones are its examples."""
        files = list(files)
        return cls(kind, message, '', stops, examples(files), len(files))


def examples(files: Iterable[object]) -> tuple[str, ...]:
    """The first files, for a finding."""
    return tuple(str(file) for file, _ in zip(files, range(EXAMPLES), strict=False))


def quoted(names: Sequence[object], count: int = 5) -> str:
    """Names in quotes, at most `count` of them, for a message."""
    rest = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(repr(str(name)) for name in names[:count]) + rest


def of(count: int, noun: str) -> str:
    """A number and its noun: `1 box`, `2 boxes`, `3 pictures`."""
    plural = noun + ('es' if noun.endswith(('x', 's', 'ch')) else 's')
    return f'{count} {noun if count == 1 else plural}'


def counted(counts: Mapping[str, int]) -> str:
    """Numbers and what they count, such as `1 box of crowds, 3 pictures below 32 pixels`."""
    plurals = {'boxes ': 'box ', 'pictures ': 'picture '}
    parts = []
    for what, count in counts.items():
        for plural, singular in plurals.items() if count == 1 else ():
            what = singular + what.removeprefix(plural) if what.startswith(plural) else what
        parts.append(f'{count} {what}')
    return ', '.join(parts)
