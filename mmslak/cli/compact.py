"""Takes the dead hidden units of a backbone out of a checkpoint.

Outputs stay, up to rounding; the model gets smaller and faster. A hidden unit is dead if what it
reads or what reads it is zero, as sparse training by units leaves it. The command writes OUT and,
beside it, a config (OUT with the suffix .py) with the hidden units that each block has left. The
optimizer's state and the masks of sparse training are not carried over.

Examples:
    mmslak compact work_dirs/run/epoch_300.pth checkpoints/slak_tiny_compact.pth
    mmslak compact work_dirs/run/iter_160000.pth small.pth \\
        --config configs/upernet_convnext_t_ade20k.py
"""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pprint import pformat
from textwrap import indent

from mmengine.config import Config
from torch import Tensor, nn

from mmslak.analysis import Cost, complexity
from mmslak.apis.model import build_backbone, read_model_config, read_once
from mmslak.apis.options import read_with_options
from mmslak.checkpoints.files import count_parameters, publish, save_state_dict
from mmslak.checkpoints.pretrained import hidden_channels_of
from mmslak.cli.complexity import SHAPES
from mmslak.cli.parser import check_output, command_parser, one_line_errors
from mmslak.errors import UserError
from mmslak.fileio.atomic import write_atomically
from mmslak.models.teacher import is_distilled
from mmslak.sparsity import HiddenLayer, compact_state, find_hidden_layers, find_in_state, narrow_

WRAPPER = 'mmslak.CompactBackbone'  # of other families' backbones
WRITTEN = '"""What mmslak compact has left'  # a config that may be overwritten begins with this


def layers_of(
    args: argparse.Namespace, state: dict[str, Tensor], prefix: str, backbone: nn.Module | None
) -> list[HiddenLayer]:
    """The hidden layers of the backbone, by the names of the file.

    Raises:
        UserError: If there are none.
    """
    if backbone is None:
        found = find_in_state(state, prefix)
        if not found:
            raise UserError(f'{args.source}: no hidden layers with names that are known')
        return found
    try:
        found = find_hidden_layers(backbone)
    except ValueError as error:
        raise UserError(f'{args.config}: {error}') from error
    return [replace(one, first=prefix + one.first, second=prefix + one.second) for one in found]


def cost(backbone: nn.Module, cfg: Config) -> tuple[str, Cost]:
    """The size of the picture, and what the backbone costs for it."""
    shape = SHAPES.get(cfg.get('default_scope'), SHAPES['mmpretrain'])
    return '×'.join(map(str, shape)), complexity(backbone, shape).total


def config_text(
    args: argparse.Namespace,
    state: dict[str, Tensor],
    prefix: str,
    widths: Sequence[int],
    cfg: Config | None,
    distilled: bool,
) -> str:
    """The config with the hidden units that are left; of a model with a teacher, without it."""
    base, model, inner = '', {}, {} if cfg is None else cfg.model.backbone.to_dict()
    if cfg is not None:
        file = args.config
        if '::' not in file:
            file = Path(os.path.relpath(file, args.target.parent)).as_posix()
        base = f'_base_ = [{file!r}]\n\n'
    backbone = backbone_settings(args.target, state, prefix, widths, inner)
    ours = backbone.get('type') != WRAPPER
    if distilled:  # the whole student in the place of what it is inside of
        model = dict(_delete_=True, **cfg.model.to_dict())
        del model['backbone']
        backbone = inner | backbone if ours else backbone
    elif ours and 'init_cfg' in inner:
        # In its place: a dict does not merge with None, and use_ema would not suit this file.
        backbone['init_cfg'] = dict(_delete_=True, **backbone['init_cfg'])
    elif not ours and inner:
        backbone = dict(_delete_=True, **backbone)
    return (
        f'{WRITTEN} of the hidden units, for the config of the model."""\n\n'
        f'{base}model = dict(\n{_arguments(model, 4)}'
        f'    backbone=dict(\n{_arguments(backbone, 8)}    )\n)\n'
    )


