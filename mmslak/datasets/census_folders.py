"""Counts the pictures of classes that folders or a list of files give."""

import os
from collections import Counter, defaultdict
from pathlib import Path

from mmslak.datasets.census_table import Census, Progress, Row
from mmslak.datasets.class_names import class_names, metainfo
from mmslak.datasets.findings import Finding, of, quoted
from mmslak.datasets.folders import absent_pictures, files_below


def count_folders(dataset: object, full: bool, progress: Progress) -> Census:
    """Counts the pictures of each class.

    Args:
        dataset: A CustomDataset of mmpretrain, which may not be loaded yet.
        full: Of no effect: all names are read.
        progress: Shows the progress of a loop.
    """
    if not getattr(dataset, 'with_label', True):
        return Census()
    if dataset.ann_file:
        return _of_list(dataset)
    root, classes = dataset.img_prefix, class_names(dataset)
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith('.')]
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    counts, others, paths, below = {}, Counter(), [], defaultdict(list)
    for here, files in files_below(root):
        top = os.path.relpath(here, root).split(os.sep)[0]
        below[top] += [os.path.join(here, file) for file in files]
    for folder in progress(folders, 'folders of classes'):
        files = below[folder]
        pictures = [file for file in files if file.lower().endswith(tuple(dataset.extensions))]
        counts[folder] = len(pictures)
        paths += pictures
        if not pictures:
            others.update(os.path.splitext(file)[1] for file in files)
    names = classes if len(classes) == len(folders) else folders
    census = Census(unit='pictures', pictures=sum(counts.values()), names=folders)
    census.table = [Row(name, n, n) for name, n in zip(names, counts.values(), strict=True)]
    census.files = paths
    if not folders:
        message = f'{root} has no folder: each class is a folder of pictures in it'
        census.findings.append(Finding('no-picture', message, stops=True, files=(str(root),)))
    elif not census.pictures:
        shown = ', '.join(sorted(dataset.extensions))
        message = f'no picture in the {of(len(folders), "folder")} of {root} ends in {shown}'
        if others:
            suffix, count = others.most_common(1)[0]
            message += f'; {count} of {others.total()} files end in {suffix!r}: '
            message += f'set extensions=({suffix!r},) of the dataset'
        census.findings.append(Finding('no-picture', message, stops=True, files=(str(root),)))
    if classes and len(classes) != len(folders):
        census.findings.append(
            Finding(
                'class-folders',
                f'{root} has {of(len(folders), "folder")} ({quoted(folders)}) for '
                f'{len(classes)} classes ({quoted(classes, 3)}): set {metainfo(folders)} of the '
                f'dataset and num_classes={len(folders)} of the heads, or give each class a folder',
                stops=True,
                files=(str(root),),
                count=len(folders),
            )
        )
    elif classes and set(classes) == set(folders) and classes != folders:
        wrong = next(i for i, name in enumerate(classes) if folders[i] != name)
        census.findings.append(
            Finding(
                'class-order',
                f'classes are numbered in the order of their folders: number {wrong} is '
                f'{folders[wrong]!r}, and {classes[wrong]!r} in the classes of the dataset: leave '
                f'classes out, or write ({quoted(folders)})',
                files=(str(root),),
                count=sum(a != b for a, b in zip(classes, folders, strict=True)),
            )
        )
    return census


def _of_list(dataset: object) -> Census:
    """Counts what a list of files and numbers of classes gives."""
    source, classes = str(dataset.ann_file), class_names(dataset)
    lines = [line.strip() for line in Path(source).read_text().splitlines() if line.strip()]
    pairs = [line.rsplit(' ', 1) for line in lines]
    broken = [line for line, pair in zip(lines, pairs, strict=True)
              if len(pair) != 2 or not pair[1].isdecimal()]  # fmt: skip
    census = Census(unit='pictures', pictures=len(lines), names=classes)
    if broken and getattr(dataset, 'with_label', True):
        message = (
            f'{len(broken)} of {len(lines)} lines in {source} are not a file and the number '
            f'of its class, such as {broken[0][:80]!r}'
        )
        finding = Finding('annotations-unreadable', message, '', True, (source,), len(broken))
        census.findings.append(finding)
    if broken:
        return census
    if not lines:
        message = f'{source} lists no picture'
        census.findings.append(Finding('no-picture', message, stops=True, files=(source,)))
        return census
    census.files = [os.path.join(dataset.img_prefix or '', file) for file, _ in pairs]
    counts = Counter(int(number) for _, number in pairs)
    census.table = [Row(name, counts[i], counts[i]) for i, name in enumerate(classes)]
    unknown = sorted(number for number in counts if number >= len(classes)) if classes else []
    if unknown:
        total = sum(counts[number] for number in unknown)
        message = (
            f'{of(total, "picture")} of {source} have the class {", ".join(map(str, unknown[:5]))}'
            f': the {len(classes)} classes are 0 to {len(classes) - 1}'
        )
        if not counts[0] and unknown == [len(classes)]:
            message += '; they seem to be counted from 1: subtract 1'
        stops = len(unknown) == len(counts)
        finding = Finding('label-values', message, stops=stops, files=(source,), count=total)
        census.findings.append(finding)
    census.findings += absent_pictures(census.files, dataset.img_prefix or '', source)
    return census
