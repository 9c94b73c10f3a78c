"""Makes indices of the values or colours of label maps.

Without --map it only lists what there is, and the command to type. SRC stays as it is, and DST, a
new folder, gets PNGs of one channel in the same subfolders. Pictures with a palette hold indices
already; a mapping of colours reads their colours.

Examples:
    mmslak prepare-data labels data/mine/masks
    mmslak prepare-data labels data/mine/masks data/mine/masks_indices --map 255:1
    mmslak prepare-data labels SRC DST --map '#000000:0' '#800000:1' --unknown 255
    mmslak prepare-data labels SRC DST --map 0:0 255:1 --nearest
"""

import argparse
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from mmslak.datasets import label_maps
from mmslak.datasets.formats.label_maps import data_folder
from mmslak.datasets.label_maps import UnmappedError, name_of
from mmslak.errors import UserError, first_few

SHOWN = 30  # values that are listed
MOST = 100  # in a command that is to be typed


def add_parser(commands: argparse.Action) -> None:
    """Adds `labels` to the commands of `mmslak prepare-data`."""
    parser = commands.add_parser(
        'labels',
        help='label maps of your own',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('source', type=Path, metavar='SRC', help='folder of label maps')
    parser.add_argument('target', type=Path, metavar='DST', nargs='?', help='new folder for PNGs')
    parser.add_argument(
        '--map',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY:INDEX',
        help="indices of values, 255:1, or of colours, '#800000:1' or 128,0,0:1; values that are "
        'not named stay as they are',
    )
    others = parser.add_mutually_exclusive_group()
    others.add_argument(
        '--unknown', type=_index, metavar='INDEX', help='index of all that --map does not name'
    )
    others.add_argument(
        '--nearest',
        action='store_true',
        help='take what --map does not name for the nearest that it names, as in JPEGs',
    )


def run(args: argparse.Namespace) -> None:
    """Lists or maps label maps.

    Raises:
        UserError: If the arguments do not fit each other or the files.
    """
    if bool(args.map) != bool(args.target):
        raise UserError('DST and --map go together; without both of them, SRC is listed')
    if not args.source.is_dir():
        raise UserError(f'{args.source}: no such folder')
    files = label_maps.find_label_maps(args.source)
    if not files:
        suffixes = ' '.join(label_maps.SUFFIXES)
        raise UserError(f'{args.source}: no label map in it or below; expected {suffixes}')
    if args.map:
        mapping, colours = label_maps.parse_mapping(args.map)
        _convert_all(args, files, mapping, colours)
    else:
        _list(args.source, files)


def _index(text: str) -> int:
    if not text.isdecimal() or int(text) > label_maps.LARGEST:
        raise argparse.ArgumentTypeError(
            f'expected an index from 0 to {label_maps.LARGEST}, got {text!r}'
        )
    return int(text)


def _each(work: Callable, items: Sequence, text: str) -> Iterator:
    """What `work` gives for each item, on all cores, in order."""
    console = Console(stderr=True)
    with ProcessPoolExecutor(mp_context=get_context('fork')) as pool:
        found = pool.map(work, items, chunksize=16)
        yield from track(found, text, len(items), console=console, disable=not console.is_terminal)


# ---------------------------------------------------------------- what there is


def _list(source: Path, files: list[Path]) -> None:
    """Prints the values of label maps and the command that makes indices of them."""
    counted = list(_each(label_maps.count_values, files, 'label maps'))
    colours = any(coloured for _, coloured in counted)
    if colours:  # those that are grey, and those with a palette, are counted by their colours
        others = [i for i, (_, coloured) in enumerate(counted) if not coloured]
        again = partial(label_maps.count_values, colours=True)
        for i, found in zip(others, _each(again, [files[i] for i in others], 'colours')):
            counted[i] = found
    pixels, maps = Counter(), Counter()
    for counts, _ in counted:
        pixels.update(counts)
        maps.update(counts.keys())
    total = pixels.total()
    blurred = any(map(label_maps.is_blurred, files, (counts for counts, _ in counted)))
    what = 'in colour' if colours else 'with one value per pixel'
    print(f'{source}: {len(files)} label maps {what}')
    named = [value for value, _ in pixels.most_common() if value is not None]
    shown = named[:SHOWN] if blurred or colours else sorted(named[:SHOWN])
    print(f'{"colour" if colours else "value":>9}  {"pixels":>8}  label maps')
    for value in shown:
        share = pixels[value] / total
        print(f'{name_of(value, colours):>9}  {share:8.2%}  {maps[value]}')
    if len(pixels) > len(shown):
        share = 1 - sum(pixels[value] for value in shown) / total
        print(f'{"others":>9}  {share:8.2%}  {len(named) - len(shown)} or more')
    _advise(source, label_maps.suggest_mapping(pixels, colours, blurred), colours, blurred)


def _advise(source: Path, mapping: dict[int, int], colours: bool, blurred: bool) -> None:
    if not mapping:
        print('They are indices already: nothing is to be mapped.')
        _say_next(source)
        return
    if blurred:
        print('Compression or smooth borders have blurred them: --nearest undoes that.')
    if len(mapping) > MOST:
        print(f'More than {MOST} of them are not classes: are these label maps?')
        return
    pairs = [f'{name_of(value, colours)}:{index}' for value, index in mapping.items()]
    named = source if source.name not in ('', '..') else source.resolve()
    target = named.with_name(named.name + label_maps.INDICES)
    words = ['mmslak', 'prepare-data', 'labels', str(source), str(target), '--map', *pairs]
    print('This makes indices of them; set the numbers to those of your classes, from 0:')
    print(f'    {shlex.join([*words, *(["--nearest"] if blurred else [])])}')


# ---------------------------------------------------------------- conversion


def _convert_all(
    args: argparse.Namespace, files: list[Path], mapping: dict[int, int], colours: bool
) -> None:
    """Writes all label maps, or none."""
    source, target = args.source, args.target
    here, there = source.resolve(), target.resolve()
    if there == here or here in there.parents:
        raise UserError(f'{target} is SRC or lies in it: give another folder')
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f'{target} is there already: give a new folder')
    names = [file.relative_to(source).with_suffix('.png') for file in files]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f'{source}: several pictures would become {first_few(twice)}')
    try:
        there.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.labels_', dir=there.parent) as folder:
            pairs = [(file, Path(folder, 'all', name)) for file, name in zip(files, names)]
            for _, out in pairs:
                out.parent.mkdir(parents=True, exist_ok=True)
            work = partial(
                convert,
                mapping=mapping,
                colours=colours,
                unknown=args.unknown,
                nearest=args.nearest,
            )
            found = list(_each(work, pairs, 'label maps'))
            _stop_at_unmapped(files, [lost for _, _, lost in found], colours)
            Path(folder, 'all').replace(target)
    except OSError as error:
        raise UserError(f'{target} cannot be written: {error.strerror or error}') from error
    _summarise(target, mapping, colours, [(counts, kept) for counts, kept, _ in found])


