"""Draws samples of a config's data as the model gets them: after all transforms, with their labels.

Examples:
    mmslak browse mmslak::upernet_slak_t_ade20k --count 20
    mmslak browse configs/faster_rcnn_slak_t_voc07.py --split val --out work_dirs/val_samples
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.registry import DATASETS, VISUALIZERS, init_default_scope
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmslak.apis.config import check_scope, read_config
from mmslak.apis.options import apply_options
from mmslak.cli.config_checks import check_datasets
from mmslak.cli.parser import (
    add_cfg_options,
    add_config,
    check_output,
    command_parser,
    one_line_errors,
)
from mmslak.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak browse`."""
    parser = command_parser('browse', __doc__)
    add_config(parser)
    parser.add_argument('--split', choices=['train', 'val', 'test'], default='train')
    parser.add_argument('--count', type=int, default=20, help='samples [20], spread over all')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/browse'), help='folder [%(default)s]'
    )
    add_cfg_options(parser, 'data_root=/data/ade')
    return parser


def picture_of(inputs: Tensor) -> np.ndarray:
    """(3 or 1, H, W) as pipelines pack it, in mmcv's order BGR, to (H, W, 3), RGB, uint8."""
    array = inputs.numpy().transpose(1, 2, 0)[..., ::-1]
    return (
        np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
        .clip(0, 255)
        .astype(np.uint8)
    )


def draw(visualizer: object, picture: np.ndarray, sample: object, path: Path) -> None:
    """Writes a picture with its labels on it."""
    meta = visualizer.dataset_meta
    if hasattr(visualizer, 'visualize_cls'):
        shown = visualizer.visualize_cls(picture, sample, classes=meta.get('classes'))
        import mmcv

        mmcv.imwrite(shown[..., ::-1], str(path))
        return
    visualizer.add_datasample(
        path.stem, picture, sample, draw_gt=True, draw_pred=False, show=False, out_file=str(path)
    )


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error('--count: expected a number from 1')
    cfg = read_config(args.config)
    apply_options(cfg, args.cfg_options)
    check_scope(cfg)
    loader = f'{args.split}_dataloader'
    if not cfg.get(loader) or not cfg.get('visualizer'):
        raise UserError(f'config {args.config} has no {loader} or no visualizer')
    check_datasets(cfg, [loader])
    check_output(args.out, folder=True)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    dataset = DATASETS.build(cfg[loader].dataset)
    visualizer = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = dataset.metainfo
    chosen = np.linspace(0, len(dataset) - 1, min(args.count, len(dataset))).round().astype(int)
    for index in track(chosen.tolist(), loader, console=Console(stderr=True)):
        sample = dataset[index]
        file = Path(sample['data_samples'].metainfo.get('img_path', f'{index}.jpg'))
        picture = picture_of(sample['inputs'])
        draw(visualizer, picture, sample['data_samples'], args.out / f'{index:06d}_{file.stem}.png')
    print(f'{len(chosen)} of {len(dataset)} samples: {args.out}')
