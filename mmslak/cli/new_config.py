"""Writes a config for a folder of your own data, ready for `mmslak train`.

It recognises COCO files with pictures, YOLO text files with a YAML file, VOC XML files, pictures
with label maps, and folders of pictures called like their classes. The data stays as it is: lists
of pictures and converted annotations go into a folder beside the config.

Examples:
    mmslak new-config data/mine --out my.py
    mmslak new-config data/streets --out streets.py --classes background,road,car
    mmslak new-config data/mine/all.json --out my.py --like faster_rcnn_slak_t_voc07
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import track

from mmslak.apis.new_config import (
    LIBRARIES,
    LIKE,
    default_like,
    lists_of,
    names_in,
    this_machine,
    write_config,
)
from mmslak.cli.parser import check_output, command_parser, one_line_errors
from mmslak.datasets.formats import FORMATS, complete_splits, recognise
from mmslak.datasets.formats.description import SPLITS, DataSet
from mmslak.datasets.formats.files import read_text
from mmslak.datasets.formats.label_maps import IGNORED, name_classes, shares
from mmslak.errors import UserError, first_few

FORMAT_OF = {'segmentation': 'label-maps', 'classification': 'class-folders'}
NAMES = ('classes.txt', 'labels.txt', 'codes.txt')  # in which people name the values of label maps


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak new-config`."""
    parser = command_parser('new-config', __doc__)
    parser.add_argument(
        'data', type=Path, metavar='DATA', help='folder, or the one annotation file to use'
    )
    parser.add_argument('--out', type=Path, required=True, help='the config to write, NAME.py')
    parser.add_argument(
        '--like', choices=LIKE, help='which of our configs to start from [by the labels]'
    )
    parser.add_argument(
        '--format', choices=FORMATS, help='format of the data [the first that is recognised]'
    )
    parser.add_argument(
        '--classes',
        metavar='A,B,C',
        help='names of the values of label maps, in the order of the values [asked for]',
    )
    parser.add_argument(
        '--ignore',
        type=int,
        metavar='VALUE',
        help='value of label maps that is no class: 255, or 0, and then 1 is the first class [255]',
    )
    parser.add_argument('--force', action='store_true', help='overwrite what is there')
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.out.suffix != '.py':
        raise UserError(f'--out {args.out}: a config is a Python file; try {args.out.stem}.py')
    _check_free(args.out, args.force)
    data = _recognise(args)
    if data.kind == 'segmentation':
        _name_classes(data, args)
    elif args.classes is not None or args.ignore is not None:
        raise UserError(
            f'--classes and --ignore are for label maps; {data.root} has names: '
            f'{first_few(data.classes, 10)}'
        )
    like = args.like or default_like(data.kind)
    if data.kind not in LIKE[like]:
        fit = ' or '.join(name for name, kinds in LIKE.items() if data.kind in kinds)
        raise UserError(
            f'--like {like} needs {" or ".join(LIKE[like])}, but {data.root} has {data.kind} '
            f'({data.format}: {data.sign}): --like {fit}'
        )
    division = complete_splits(data)
    machine = this_machine()
    folder = lists_of(args.out)
    text, files = write_config(data, like, machine, folder.name)
    for name in files:
        _check_free(folder / name, args.force)
    check_output(args.out)
    try:
        for name, content in files.items():
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(content, encoding='utf-8')
        args.out.write_text(text, encoding='utf-8')
    except OSError as error:
        raise UserError(f'{error.filename} cannot be written: {error.strerror}') from error
    has_weights = machine.weights is not None
    _report(data, division, args.out, folder if files else None, has_weights, text)
    missing = [name for name in ('mmengine', LIBRARIES[like]) if find_spec(name) is None]
    if missing:
        raise UserError(f'{args.out} is written, and needs {missing[0]}, which is not installed')


def _check_free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise UserError(f'{path} is there already; --force overwrites it')


def _recognise(args: argparse.Namespace) -> DataSet:
    """The data, as the format that was asked for, or that --like reads, or that comes first."""
    formats = [args.format] if args.format else list(FORMATS)
    if args.like and not args.format:
        wanted = {FORMAT_OF.get(kind) for kind in LIKE[args.like]}
        formats.sort(key=lambda name: name not in wanted)
    return recognise(args.data.expanduser(), formats, _track)


