"""Looks through the datasets of a config for samples that cannot be trained on.

Every picture and annotation is read once, on all cores. Bad ones are printed with the reason, and
listed in a file if wanted; exit status 1 if there are any. Odd ones, which are trained on as they
are loaded, are counted by kind.

Example:
    mmslak check-dataset configs/upernet_slak_t_ade20k.py --out bad.jsonl
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.registry import init_default_scope
from rich.console import Console
from rich.progress import track

from mmslak.apis.options import read_with_options
from mmslak.cli.config_checks import build_dataset, check_datasets
from mmslak.cli.parser import (
    add_cfg_options,
    add_config,
    check_output,
    command_parser,
    one_line_errors,
)
from mmslak.datasets.guard import innermost
from mmslak.datasets.sample_list import SampleList
from mmslak.datasets.scan import scan

SPLITS = ('train', 'val', 'test')


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak check-dataset`."""
    parser = command_parser('check-dataset', __doc__)
    add_config(parser)
    parser.add_argument('--split', choices=SPLITS, nargs='+', default=['train', 'val'])
    parser.add_argument('--workers', type=_count, help='processes [all cores]')
    parser.add_argument('--out', type=Path, help='file to list bad samples in, as JSON lines')
    add_cfg_options(parser, 'data_root=/data/ade')
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    cfg = read_with_options(args.config, args.cfg_options)
    loaders = [f'{split}_dataloader' for split in args.split if cfg.get(f'{split}_dataloader')]
    check_datasets(cfg, loaders)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    datasets = {loader: build_dataset(cfg, loader) for loader in loaders}
    if args.out is not None:
        check_output(args.out)
        args.out.write_text('')
    bad = sum(_check(loader, dataset, args) for loader, dataset in datasets.items())
    return 1 if bad else 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected a number of processes from 1, got {text!r}')
    return int(text)


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
