"""The demo of hidden units, on a laptop's CPU: the same zeros, as single weights and as units.

From `mmslak run-demo` it takes a small SLaK that has learnt digits with 40 % of its weights at
zero, and UperNet on it. It trains the same once more with as many zeros, most of them in whole
hidden units, takes these out (`mmslak compact`), and trains UperNet on the smaller backbone. Exit
status 1 says that a score missed its bar, 2 that a step failed.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

import mmslak
from mmslak.apis.inference import init_model
from mmslak.checkpoints.files import count_parameters, read_state_dict
from mmslak.cli.demo_page import Part, write_page
from mmslak.cli.parser import one_line_errors
from mmslak.cli.run_demo import (
    BARS,
    DIGITS,
    QUICK_DIGITS,
    QUICK_SCENES,
    SCENES,
    call,
    demo_parser,
    digest,
    draw,
    go_on,
    judge,
    options,
    parse,
    pretrain,
    train_and_test,
)

NEURON_DIGITS = 'mmslak::demo/slak_neuron_digits.py'
QUICK_NEURON_DIGITS = [*QUICK_DIGITS, 'custom_hooks.0.structure.until=0.9']
SHAPE = (4, 3, 160, 160)  # what is timed
ROUNDS = 21


def milliseconds(models: Mapping[str, nn.Module], shape: Sequence[int]) -> dict[str, float]:
    """Median time of a call of each model in eval mode; they take turns."""
    images, times = torch.randn(*shape), {name: [] for name in models}
    with torch.no_grad():
        for turn in range(1 + ROUNDS):
            for name, model in models.items():
                start = time.perf_counter()
                model(images)
                if turn:  # the first call measures convolutions
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(several) for name, several in times.items()}


def take_out(checkpoint: Path, small: Path, log: Path) -> list[list[int]]:
    """Writes a checkpoint without its dead hidden units; returns how many each block keeps."""
    print('  ' + call('compact', [str(checkpoint), str(small)], log).splitlines()[0])
    return Config.fromfile(small.with_suffix('.py')).model.backbone.hidden_channels


def widths_option(widths: list[list[int]]) -> str:
    """The option of `--cfg-options` for a backbone with so many hidden units."""
    return f'model.backbone.hidden_channels={widths}'.replace(' ', '')


def backbone_weights(checkpoint: Path) -> str:
    """How many weights the backbone of a checkpoint has, and how many are not zero."""
    state = read_state_dict(checkpoint)
    dense, nonzero = count_parameters({n: t for n, t in state.items() if n.startswith('backbone.')})
    return f'{dense:,} weights, {nonzero:,} of them non-zero'


def run(args: argparse.Namespace) -> dict[str, float]:
    """Runs all steps and returns the scores in percent."""
    checkpoint, accuracy, stamp = pretrain(args, steps=6)
    scenes = options(args, 'ade', QUICK_SCENES)

    print('Step 3 of 6: UperNet on scenes, from that backbone (1.5 to 4.5 minutes)', flush=True)
    plain_dir, metrics = args.work_dir / 'upernet_pretrained', ['mIoU']
    from_plain = [*scenes, f'checkpoint={checkpoint}']
    plain_stamp = digest(stamp, checkpoint.read_bytes())
    plain, (miou,) = train_and_test(SCENES, plain_dir, from_plain, metrics, plain_stamp)

    print(
        'Step 4 of 6: the same backbone loses 40 % of its hidden units while it learns digits '
        '(1.5 to 4.5 minutes)',
        flush=True,
    )
    sparse, (neuron_accuracy,) = train_and_test(
        NEURON_DIGITS,
        args.work_dir / 'slak_neuron_digits',
        options(args, 'cls', QUICK_NEURON_DIGITS),
        ['accuracy/top1'],
        stamp,
    )

    print(
        'Step 5 of 6: mmslak compact, then UperNet on what is left (1.5 to 4.5 minutes)', flush=True
    )
    small = args.work_dir / 'slak_compact.pth'
    widths = take_out(sparse, small, args.work_dir / 'compact.log')
    from_small = [*scenes, f'checkpoint={small}', widths_option(widths)]
    compact_dir = args.work_dir / 'upernet_compact'
    small_stamp = digest(stamp, small.read_bytes())
    compact, (compact_miou,) = train_and_test(SCENES, compact_dir, from_small, metrics, small_stamp)

    print('Step 6 of 6: times and pictures (about 20 s)', flush=True)
    change = {'model.backbone.hidden_channels': widths}
    models = {
        'single weights': init_model(SCENES, str(plain), device='cpu'),
        'hidden units': init_model(SCENES, str(compact), device='cpu', cfg_options=change),
    }
    times = milliseconds({name: model.backbone for name, model in models.items()}, SHAPE)
    weights = {'single weights': plain, 'hidden units': compact}
    picture = args.work_dir / 'digit_scenes_compact.png'
    predictions = {
        'zeros in single weights': plain_dir / 'predictions',
        'zeros in hidden units, taken out': compact_dir / 'predictions',
    }
    draw(args.data / 'ade', predictions, picture)

    size = '×'.join(map(str, SHAPE))
    lines = [
        f'Zeros in {name}: the backbone has {backbone_weights(weights[name])}; a forward pass at '
        f'{size} takes {ms:.1f} ms.'
        for name, ms in times.items()
    ]
    part = Part(
        title='Zeros that pay: hidden units',
        scores=[
            ('accuracy on held-out digits, zeros in single weights, %', accuracy, None),
            ('accuracy, zeros in hidden units, %', neuron_accuracy, BARS['accuracy']),
            ('mIoU on held-out scenes, single weights, %', miou, None),
            ('mIoU, hidden units taken out, %', compact_miou, BARS['mIoU']),
        ],
        notes=[*lines, 'Times are those of this machine in one run, the backbones in turns.'],
        pictures={'Held-out scenes: image, truth and predictions': picture},
        files={
            'Checkpoint of the compact backbone': small,
            'Its config': small.with_suffix('.py'),
            'Checkpoint of the segmentor on it': compact,
        },
        commands=[
            go_on(args, 'complexity', DIGITS, str(checkpoint)),
            go_on(args, 'sparsity', str(sparse)),
        ],
        judged=not args.quick,
    )
    page = write_page(args.work_dir, 'compact', part)
    print(f'\nHeld-out digits: accuracy {accuracy:.1f} % (single weights),')
    print(f'                 {neuron_accuracy:.1f} % (hidden units; bar: {BARS["accuracy"]:.0f})')
    print(f'Held-out scenes: mIoU {miou:.1f} % (single weights),')
    print(f'                 {compact_miou:.1f} % (taken out; bar: {BARS["mIoU"]:.0f})')
    print(*lines, sep='\n')
    print(f'Results:         {page}')
    return dict(accuracy=neuron_accuracy, mIoU=compact_miou)


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak run-demo-compact`."""
    return demo_parser('run-demo-compact', __doc__)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(build_parser(), argv)
    print(f'mmslak {mmslak.__version__} demo of hidden units, 5 to 15 minutes on two CPU cores.')
    return judge(run, args, BARS)