def _track(items: Iterable, count: int) -> Iterable:
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(items, 'label maps', total=count, console=console, disable=hidden)


def _name_classes(data: DataSet, args: argparse.Namespace) -> None:
    """Names the values of label maps: as given, as in the config before, or as a person answers."""
    given, ignored = args.classes, args.ignore
    before, leaves_zero_out = names_in(args.out)
    values = [value for value in data.values if value != IGNORED]
    shown = ', '.join(shares(data))
    file = next((data.root / name for name in NAMES if (data.root / name).is_file()), None)
    if given is not None:
        names = given.split(',')
    elif file is not None:
        names = [line for line in read_text(file).splitlines() if line.strip()]
        data.notes.append(f'names of the classes are from {file}')
    elif before:
        names, ignored = before, 0 if ignored is None and leaves_zero_out else ignored
        data.notes.append(f'names of the classes are those of {args.out} before')
    elif sys.stdin.isatty():
        print(f'The label maps of {data.root} have the values {shown}.')
        if ignored is None and 0 in values and len(values) > 2:
            answer = _ask('Is 0 a class, such as the background? [Y/n] ')
            ignored = 0 if answer.lower().startswith('n') else None
        first = 1 if ignored == 0 or 0 not in values else 0
        example = ['background', *(f'class{v}' for v in range(1, max(values) + 1))][first:]
        proposed = ','.join(example)
        answer = _ask(f'Names of the values from {first} to {max(values)} [{proposed}]: ')
        names = answer.split(',') if answer else example
    else:
        first = min(values)
        example = ','.join('ABCDEFGHIJ'[: max(1, min(max(values) - first + 1, 10))])
        raise UserError(
            f'the label maps of {data.root} have the values {shown}, without names: name them in '
            f'this order with --classes {example}, or one on a line in {data.root / NAMES[0]}; '
            'if 0 is no class, add --ignore 0 and leave its name out'
        )
    names = [name.strip() for name in names]
    name_classes(data, names, IGNORED if ignored is None else ignored)


def _ask(question: str) -> str:
    try:
        return input(question).strip()
    except EOFError:
        return ''


def _report(
    data: DataSet, division: str, out: Path, folder: Path | None, has_weights: bool, text: str
) -> None:
    """Prints what was recognised and written, and what to type next.

    What is said of the config comes from its text: reading it as a config takes seconds.
    """
    print(f'{data.root}: {data.format}, {data.kind}')
    print(f'  recognised by {data.sign}')
    counts = ', '.join(f'{data.pictures(s)} {s}' for s in SPLITS if data.splits.get(s))
    print(f'  pictures: {counts} ({division})')
    trained = data.pictures_of_classes('train')
    # The name of each value of label maps, since a name too few would move all the others.
    value = '{} = ' if data.values else ''
    shown = [
        f'{value.format(n + data.ignore_zero)}{name} ({trained[n]})'
        for n, name in enumerate(data.classes)
    ]
    print(f'  classes, with pictures to train on: {first_few(shown, 12)}')
    for note in data.notes:
        print(f'  note: {note}')
    beside = f', with {folder}' if folder else ''
    print(f'written: {out}{beside}')
    if not has_weights:
        print(
            '  from random weights; better: pip install gdown && mmslak get-checkpoint slak_tiny,'
        )
        print('  and then new-config again, with --force')
    steps, epochs = (
        re.search(rf'^{name} = (\d+)', text, re.MULTILINE) for name in ('iterations', 'max_epochs')
    )
    last = f'iter_{steps[1]}.pth' if steps else f'epoch_{epochs[1]}.pth'
    config, stem = shlex.quote(str(out)), re.sub(r'\s', '\\ ', out.stem)
    print(f'look:    mmslak check-dataset {config} && mmslak browse {config}')
    print(f'try:     mmslak train {config} --iterations 20')
    print(f'next:    mmslak train {config}')
    print(f'         mmslak test {config} work_dirs/{stem}/{last}')
    print(f'         mmslak demo PICTURES {config} work_dirs/{stem}/{last}')
