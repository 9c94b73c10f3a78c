"""Checks a data set on disk against what its publisher ships, and downloads what is missing.

`labels` makes indices of the values or colours of your own label maps: mmslak prepare-data labels
--help explains it.

Examples:
    mmslak prepare-data ade20k
    mmslak prepare-data coco --root /data/coco --download
    mmslak prepare-data labels data/mine/masks
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmslak.cli import prepare_labels
from mmslak.cli.parser import command_parser, one_line_errors
from mmslak.datasets.catalog import DATASETS, Dataset
from mmslak.datasets.findings import of
from mmslak.errors import UserError
from mmslak.fileio.archive import unpack
from mmslak.fileio.download import fetch


def download(dataset: Dataset, root: Path) -> None:
    """Downloads and unpacks what is missing. A leftover archive was not unpacked completely."""
    folder = root / 'archives'
    for archive in dataset.archives:
        file = folder / Path(archive.url).name
        if file.exists() or archive.problems(root):
            fetch(archive.url, file, archive.checksum)
            unpack(file, root, archive.inside)
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak prepare-data`."""
    parser = command_parser('prepare-data', __doc__)
    _add_options(parser, None)
    commands = parser.add_subparsers(dest='dataset', metavar='DATASET|labels', required=True)
    for name, dataset in DATASETS.items():
        one = commands.add_parser(name, help=dataset.title, description=dataset.title)
        _add_options(one, argparse.SUPPRESS)  # so that options before the name hold
    prepare_labels.add_parser(commands)
    return parser


def _add_options(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument(
        '--root', default=default, help='folder of the data set (default: where the configs look)'
    )
    parser.add_argument(
        '--download', action='store_true', default=default, help='get what is missing'
    )


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int | None:
    args = build_parser().parse_args(argv)
    if args.dataset == 'labels':
        return prepare_labels.run(args)
    dataset = DATASETS[args.dataset]
    root = Path(args.root or dataset.root)
    try:
        if args.download:
            download(dataset, root)
        problems = dataset.problems(root)
    except OSError as error:
        raise UserError(str(error)) from error
    if not problems:
        print(f'{dataset.title} in {root}: complete')
        return 0
    print(f'{dataset.title} in {root}: {of(len(problems), "problem")}', file=sys.stderr)
    for line in problems:
        print(f'  {line}', file=sys.stderr)
    if dataset.help:
        print(dataset.help.format(root=root), file=sys.stderr)
    elif not args.download:
        print('add --download to get what is missing', file=sys.stderr)
    return 1
