"""Looks through the datasets of a config for samples that cannot be trained on.

Every picture and annotation is read once, on all cores. Bad ones are printed with the reason, and
listed in a file if wanted; exit status 1 if there are any. Odd ones, which are trained on as they
are loaded, are counted by kind.

Example:
    python tools/check_dataset.py configs/upernet_slak_t_ade20k.py --out bad.jsonl
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.registry import DATASETS, init_default_scope
from rich.console import Console
from rich.progress import track

import mmslak  # noqa: F401  before any config: it lets them inherit from `mmseg::…`
from mmslak import checks, cli
from mmslak.datasets.bad_samples import SampleList, innermost, scan

SPLITS = ('train', 'val', 'test')


@cli.one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('--split', choices=SPLITS, nargs='+', default=['train', 'val'])
    parser.add_argument('--workers', type=_count, help='processes [all cores]')
    parser.add_argument('--out', type=Path, help='file to list bad samples in, as JSON lines')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=cli.OptionsAction,
        default={},
        metavar='KEY=VALUE',
        help='settings to override, for example data_root=/data/ade',
    )
    args = parser.parse_args(argv)

    cfg = cli.read_config(args.config)
    checks.apply_options(cfg, args.cfg_options)
    checks.check_scope(cfg)
    loaders = [f'{split}_dataloader' for split in args.split if cfg.get(f'{split}_dataloader')]
    checks.check_datasets(cfg, loaders)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    datasets = {loader: _build(loader, cfg[loader].dataset) for loader in loaders}
    if args.out is not None:
        _start_list(args.out)
    bad = sum(_check(loader, dataset, args) for loader, dataset in datasets.items())
    return 1 if bad else 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected a number of processes from 1, got {text!r}')
    return int(text)


def _build(loader: str, dataset: dict) -> object:
    try:
        return DATASETS.build(dataset)
    except Exception as error:  # a dataset is a program: it can raise anything
        what = f'{loader}.dataset ({dataset.get("type")}) cannot be built'
        raise checks.UserError(f'{what}: {type(error).__name__}: {error}') from error


def _start_list(path: Path) -> None:
    """An empty list of bad samples: that it can be written is found out before the scan."""
    if path.is_dir():
        raise checks.UserError(f'--out {path}: a file is expected, this is a folder')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('')
    except OSError as error:
        raise checks.UserError(f'--out {path} cannot be written: {error.strerror}') from error


def _check(loader: str, dataset: object, args: argparse.Namespace) -> int:
    """Prints the bad samples of a loader's dataset; returns their number."""
    total = sum(len(inner) for inner in innermost(dataset))
    bad, odd, listed = 0, {}, args.out and SampleList(args.out)
    found = scan(dataset, args.workers)
    for file, reason, oddities in track(found, loader, total, console=Console(stderr=True)):
        if reason:
            bad += 1
            print(f'{file}: {reason}')
            if listed:
                listed.add(file, reason)
        for oddity in oddities:
            odd.setdefault(oddity, []).append(file)
    print(f'{loader}: {total} samples, {bad} bad')
    for oddity, files in sorted(odd.items()):
        print(f'{loader}: {len(files)} odd: {oddity}; first: {files[0]}')
    return bad


if __name__ == '__main__':
    sys.exit(main())
