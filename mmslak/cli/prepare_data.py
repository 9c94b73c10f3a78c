"""Checks a data set on disk against what its publisher ships, and downloads what is missing.

`labels` is for label maps of your own, and has options of its own: it makes indices of their values
or colours (mmslak prepare-data labels --help).

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
from mmslak.errors import UserError
from mmslak.fileio.archive import unpack
from mmslak.fileio.download import fetch

LABELS = 'labels'  # not a data set, but a command of its own


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
    parser.add_argument('dataset', choices=[*DATASETS, LABELS])
    parser.add_argument('--root', help='folder of the data set (default: where the configs look)')
    parser.add_argument('--download', action='store_true', help='get what is missing')
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [LABELS]:
        return prepare_labels.main(argv[1:])
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.dataset == LABELS:
        parser.error(f'{LABELS} comes first: mmslak prepare-data {LABELS} SRC …')
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
    print(f'{dataset.title} in {root}: {len(problems)} problems', file=sys.stderr)
    for line in problems:
        print(f'  {line}', file=sys.stderr)
    if dataset.help:
        print(dataset.help.format(root=root), file=sys.stderr)
    elif not args.download:
        print('add --download to get what is missing', file=sys.stderr)
    return 1
