"""Draws what a config's pipeline yields: pictures after all its transforms, with their labels.

What the model's data_preprocessor does to whole batches, such as mixup, is not in the pictures.

Examples:
    mmslak browse mmslak::upernet_slak_t_ade20k --count 20
    mmslak browse configs/faster_rcnn_slak_t_voc07.py --split val --out work_dirs/val_samples
"""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import mmcv
import numpy as np
from mmengine.registry import VISUALIZERS, init_default_scope
from rich.console import Console
from rich.progress import track
from torch import Tensor

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
from mmslak.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak browse`."""
    parser = command_parser('browse', __doc__)
    add_config(parser)
    parser.add_argument('--split', choices=['train', 'val', 'test'], default='train')
    parser.add_argument(
        '--count', type=int, default=20, help='samples, spread evenly over the data [%(default)s]'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/browse'), help='folder [%(default)s]'
    )
    add_cfg_options(parser, 'data_root=/data/ade')
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f'--count: expected a number from 1, got {args.count}')
    cfg = read_with_options(args.config, args.cfg_options)
    loader = f'{args.split}_dataloader'
    if not cfg.get(loader) or not cfg.get('visualizer'):
        raise UserError(f'config {args.config} has no {loader} or no visualizer')
    check_datasets(cfg, [loader])
    check_output(args.out, folder=True)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    dataset = build_dataset(cfg, loader)
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, name='browse', vis_backends=None))
    visualizer.dataset_meta = dataset.metainfo
    unscaled = has_unscaled_labels(dataset)
    count = min(args.count, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    for index in track(chosen, loader, console=Console(stderr=True)):
        packed = dataset[index]
        picture, sample = picture_of(packed['inputs']), packed['data_samples']
        if unscaled:
            picture = mmcv.imresize(picture, sample.ori_shape[1::-1])
        stem = Path(sample.metainfo.get('img_path') or 'sample').stem
        draw(visualizer, picture, sample, args.out / f'{index:06d}_{stem}.png')
    print(f'{count} of {len(dataset)} samples: {args.out}')


def has_unscaled_labels(dataset: object) -> bool:
    """Whether labels are loaded after the picture is resized, as for validation."""
    transforms = getattr(next(innermost(dataset)).pipeline, 'transforms', ())
    names = [type(transform).__name__ for transform in transforms]
    before = list(takewhile(lambda name: 'Annotations' not in name, names))
    return len(before) < len(names) and any('Resize' in name for name in before)


def picture_of(inputs: Tensor) -> np.ndarray:
    """Turns the picture that a pipeline packs into one that visualizers take.

    Args:
        inputs: (3 or 1, H, W), in BGR, as mmcv loads pictures.

    Returns:
        (H, W, 3) uint8, in RGB.

    Raises:
        UserError: If the pipeline yields something else.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 3 or len(inputs) not in (1, 3):
        what = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise UserError(f'the pipeline yields {what}: expected pictures of (3 or 1, H, W)')
    picture = inputs.flip(0).expand(3, -1, -1).permute(1, 2, 0)
    return np.ascontiguousarray(picture.clamp(0, 255).byte().numpy())


def draw(visualizer: object, picture: np.ndarray, sample: object, path: Path) -> None:
    """Writes a picture with its labels, by the visualizer of the config's library."""
    if hasattr(visualizer, 'visualize_cls'):  # mmpretrain's
        visualizer.visualize_cls(picture, sample, draw_pred=False, out_file=str(path))
        return
    instances = sample.get('gt_instances')
    if hasattr(getattr(instances, 'bboxes', None), 'tensor'):  # mmdet's boxes
        instances.bboxes = instances.bboxes.tensor
    visualizer.add_datasample(path.stem, picture, sample, draw_pred=False, out_file=str(path))
