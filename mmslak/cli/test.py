"""Tests a checkpoint on the test set of a config of mmseg, mmdet or mmpretrain."""

import argparse
from collections.abc import Sequence
from numbers import Real

import mmengine

from mmslak.apis.model import take_student
from mmslak.checkpoints.files import read_checkpoint, read_state_dict
from mmslak.checkpoints.whole_model import check_fit
from mmslak.cli.config_checks import check_datasets
from mmslak.cli.parser import add_config, add_run_arguments, command_parser, one_line_errors
from mmslak.cli.runner import (
    build_runner,
    enable_tta,
    enable_visualization,
    load_config,
    set_output,
)
from mmslak.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak test`."""
    parser = command_parser('test', __doc__)
    add_config(parser)
    add_run_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', help='keep predictions: a folder (mmseg) or a .pkl file (mmdet, mmpretrain)'
    )
    parser.add_argument(
        '--out-item',
        choices=['pred', 'metrics'],
        default='pred',
        help='what goes into --out: predictions, or the scores (.json, .yml, .pkl)',
    )
    parser.add_argument('--show', action='store_true', help='show predictions on screen')
    parser.add_argument('--show-dir', help='folder for pictures of predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds per shown picture')
    parser.add_argument(
        '--interval', type=int, default=1, help='draw every n-th picture (where the hook can)'
    )
    parser.add_argument('--tta', action='store_true', help='augment at test time')
    parser.add_argument(
        '--amp', action='store_true', help='test in mixed precision (test_cfg.fp16)'
    )
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)

    cfg = load_config(args)
    take_student(cfg)
    if cfg.get('test_dataloader') is None:
        raise UserError(f'config {args.config} has no test_dataloader')
    cfg.load_from, cfg.resume = args.checkpoint, False
    remote = '://' in args.checkpoint
    if not remote:
        read_checkpoint(args.checkpoint, keep=True)  # for the runner, which loads it last
        state = read_state_dict(args.checkpoint)
    check_datasets(cfg, ['test_dataloader'])
    if args.show or args.show_dir:
        enable_visualization(cfg, args)
    if args.tta:
        enable_tta(cfg)
    if args.out and args.out_item == 'pred':
        set_output(cfg, args.out)
    if args.amp:
        cfg.test_cfg.fp16 = True

    runner = build_runner(cfg)
    if not remote:
        check_fit(runner.model, args.checkpoint, state)
    scores = runner.test()
    if runner.rank != 0:
        return
    if args.out and args.out_item == 'metrics':
        mmengine.dump(scores, args.out)
    for name, score in scores.items():
        print(f'{name}: {round(score, 4) if isinstance(score, Real) else score}')
