"""Compares the classes that a data set looks for with those that its files have."""

import difflib
import re
from collections.abc import Mapping, Sequence

from mmslak.datasets.findings import Finding, of, quoted

NEAR = 0.85  # of difflib, from which on a name may be meant for another


def class_names(dataset: object) -> list[str]:
    """The classes of a data set; empty where it has none or where they are a text."""
    names = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else []


def classes_as_text(owner: str, classes: str) -> str:
    """What to say where `classes` is a text that names no file."""
    return (
        f'classes of {owner} is the text {classes!r}, whose letters would be the classes: write '
        f'({classes!r},), with the comma'
    )


def metainfo(names: Sequence[str], most: int = 12) -> str:
    """The setting that makes a data set look for these classes."""
    shown = ', '.join(map(repr, names[:most]))
    rest = f', … {len(names) - most} more' if len(names) > most else ',' if len(names) == 1 else ''
    return f'metainfo=dict(classes=({shown}{rest}))'


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name that another one is probably meant for: it differs in case, blanks or a letter."""
    same = [other for other in names if _folded(other) == _folded(name)]
    close = difflib.get_close_matches(name, names, n=1, cutoff=NEAR)
    # class_1 and class_2 are two classes.
    close = [other for other in close if _digits(other) == _digits(name)]
    return next(iter(same + close), None)


def _folded(name: str) -> str:
    return re.sub(r'[\s_-]+', ' ', name.strip().casefold())


def _digits(name: str) -> str:
    return re.sub(r'\D', '', name)


def compare_names(
    dataset: object, found: Mapping[str, int], source: str, noun: str
) -> list[Finding]:
    """Finds classes of the files that a data set does not look for.

    Args:
        dataset: The data set.
        found: Number of objects of each class of the files, in the order of the files.
        source: The files, for the message.
        noun: What a class of the files is called: 'category' or 'class'.
    """
    wanted, owner = class_names(dataset), type(dataset).__name__
    nouns = noun.removesuffix('y') + 'ies' if noun.endswith('y') else f'{noun}es'
    used = [name for name, count in found.items() if count]
    unknown = [name for name in used if name not in wanted]
    if not wanted or not unknown:
        return []
    lost = sum(found[name] for name in unknown)
    missing = [name for name in wanted if not found.get(name)]
    near = {name: close for name in unknown if (close := nearest(name, missing))}
    if len(unknown) == len(used):
        hint = ''.join(f'; {name!r} is not {close!r}' for name, close in list(near.items())[:3])
        return [
            Finding(
                'no-class-known',
                f'the {nouns} of {source} are {quoted(unknown)} ({of(lost, "object")}), none of '
                f'which {owner} looks for (its classes are {quoted(wanted, 3)}{hint}): set '
                f'{metainfo(unknown)} of the dataset, and num_classes={len(unknown)} of the heads',
                stops=True,
                count=lost,
            )
        ]
    findings = [
        Finding(
            'class-name-differs',
            f'{noun} {name!r} of {source} ({of(found[name], "object")}) is left out, and class '
            f'{close!r} never occurs: names have to be equal, letter by letter; write '
            f'{name!r} in metainfo=dict(classes=…) of the dataset',
            count=found[name],
        )
        for name, close in near.items()
    ]
    rest = [name for name in unknown if name not in near]
    if rest:
        lost = sum(found[name] for name in rest)
        every = [name for name in found if name in wanted or name in rest]
        findings.append(
            Finding(
                'class-not-looked-for',
                f'{owner} does not look for {quoted(rest)} of {source} and leaves '
                f'{of(lost, "object")} out: to learn them, set {metainfo(every)} of the dataset',
                count=lost,
            )
        )
    return findings


def check_order(dataset: object, names: Sequence[str], source: str) -> list[Finding]:
    """Finds classes whose numbers are not those of their names.

    mmdet numbers the classes in the order of the annotation file, whatever their order in
    `classes`.

    Args:
        dataset: The data set.
        names: Classes of the file, in its order.
        source: The file, for the message.
    """
    wanted = class_names(dataset)
    known = [name for name in names if name in wanted]
    wrong = [i for i, name in enumerate(known) if wanted[i] != name]
    if not wrong:
        return []
    first = wrong[0]
    lacking = [name for name in wanted if name not in known]
    fix = (
        f'add the categories {quoted(lacking)} to the file'
        if known == [name for name in wanted if name in known]
        else f'set {metainfo(known + lacking)}'
    )
    return [
        Finding(
            'class-order',
            f'labels are numbered in the order of {source}: {known[first]!r} has the number '
            f'{first}, which is {wanted[first]!r} in the classes of the dataset: {fix}',
            count=len(wrong),
        )
    ]
