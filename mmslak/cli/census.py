"""The census of the datasets of a config: taken before a run, and shown as a table."""

import copy
import io
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from mmengine import registry
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmslak.apis.config import LOADERS, innermost_datasets, walk
from mmslak.apis.new_config import command_of
from mmslak.cli.census_cache import key_of, key_of_pair, remembered
from mmslak.datasets.census import Census, count, joined
from mmslak.datasets.findings import Finding, counted, of, quoted
from mmslak.datasets.folders import read_once
from mmslak.datasets.shared_pictures import shared_finding
from mmslak.errors import own_errors_only

ROWS = 20  # classes in a table; of more, the rarest are shown
RAREST = 8  # how many of them
UNEQUAL = 100  # times as much of one class as of another, from which on it is said
ABSENT = ('pictures-absent', 'label-map-absent', 'annotations-absent')  # kinds of findings
WIDTH = 100  # characters of a line of a table


@read_once()
def census_of_config(cfg: Config, loaders: Iterable[str], full: bool = False) -> list[Census]:
    """Counts what the datasets of a config have to teach, without loading them.

    What an earlier census of the same files has found is taken from the cache.

    Args:
        cfg: The config.
        loaders: Those of `train_dataloader`, `val_dataloader`, `test_dataloader` to look at.
        full: Whether to read all label maps; a sample of them otherwise.

    Returns:
        A census for each loader whose data are of a form that is known. A fault of the census
        itself is one warning, and leaves out the one of its loader.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    counter = _Counter(full)
    taken = [
        _census_of_loader(cfg, loader, counter) for loader in loaders if cfg.get(loader) is not None
    ]
    taken = [census for census in taken if census and (census.unit or census.findings)]
    _compare_folders(taken)
    if not any(takes_a_part(cfg[census.loader].dataset) for census in taken):
        _compare_pictures(taken, counter)
    for census in taken:
        census.files = []  # of no use during training
    return taken


class _Counter:
    """Counts datasets once, and remembers how to find the count again.

    Attributes:
        datasets: Of each loader, (key, dataset that is not loaded) of those inside of wrappers.
    """

    def __init__(self, full: bool) -> None:
        self.full = full
        self.datasets: dict[str, list[tuple[str, object]]] = {}

    def count(self, loader: str, dataset: object) -> Census:
        """The census of a dataset; of one that was counted before, without its files."""
        key, taken = key_of(dataset, self.full), []
        self.datasets.setdefault(loader, []).append((key, dataset))

        def make() -> dict:
            taken.append(count(dataset, self.full, _bar))
            return taken[0].to_dict()

        values = remembered(key, make)
        return taken[0] if taken else Census.from_dict(values)

    def key(self, loader: str) -> str:
        """A key of all datasets of a loader."""
        return ' '.join(key for key, _ in self.datasets[loader])

    def files(self, census: Census) -> list[str]:
        """The pictures of a census, also of one that was counted before."""
        if census.files:
            return census.files
        parts = (count(dataset, self.full, _bar) for _, dataset in self.datasets[census.loader])
        return [file for part in parts for file in part.files]


@own_errors_only
def _census_of_loader(cfg: Config, loader: str, counter: _Counter) -> Census:
    parts = []
    for _, dataset in innermost_datasets(cfg[loader].dataset):
        built = unloaded(dataset)
        if built is None:
            continue
        part = counter.count(loader, built)
        part.findings = [_with_remedy(finding, cfg, built) for finding in part.findings]
        if _shares_folder(cfg, dataset):  # other annotations may list the other pictures
            part.findings = [f for f in part.findings if f.kind != 'pictures-not-listed']
        parts.append(part)
    return joined(parts, loader)


def _with_remedy(finding: Finding, cfg: Config, dataset: object) -> Finding:
    """Adds what to type where files of a data set are absent."""
    if finding.kind not in ABSENT:
        return finding
    source = str(dataset.ann_file or '')
    command = command_of(cfg, source)
    if command:
        remedy = f'if they are not to come back, write the lists anew: {command}'
    elif source and not os.path.isdir(source):
        remedy = f'bring them back, or take them out of {source}'
    else:
        remedy = 'bring them back, or take their pictures away'
    return replace(finding, message=f'{finding.message}; {remedy}')


def unloaded(dataset: dict) -> object | None:
    """A dataset that has not loaded its annotations; None if it cannot be built like this.

    Of its pipeline it has the transforms that load. Building it in full says why, if it cannot be
    built at all.
    """
    settings = dict(copy.deepcopy(dataset), lazy_init=True)
    if settings.get('pipeline'):
        settings['pipeline'] = [
            transform
            for transform in settings['pipeline']
            if isinstance(transform, dict) and 'Load' in str(transform.get('type'))
        ]
    try:
        return registry.DATASETS.build(settings)
    except Exception:  # a dataset is a program: it can raise anything
        return None


@own_errors_only
def _compare_pictures(taken: list[Census], counter: _Counter) -> None:
    """Adds the pictures of the training data that are in the other data, too."""
    if not taken or taken[0].loader != 'train_dataloader' or not taken[0].unit:
        return
    train = taken[0]
    for census in taken[1:]:

        def make(census: Census = census) -> dict:
            files = counter.files(train), counter.files(census)
            finding = shared_finding(*files, census.loader)
            return asdict(finding) if finding else {}

        key = key_of_pair(counter.key(train.loader), counter.key(census.loader))
        values = remembered(key, make)
        if values:
            census.findings.append(Finding(**{**values, 'files': tuple(values['files'])}))


def takes_a_part(dataset: dict) -> bool:
    """Whether a dataset leaves out samples by their number, so that others may have the rest."""
    return any(
        (key.endswith('indices') and value is not None)
        or (key.endswith('type') and str(value).endswith('KFoldDataset'))
        for key, value in walk(dict(dataset=dataset))
    )  # fmt: skip


def _bar(items: Iterable, description: str) -> Iterable:
    console = Console(stderr=True)
    shown = console.is_terminal
    return track(items, description, console=console, disable=not shown, transient=True)


def _shares_folder(cfg: Config, dataset: dict) -> bool:
    """Whether another dataset of the config lists pictures of the same folder."""
    datasets = [
        part
        for loader in LOADERS
        if cfg.get(loader) is not None
        for _, part in innermost_datasets(cfg[loader].dataset)
    ]
    return any(
        _folder(other) == _folder(dataset) and other.get('ann_file') != dataset.get('ann_file')
        for other in datasets
    )


def _folder(dataset: dict) -> Path:
    prefix = dataset.get('data_prefix') or {}
    folder = prefix if isinstance(prefix, str) else prefix.get('img')
    return Path(dataset.get('data_root') or '', folder or '')


def _compare_folders(taken: list[Census]) -> None:
    """Adds what the folders of classes say when they differ between training and validation."""
    if not taken or taken[0].unit != 'pictures' or taken[0].loader != 'train_dataloader':
        return
    train = taken[0].names
    for census in taken[1:]:
        if census.unit != 'pictures' or not train or census.names == train[: len(census.names)]:
            continue
        wrong = next(i for i, name in enumerate(census.names) if train[i : i + 1] != [name])
        name = census.names[wrong]
        in_train = f'number {train.index(name)}' if name in train else 'not there'
        lacking = [name for name in train if name not in census.names]
        fix = f'make the folders {quoted(lacking)} there, if need be empty' if lacking else (
            f'take {quoted([n for n in census.names if n not in train])} out, or add it to train'
        )  # fmt: skip
        census.findings.append(
            Finding(
                'class-numbers-differ',
                f'folders are numbered in their order: {name!r} is number {wrong} here and '
                f'{in_train} in train_dataloader, so that its labels are wrong: {fix}',
                loader=census.loader,
                count=len(census.names) - wrong,
            )
        )


# ---------------------------------------------------------------- what is shown


def sentence(finding: Finding) -> str:
    """A finding as one line."""
    return f'{finding.loader}: {finding.message}' if finding.loader else finding.message


def log(censuses: Iterable[Census], logger: logging.Logger) -> None:
    """Logs the table of the censuses, and a warning for each of their findings."""
    censuses = list(censuses)
    if any(census.unit for census in censuses):
        logger.info('Census of the data:\n%s', text_of(censuses))
    for finding in (finding for census in censuses for finding in census.findings):
        logger.warning(sentence(finding))


def remind(censuses: Iterable[Census], logger: logging.Logger) -> None:
    """Logs the warnings again, at the end of a run of which nobody reads the beginning."""
    for finding in (finding for census in censuses for finding in census.findings):
        # MMEngine's logger passes over a warning that it has logged before, word by word.
        logger.warning('As said at the start: ' + sentence(finding))


def text_of(censuses: Iterable[Census]) -> str:
    """The table of the censuses: a row per class, and a line with the totals of each loader."""
    censuses = [census for census in censuses if census.unit]
    rows = {}
    for census in censuses:
        for row in census.table:
            rows.setdefault(row.name, {})[census.loader] = row
    names, shown = list(rows), list(rows)
    if len(names) > ROWS and censuses:
        amount = {name: sum(row.amount for row in found.values()) for name, found in rows.items()}
        shown = sorted(filter(amount.get, names), key=amount.get)[:RAREST]
    table = Table(box=None, pad_edge=False, header_style='')
    table.add_column('class' if shown == names else f'the {len(shown)} rarest of {len(names)}')
    for census in censuses:
        split = census.loader.removesuffix('_dataloader')
        for heading in dict.fromkeys(('pictures', census.unit)):
            table.add_column(f'{split} {heading}'.strip(), justify='right')
    for name in shown:
        cells = []
        for census in censuses:
            row = rows[name].get(census.loader)
            values = (row.pictures, row.amount) if row else (0, 0)
            cells += map('{:,}'.format, values[: 1 if census.unit == 'pictures' else 2])
        table.add_row(name, *cells)
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, markup=False)
    if shown:
        console.print(table)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return '\n'.join(lines + [_totals(census) for census in censuses])


def _totals(census: Census) -> str:
    parts = [of(census.pictures, 'picture')]
    if census.sampled:
        parts.append('{} of {} label maps read'.format(*census.sampled))
    if census.empty:
        parts.append(f'{census.empty} without a label')
    if census.ignored:
        parts.append(f'{100 * census.ignored:.1f} % of the pixels ignored')
    if 'smallest' in census.sizes:
        sides = ['×'.join(map(str, census.sizes[key])) for key in ('smallest', 'largest')]
        parts.append(' to '.join(dict.fromkeys(sides)) + ' pixels')
    if 'small' in census.sizes:
        parts.append(', '.join(f'{census.sizes[k]} {k}' for k in ('small', 'medium', 'large')))
    never = [row.name for row in census.table if not row.amount]
    if never and len(census.table) > ROWS:
        parts.append(f'without {quoted(never)}')
    if unequal := _unequal(census):
        parts.append(unequal)
    if census.dropped:
        parts.append(f'left out: {counted(census.dropped)}')
    return f'{census.loader or "data"}: ' + '; '.join(parts)


def _unequal(census: Census) -> str:
    """How much more there is of the most frequent class than of the rarest one that occurs.

    It is no warning: COCO has 1,300 times as many persons as hair driers, and ADE20K ten thousand
    times as many pixels of walls as of its rarest class, and both are learnt from.
    """
    rows = sorted((row for row in census.table if row.amount), key=lambda row: row.amount)
    ratio = rows[-1].amount // rows[0].amount if rows else 0
    if ratio < UNEQUAL:
        return ''
    return f'{rows[-1].name!r} has {ratio:,} times the {census.unit} of {rows[0].name!r}'
