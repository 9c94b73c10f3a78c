"""Checks a data set on disk against what its publisher ships, and downloads what is missing.

Examples:
    python tools/prepare_data.py ade20k
    python tools/prepare_data.py coco --root /data/coco --download
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmslak.datasets.catalog import DATASETS, Dataset
from mmslak.download import ArchiveError, DownloadError, fetch, unpack


def download(dataset: Dataset, root: Path) -> None:
    """Gets the archives of what is missing; one that lies there was not unpacked to the end."""
    folder = root / 'archives'
    for archive in dataset.archives:
        file = folder / Path(archive.url).name
        if file.exists() or archive.problems(root):
            fetch(archive.url, file, archive.checksum)
            unpack(file, root, archive.inside)
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('dataset', choices=DATASETS)
    parser.add_argument('--root', help='folder of the data set (default: where the configs look)')
    parser.add_argument('--download', action='store_true', help='get what is missing')
    args = parser.parse_args(argv)
    dataset = DATASETS[args.dataset]
    root = Path(args.root or dataset.root)
    try:
        if args.download:
            download(dataset, root)
        problems = dataset.problems(root)
    except (ArchiveError, DownloadError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; run the command again to go on', file=sys.stderr)
        return 130
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


if __name__ == '__main__':
    sys.exit(main())
