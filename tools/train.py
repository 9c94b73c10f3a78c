"""Trains the model of a config of mmseg, mmdet or mmpretrain."""

import sys
from collections.abc import Sequence

import mmslak  # noqa: F401  first: it lets configs inherit from `mmseg::…`
from mmslak import checks, cli
from mmslak.checkpoint import read_state_dict


@cli.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.argument_parser(__doc__)
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
        '[default]; leave it out and list it in the work folder, up to 1 %% of them; or only warn',
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
    args = parser.parse_args(argv)

    cfg = cli.load_config(args)
    if cfg.get('train_dataloader') is None:
        raise checks.UserError(f'config {args.config} has no train_dataloader')
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        cli.enable_amp(cfg)
    if args.auto_scale_lr:
        cli.enable_auto_scale_lr(cfg)
    cli.check_amp(cfg)
    cli.enable_survival(cfg, args.on_bad_sample)
    cli.enable_rehearsal(cfg, not args.no_rehearsal)
    cli.set_resume(cfg, args.resume)
    checks.check_pretrained(cfg)
    checks.check_datasets(cfg, ['train_dataloader', 'val_dataloader'])
    runner = cli.build_runner(cfg)
    if cfg.get('resume') and cfg.get('load_from') and '://' not in cfg.load_from:
        cli.check_fit(runner, cfg.load_from, read_state_dict(cfg.load_from))
    runner.train()


if __name__ == '__main__':
    sys.exit(main())