def convert(
    pair: tuple[Path, Path],
    mapping: dict[int, int],
    colours: bool,
    unknown: int | None = None,
    nearest: bool = False,
) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """Writes a label map as a PNG of indices.

    Args:
        pair: Of the label map and the PNG.
        mapping: As for `label_maps.to_indices`.
        colours: Likewise.
        unknown: Likewise.
        nearest: Likewise.

    Returns:
        (256,) pixels of each index, those of them that had this value before, and the pixels of
        each value that gets no index. If there is one, nothing is written.
    """
    file, out = pair
    values, _ = label_maps.read_values(file, colours)
    try:
        indices = label_maps.to_indices(values, mapping, colours, unknown, nearest)
    except UnmappedError as error:
        return np.zeros(256, int), np.zeros(256, int), error.pixels
    Image.fromarray(indices).save(out)
    counts = np.bincount(indices.ravel(), minlength=256)
    return counts, np.bincount(indices[indices == values], minlength=256), {}


def _stop_at_unmapped(files: list[Path], lost: list[dict[int, int]], colours: bool) -> None:
    """Raises an error that names what gets no index."""
    bad = [(file, pixels) for file, pixels in zip(files, lost) if pixels]
    if not bad:
        return
    total = Counter()
    for _, pixels in bad:
        total.update(pixels)
    file, pixels = bad[0]
    value = max(pixels, key=pixels.get)
    what, name = 'colour' if colours else 'value', name_of(value, colours)
    rest = [name_of(other, colours) for other, _ in total.most_common() if other != value]
    others = f', and so are {first_few(rest)}' if rest else ''
    why = 'is not in --map' if colours else f'is above {label_maps.LARGEST} and not in --map'
    raise UserError(
        f'{file}: {what} {name} ({pixels[value]} pixels) {why}{others}, in {len(bad)} of '
        f"{len(files)} label maps; add '{name}:INDEX', or --unknown 255 for all of them (ignored "
        'in training), or --nearest if they are blurred'
    )


def _summarise(
    target: Path,
    mapping: dict[int, int],
    colours: bool,
    found: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    pixels = sum(counts for counts, _ in found)
    maps = sum((counts > 0).astype(int) for counts, _ in found)
    print(f'{len(found)} label maps: {target}')
    print(f'{"index":>9}  {"pixels":>8}  label maps')
    for index in np.flatnonzero(pixels).tolist():
        print(f'{index:9}  {pixels[index] / pixels.sum():8.2%}  {maps[index]}')
    kept = set(np.flatnonzero(sum(kept for _, kept in found)).tolist()) - set(mapping)
    kept = set() if colours else kept
    for value in sorted(kept & set(mapping.values())):
        keys = ', '.join(str(key) for key, index in mapping.items() if index == value)
        print(f'note: {value} was there before, and {keys} became {value}, too')
    _say_next(target)


def _say_next(labels: Path) -> None:
    root = shlex.quote(str(data_folder(labels)))
    print(f'next:    mmslak new-config {root} --out my.py')