def backbone_settings(
    target: Path, state: dict[str, Tensor], prefix: str, widths: Sequence[int], inner: dict
) -> dict:
    """What the config says of the backbone: ours changes its settings, others are wrapped.

    Args:
        target: The file of the weights.
        state: The weights.
        prefix: Of the backbone's names in it.
        widths: Hidden units of each layer that are left.
        inner: The backbone's config; empty if it is not known.
    """
    init_cfg = dict(type='Pretrained', checkpoint=str(target))
    if prefix:
        init_cfg['prefix'] = prefix
    if any(re.match(re.escape(prefix) + r'stages\.\d+\.\d+\.large_kernel\.', n) for n in state):
        return dict(hidden_channels=hidden_channels_of(state, prefix), init_cfg=init_cfg)
    backbone = dict(type=WRAPPER, hidden_channels=list(widths))
    if inner.get('type') == WRAPPER:  # the config is of what compact has left before
        inner = inner['backbone']
    if inner:
        backbone['backbone'] = inner | dict(init_cfg=init_cfg)
    return backbone


def _arguments(settings: dict, column: int) -> str:
    """Settings as arguments of `dict`, one on a line."""
    lines = ''
    for key, value in settings.items():
        text = pformat(value, width=99 - column - len(key), compact=True, sort_dicts=False)
        lines += ' ' * column + f'{key}={indent(text, " " * (column + len(key) + 1)).lstrip()},\n'
    return lines


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak compact`."""
    parser = command_parser('compact', __doc__)
    parser.add_argument('source', metavar='CHECKPOINT', help='checkpoint of any run, or any file')
    parser.add_argument(
        'target', type=Path, metavar='OUT', help='file to write: .pth or .safetensors'
    )
    parser.add_argument(
        '--config',
        help='config of the model: its multiplications are counted; and it says what dead units of '
        'other backbones than SLaK and PeLK are as constants, which stay otherwise',
    )
    parser.add_argument('--use-ema', action='store_true', help='take the averaged weights')
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_output(args.target)
    config = args.target.with_suffix('.py')
    if config.exists() and not config.read_text().startswith(WRITTEN):
        raise UserError(f'{config} would be overwritten: name another OUT')
    with read_once(args.source):
        state = publish(args.source, args.use_ema)
        prefix = 'backbone.' if any(name.startswith('backbone.') for name in state) else ''
        given = read_with_options(args.config) if args.config else None
        cfg = read_model_config(given) if given else None
        backbone = build_backbone(cfg, args.source) if cfg else None
    layers = layers_of(args, state, prefix, backbone)
    compact, left = compact_state(state, layers)
    before = [len(state[f'{layer.first}.weight']) for layer in layers]
    widths = [left[layer.first] for layer in layers]
    if widths == before:
        raise UserError(
            f'{args.source}: nothing to take out, for none of the {sum(before):,} hidden units of '
            f'its {len(layers)} hidden layers is dead'
        )
    save_state_dict(compact, args.target)
    distilled = given is not None and is_distilled(given.model)
    text = config_text(args, compact, prefix, widths, cfg, distilled)
    write_atomically(config, text.encode())

    print(f'hidden units: {sum(before):,}, {sum(widths):,} left, in {len(layers)} layers')
    for what, weights in (('before', state), ('left', compact)):
        dense, nonzero = count_parameters(weights)
        print(f'weights {what}: {dense:,}, {nonzero:,} of them non-zero')
    if backbone is not None:
        size, one = cost(backbone, cfg)
        narrow_(backbone, widths)
        inside = {n.removeprefix(prefix): t for n, t in compact.items() if n.startswith(prefix)}
        backbone.load_state_dict(inside, strict=False)
        _, other = cost(backbone, cfg)
        for what, macs in (('before', one), ('left', other)):
            print(
                f'multiplications {what}: {macs.macs / 1e9:.2f} G, {macs.nonzero_macs / 1e9:.2f} G '
                f'of them with non-zero weights (the backbone at {size})'
            )
    print(f'{args.target}: the weights alone, without optimizer and masks; {config}: its config')
