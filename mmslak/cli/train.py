"""Trains the model of a config of mmseg, mmdet or mmpretrain."""

import argparse
from collections.abc import Sequence

from mmslak.apis.run_length import set_iterations
from mmslak.checkpoints.files import read_state_dict
from mmslak.checkpoints.whole_model import check_fit
from mmslak.cli import census
from mmslak.cli.config_checks import check_datasets, check_pretrained, check_schedules
from mmslak.cli.parser import add_config, add_run_arguments, command_parser, one_line_errors
from mmslak.cli.runner import (
    build_runner,
    check_amp,
    enable_amp,
    enable_auto_scale_lr,
    enable_rehearsal,
    enable_survival,
    load_config,
    set_resume,
    take_first_census,
)
from mmslak.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak train`."""
    parser = command_parser('train', __doc__)
    add_config(parser)
    add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or from the newest intact one in the work folder',
    )
    parser.add_argument(
        '--on-bad-sample',
        choices=['error', 'skip', 'warn'],
        help='at a picture or annotation that cannot be read or would teach wrong labels: stop '
        '[default]; leave it out and list it in the work folder, up to 5 of them or 1 %%; or only '
        'warn',
    )
    parser.add_argument(
        '--iterations',
        type=int,
        metavar='N',
        help='train for N iterations, with the whole schedule in proportion, then validate and '
        'save; the work folder is another one, work_dirs/CONFIG_short',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over auto_scale_lr.base_batch_size',
    )
    parser.add_argument(
        '--no-validate', action='store_true', help='do not evaluate during training'
    )
    parser.add_argument(
        '--no-rehearsal',
        action='store_true',
        help='do not run two batches through the validation before the first iteration',
    )
    parser.add_argument(
        '--no-census',
        action='store_true',
        help='do not count classes, pictures and objects of the data before the first iteration',
    )
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.iterations is not None and args.iterations < 1:
        parser.error(f'--iterations: expected a number from 1, got {args.iterations}')

    cfg = load_config(args)
    if cfg.get('train_dataloader') is None:
        raise UserError(f'config {args.config} has no train_dataloader')
    if args.iterations is not None:
        set_iterations(cfg, args.iterations)
        if args.work_dir is None:  # --resume of the real run must not find these checkpoints
            cfg.work_dir = f'{cfg.work_dir.rstrip("/")}_short'
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    check_amp(cfg)
    enable_survival(cfg, args.on_bad_sample)
    enable_rehearsal(cfg, not args.no_rehearsal)
    set_resume(cfg, args.resume)
    check_pretrained(cfg)
    check_schedules(cfg)
    loaders = ['train_dataloader', 'val_dataloader']
    check_datasets(cfg, loaders)
    counted = [] if args.no_census else take_first_census(cfg, loaders)
    runner = build_runner(cfg)
    census.log(counted, runner.logger)
    if cfg.get('resume') and cfg.get('load_from') and '://' not in cfg.load_from:
        check_fit(runner.model, cfg.load_from, read_state_dict(cfg.load_from))
    runner.train()
    census.remind(counted, runner.logger)
