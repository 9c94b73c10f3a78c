"""Effective receptive fields of backbones: matrices, one figure, high-contribution area ratios.

Any backbone of any mmseg, mmdet or mmpretrain config. Protocol of the large-kernel papers: the
gradient of the summed, rectified centre of the last feature map with respect to the picture,
rectified, summed over channels, averaged over pictures (the papers take 50 validation pictures at
1024×1024); then log10(x + 1), divided by the maximum; the area ratio is that of the smallest
centred square which holds more than 20, 30, 50, 99 % of the sum.

Example:
    mmslak erf configs/upernet_slak_t_ade20k.py checkpoints/slak_tiny_in1k.pth \\
        configs/upernet_convnext_t_ade20k.py none --images data/ade/images/validation

CHECKPOINT may be of the whole model or of its backbone; `none` takes random weights.
"""

import argparse
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmslak.analysis import (
    THRESHOLDS,
    contribution_scores,
    effective_receptive_field,
    high_contribution_area,
)
from mmslak.analysis.pictures import draw_receptive_fields
from mmslak.apis.model import (
    build_backbone,
    default_device,
    normalisation,
    read_model_config,
    read_picture,
)
from mmslak.cli.parser import (
    add_cfg_options,
    check_output,
    command_parser,
    model_names,
    model_pairs,
    one_line_errors,
    pictures,
)
from mmslak.datasets.findings import of
from mmslak.datasets.samples import PICTURE_SUFFIXES
from mmslak.errors import UserError

# Photographs in the wheel of scikit-image; its others would have to be downloaded.
PHOTOGRAPHS = ('astronaut', 'brick', 'camera', 'chelsea', 'coffee', 'coins', 'grass', 'gravel')
PHOTOGRAPHS += ('hubble_deep_field', 'ihc', 'moon', 'motorcycle_left', 'retina', 'rocket')


def pictures_or_photographs(folder: str | None, count: int) -> list[Path]:
    """Files to average over: the first `count` of a folder, or what scikit-image ships.

    Raises:
        UserError: If there are none.
    """
    if folder is not None:
        return pictures(folder, count)
    files = photographs()[:count]
    if not files:
        raise UserError(
            'without --images the pictures of scikit-image are used, which is not installed or has '
            'none: give --images DIR, or pip install scikit-image'
        )
    print(
        f'No --images: taking {len(files)} photographs that scikit-image ships '
        '(the papers take 50 validation pictures)'
    )
    return files


def photographs() -> list[Path]:
    """The photographs that scikit-image ships; none if it is not installed."""
    found = importlib.util.find_spec('skimage')
    if found is None:
        return []
    data = Path(found.origin).parent / 'data'
    return sorted(
        p for p in data.glob('*') if p.stem in PHOTOGRAPHS and p.suffix in PICTURE_SUFFIXES
    )


def inputs(
    files: list[Path], size: tuple[int, int], norm: dict, device: str, unreadable: dict[Path, str]
) -> Iterator[Tensor]:
    """The pictures as the model takes them, behind a progress bar.

    An unreadable picture is left out, reported once, and kept in `unreadable` with the reason.

    Raises:
        UserError: If none can be read.
    """
    console = Console(stderr=True)
    for path in track(files, description='pictures', console=console):
        try:
            picture = read_picture(path, size, norm)
        except UserError as error:
            if path not in unreadable:
                unreadable[path] = str(error)
                console.print(f'left out: {error}', markup=False, highlight=False, soft_wrap=True)
            continue
        yield picture.to(device)
    if len(unreadable) == len(files):
        first = next(iter(unreadable.values()))
        raise UserError(f'none of {len(files)} pictures can be read: {first}')


def file_stem(name: str) -> str:
    return re.sub(r'[^0-9A-Za-z_.-]+', '_', name)


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak erf`."""
    parser = command_parser('erf', __doc__)
    parser.add_argument(
        'models', nargs='+', metavar='CONFIG CHECKPOINT', help='one or several models'
    )
    parser.add_argument('--images', help='folder of pictures [those that scikit-image ships]')
    parser.add_argument('--count', type=int, default=50, help='pictures at most [50]')
    parser.add_argument(
        *('--size', '--shape'),
        type=int,
        nargs=2,
        default=(1024, 1024),
        metavar=('H', 'W'),
        help='size of the inputs [1024 1024]',
    )
    parser.add_argument('--stage', type=int, help="stage from 0 [the config's last output]")
    parser.add_argument('--names', nargs='+', help='titles of the models in figure and files')
    parser.add_argument(
        '--device', default=default_device(), help='cpu, cuda, cuda:1 … [%(default)s]'
    )
    parser.add_argument('--out', default='work_dirs/erf', help='folder of results [%(default)s]')
    add_cfg_options(parser)
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    pairs = model_pairs(parser, args)
    if args.count < 1 or min(args.size) < 1:
        parser.error('--count and --size: expected positive numbers')

    names = model_names(pairs, args.names, as_shown=file_stem)
    configs = [read_model_config(config, args.cfg_options) for config, _ in pairs]
    files = pictures_or_photographs(args.images, args.count)
    out = Path(args.out)
    check_output(out, folder=True)
    # Bad input stops before the first long computation.
    backbones = [
        build_backbone(cfg, checkpoint, args.stage, args.device)
        for cfg, (_, checkpoint) in zip(configs, pairs, strict=True)
    ]

    matrices, report, unreadable = {}, {}, {}
    for name, cfg, backbone in zip(names, configs, backbones, strict=True):
        norm = normalisation(cfg)
        try:
            found = effective_receptive_field(
                backbone, inputs(files, tuple(args.size), norm, args.device, unreadable)
            )
            areas = high_contribution_area(contribution_scores(found.matrix))
        except (RuntimeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f'{name}: {error}') from error
        matrices[name] = found.matrix
        np.save(out / f'{file_stem(name)}.npy', found.matrix.numpy())
        ratios = {f'{t:.0%}': area.ratio for t, area in zip(THRESHOLDS, areas)}
        report[name] = dict(
            area_ratios=ratios,
            pictures=found.used,
            skipped=found.skipped,
            unreadable=[str(path) for path in unreadable],
        )
        left_out = f', {found.skipped} skipped for NaN' if found.skipped else ''
        left_out += f', {len(unreadable)} unreadable' if unreadable else ''
        print(
            f'{name}: area ratios ' + ', '.join(f'{t} {r:.2%}' for t, r in ratios.items()),
            f'({of(found.used, "picture")} of {args.size[0]}×{args.size[1]}{left_out})',
        )
    draw_receptive_fields(matrices, out / 'erf.png')
    (out / 'erf.json').write_text(json.dumps(report, indent=2) + '\n', encoding='utf-8')
    print(f'Figure: {out / "erf.png"}; matrices and ratios: {out}')
