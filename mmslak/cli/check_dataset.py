"""Looks through the datasets of a config: what they teach, and what cannot be trained on.

The annotations are counted first. Then every picture and annotation is read once, on all cores. Bad
ones are printed with the reason, and listed in a file if wanted; exit status 1 if there are any, or
if nothing could be learnt. Odd ones, which are trained on as they are loaded, are counted by kind.

Examples:
    mmslak check-dataset configs/upernet_slak_t_ade20k.py --out bad.jsonl
    mmslak check-dataset my.py --full --page my_data.html --json my_data.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.progress import track

from mmslak.apis.options import read_with_options
from mmslak.cli.census import census_of_config, sentence, takes_a_part, text_of
from mmslak.cli.config_checks import build_dataset, check_datasets
from mmslak.cli.dataset_report import Checked, to_dict, to_page
from mmslak.cli.parser import (
    add_cfg_options,
    add_config,
    check_output,
    command_parser,
    one_line_errors,
)
from mmslak.datasets.census_table import Census
from mmslak.datasets.findings import Finding, of
from mmslak.datasets.guard import innermost
from mmslak.datasets.sample_list import SampleList
from mmslak.datasets.samples import MEND, SKIP
from mmslak.datasets.scan import scan
from mmslak.datasets.shared_pictures import picture_paths, shared_finding
from mmslak.errors import UserError, own_errors_only

SPLITS = ('train', 'val', 'test')


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak check-dataset`."""
    parser = command_parser('check-dataset', __doc__)
    add_config(parser)
    parser.add_argument('--split', choices=SPLITS, nargs='+', default=['train', 'val'])
    parser.add_argument(
        '--full', action='store_true', help='count all label maps, not a sample of them'
    )
    parser.add_argument('--workers', type=_count, help='processes [all cores]')
    parser.add_argument('--out', type=Path, help='file to list bad samples in, as JSON lines')
    parser.add_argument('--json', type=Path, metavar='FILE', help='file for all that was found')
    parser.add_argument(
        '--page', type=Path, metavar='FILE.html', help='the same as one page, with thumbnails'
    )
    add_cfg_options(parser, 'data_root=/data/ade')
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    cfg = read_with_options(args.config, args.cfg_options)
    loaders = [f'{split}_dataloader' for split in args.split if cfg.get(f'{split}_dataloader')]
    check_datasets(cfg, loaders)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    for option in ('out', 'json', 'page'):
        if getattr(args, option) is not None:
            check_output(getattr(args, option), option=option)
    censuses = {c.loader: c for c in census_of_config(cfg, loaders, full=args.full)}
    if any(census.unit for census in censuses.values()):
        print(text_of(censuses.values()))
    for census in censuses.values():
        _print_findings(census.findings)
    checked = [_build(cfg, loader, censuses.get(loader, Census(loader))) for loader in loaders]
    if not any(takes_a_part(cfg[loader].dataset) for loader in loaders):
        _compare(checked)
    if args.out is not None:
        args.out.write_text('')
    for part in checked:
        if part.dataset is not None:
            _read_samples(part, args)
    if args.json is not None:
        args.json.write_text(json.dumps(to_dict(args.config, checked), indent=1), encoding='utf-8')
    if args.page is not None:
        args.page.write_text(to_page(args.config, checked), encoding='utf-8')
        print(f'Page: {args.page}')
    bad = {part.loader for part in checked if part.bad}
    if bad:
        print('For each bad sample:', f'{MEND}, {SKIP}' if 'train_dataloader' in bad else MEND)
    return 1 if any(part.stops for part in checked) else 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected a number of processes from 1, got {text!r}')
    return int(text)


def _build(cfg: Config, loader: str, census: Census) -> Checked:
    """Builds the dataset of a loader, unless the census says why that is impossible."""
    try:
        return Checked(loader, census, build_dataset(cfg, loader))
    except UserError:
        if not any(finding.stops for finding in census.findings):
            raise
        return Checked(loader, census)


@own_errors_only
def _compare(checked: Sequence[Checked]) -> None:
    """Adds the pictures of the training data that are in the other data, too.

    Of data of a known form the census has said so.
    """
    parts = {p.loader: p for p in checked if p.dataset is not None and not p.census.unit}
    train = parts.pop('train_dataloader', None)
    if train is None or not parts:
        return
    paths = picture_paths(train.dataset)
    for loader, part in parts.items():
        finding = shared_finding(paths, picture_paths(part.dataset), loader)
        if finding is not None:
            part.census.findings.append(finding)
            _print_findings([finding])


def _print_findings(findings: Sequence[Finding]) -> None:
    for finding in findings:
        print(f'{"error" if finding.stops else "warning"}: {sentence(finding)}')


def _read_samples(part: Checked, args: argparse.Namespace) -> None:
    """Reads all samples, prints the bad ones, and notes what was found."""
    part.samples = sum(len(inner) for inner in innermost(part.dataset))
    listed = args.out and SampleList(args.out)
    found = scan(part.dataset, args.workers)
    console = Console(stderr=True)
    named = {file for finding in part.census.findings for file in finding.files}
    track_all = track(found, part.loader, part.samples, console=console)
    for place, (file, reason, oddities, files) in enumerate(track_all):
        if reason:
            part.bad.append((file, reason))
            print(f'{file}: {reason}')
            if listed:
                listed.add(file, reason)
        for oddity in oddities:
            part.odd.setdefault(oddity, []).append(file)
        if reason or oddities or not named.isdisjoint(files):
            part.places.update(dict.fromkeys(files, place))
    print(f'{part.loader}: {of(part.samples, "sample")}, {len(part.bad)} bad')
    for oddity, files in sorted(part.odd.items()):
        print(f'{part.loader}: {len(files)} odd: {oddity}; first: {files[0]}')
