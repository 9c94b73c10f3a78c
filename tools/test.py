"""Tests a checkpoint on the test set of a config of mmseg, mmdet or mmpretrain."""

import sys
from collections.abc import Sequence

import mmengine

import mmslak  # noqa: F401  before any config: it lets them inherit from `mmseg::…`
from mmslak import checks, cli
from mmslak.checkpoint import read_state_dict


@cli.one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.argument_parser(__doc__)
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
    args = parser.parse_args(argv)

    cfg = cli.load_config(args)
    if cfg.get('test_dataloader') is None:
        raise checks.UserError(f'config {args.config} has no test_dataloader')
    cfg.load_from, cfg.resume = args.checkpoint, False
    remote = '://' in args.checkpoint
    state = None if remote else read_state_dict(args.checkpoint)
    checks.check_datasets(cfg, ['test_dataloader'])
    if args.show or args.show_dir:
        cli.enable_visualization(cfg, args)
    if args.tta:
        cli.enable_tta(cfg)
    if args.out and args.out_item == 'pred':
        cli.set_output(cfg, args.out)
    if args.amp:
        cfg.test_cfg.fp16 = True

    runner = cli.build_runner(cfg)
    if not remote:
        cli.check_fit(runner, args.checkpoint, state)
    scores = runner.test()
    if runner.rank != 0:
        return
    if args.out and args.out_item == 'metrics':
        mmengine.dump(scores, args.out)
    for name, score in scores.items():
        print(f'{name}: {score}')


if __name__ == '__main__':
    sys.exit(main())
