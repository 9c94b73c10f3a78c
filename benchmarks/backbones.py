"""Whole backbones: SLaK and what it is compared with, as ratios of medians of one run.

Examples:
    python benchmarks/backbones.py --out    # benchmarks/results/MACHINE/backbones_cpu.json
    python benchmarks/backbones.py --default-allocator --out
    python benchmarks/backbones.py --device cuda --dtype bfloat16 --forward 16 512 \\
        --training 16 512 --out

Each backbone is the one of its UperNet config. Forward is in eval mode without gradients; a
training step is forward and backward of the mean of all outputs in train mode, without the
optimizer. A dtype other than float32 is that of autocast. Peak memory is that of a process of its
own. "SLaK-T, authors' fallback" is what the authors' code runs where their CUDA extension is not
built: every large kernel by nn.Conv2d in NCHW. "In NHWC" is what a careful user has.
"""

import argparse
import copy
import multiprocessing
import resource
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from options import LAYOUTS, facts, new_parser, out_file, parse
from timing import medians, print_targets, save
from torch import nn

import mmslak  # noqa: F401  (configs of the task libraries, CPU-only torchvision)
from mmslak.models.slak import LargeKernelConv2d
from mmslak.ops import DepthwiseConv2d, tuning

ROOT = Path(__file__).parents[1]
REFERENCE = 'ConvNeXt-T'
# Ratios, in the order in which they are printed.
TO_NCHW = f'× the time of {REFERENCE}, both in NCHW'
TO_BEST = f'× the time of {REFERENCE}, best layout'
BEST_TO_BEST = f'× the time of {REFERENCE}, both in their best layouts'
MEMORY = f'× the peak memory of {REFERENCE}'
TO_NATIVE = '× the time of the native backend'
MEMORY_TO_NATIVE = '× the peak memory of the native backend'
ADDED_TO_NATIVE = '× what the native backend adds to the memory before the call'


@dataclass(frozen=True)
class Backbone:
    """Where a backbone is from and what is changed in it."""

    config: str
    changes: dict = field(default_factory=dict)
    deployed: bool = False
    plain: str | None = None  # layout in which nn.Conv2d evaluates the large kernels, in our place

    def build(self) -> nn.Module:
        """The backbone with random weights."""
        cfg = Config.fromfile(ROOT / 'configs' / self.config).model.backbone
        cfg.update(init_cfg=None, **self.changes)
        model = MODELS.build(cfg)
        if self.deployed:
            model.eval()  # mmpretrain's eval() returns None: no chaining
            model.switch_to_deploy()
        if self.plain:
            _use_plain_convolutions(model, LAYOUTS[self.plain])
        return model


def _use_plain_convolutions(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Turns every `DepthwiseConv2d` into the nn.Conv2d that it is derived from.

    Args:
        model: SLaK.
        memory_format: In which the maps come to the large kernels.
    """
    for module in model.modules():
        if isinstance(module, LargeKernelConv2d):
            module.register_forward_pre_hook(
                lambda _, inputs: (inputs[0].contiguous(memory_format=memory_format),)
            )
        elif type(module) is DepthwiseConv2d:
            module.__class__ = nn.Conv2d


CONVNEXT_T, SLAK_T = 'upernet_convnext_t_ade20k.py', 'upernet_slak_t_ade20k.py'
BACKBONES = {
    REFERENCE: Backbone(CONVNEXT_T),
    'Swin-T': Backbone('upernet_swin_t_ade20k.py'),
    'RepLKNet-31B': Backbone('upernet_replknet_31b_ade20k.py'),
    'SLaK-T': Backbone(SLAK_T),
    'SLaK-T, native': Backbone(SLAK_T, dict(conv_backend='native')),
    "SLaK-T, authors' fallback": Backbone(SLAK_T, plain='NCHW'),
    'SLaK-T, nn.Conv2d in NHWC': Backbone(SLAK_T, plain='NHWC'),
    'SLaK-T, deployed': Backbone(SLAK_T, deployed=True),
    'SLaK-S': Backbone('upernet_slak_s_ade20k.py'),
    'SLaK-B': Backbone('upernet_slak_b_ade20k.py'),
    'PeLK-T': Backbone('upernet_pelk_t_ade20k.py'),
    'PeLK-T-101': Backbone(
        'upernet_pelk_t_ade20k.py', dict(kernel_sizes=(101, 69, 67, 13), center=7)
    ),
}
TINY = dict(arch=dict(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8]))
QUICK = {
    REFERENCE: Backbone(CONVNEXT_T, dict(arch=dict(depths=[1, 1, 1, 1], channels=[8, 8, 8, 8]))),
    'SLaK-T': Backbone(SLAK_T, TINY),
    'SLaK-T, native': Backbone(SLAK_T, dict(TINY, conv_backend='native')),
    "SLaK-T, authors' fallback": Backbone(SLAK_T, TINY, plain='NCHW'),
    'SLaK-T, deployed': Backbone(SLAK_T, TINY, deployed=True),
}


def operation(
    model: nn.Module, shape: tuple[int, ...], layout: str, training: bool, args: argparse.Namespace
) -> Callable[[], None]:
    """A call that runs the model once on random images."""
    memory_format = LAYOUTS[layout]
    model.to(device=args.device, memory_format=memory_format)
    images = torch.randn(shape, device=args.device).contiguous(memory_format=memory_format)
    half = args.dtype != torch.float32
    amp = torch.autocast(args.device.type, args.dtype) if half else nullcontext()

    def forward() -> None:
        with torch.no_grad(), amp:
            model(images)

    def step() -> None:
        with amp:
            loss = sum(output.float().mean() for output in model(images))
        loss.backward()
        model.zero_grad(set_to_none=True)

    model.train(training)
    return step if training else forward


def measure(
    backbones: dict[str, Backbone], training: bool, args: argparse.Namespace
) -> dict[str, dict]:
    """Median milliseconds by name and layout, all models in one process and in turns."""
    shape, calls = images(training, args), {}
    for name, backbone in backbones.items():
        model = backbone.build()
        for layout in LAYOUTS:
            calls[name, layout] = operation(copy.deepcopy(model), shape, layout, training, args)
    for call in calls.values():
        call()  # measures the choices
    times = medians(calls, args.device, args.rounds, args.budget)
    return {name: {layout: times[name, layout] for layout in LAYOUTS} for name in backbones}


def images(training: bool, args: argparse.Namespace) -> tuple[int, ...]:
    """Shape of the input."""
    batch, side = args.training if training else args.forward
    return batch, 3, side, side


def peak_memory(backbone: Backbone, training: bool, args: argparse.Namespace) -> dict[str, float]:
    """Peak MiB of this process, which has run nothing else, and how far it is above its start."""
    if args.threads:
        torch.set_num_threads(args.threads)
    tuning('off' if args.tuning == 'off' else 'read')  # what was measured for the times
    call = operation(backbone.build(), images(training, args), 'NCHW', training, args)
    if args.device.type == 'cuda':
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated()
    else:
        statm = Path('/proc/self/statm').read_text().split()
        before = int(statm[1]) * resource.getpagesize()
        call()
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(peak=peak / 2**20, above_start=(peak - before) / 2**20)


def peak_memories(
    backbones: dict[str, Backbone], training: bool, args: argparse.Namespace
) -> dict[str, dict]:
    """`peak_memory` by name, each in a new process: forked from one that has imported only."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['mmslak', 'mmpretrain.models'])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return {
            name: pool.apply(peak_memory, (backbone, training, args))
            for name, backbone in backbones.items()
        }


def compare(times: dict[str, dict], memory: dict[str, dict]) -> dict[str, dict]:
    """Ratios to the reference, and those of SLaK-T to its native backend, by backbone."""
    reference, native = times[REFERENCE], 'SLaK-T, native'
    rows = {}
    for name, by_layout in times.items():
        rows[name] = {
            TO_NCHW: by_layout['NCHW'] / reference['NCHW'],
            TO_BEST: by_layout['NCHW'] / min(reference.values()),
            BEST_TO_BEST: min(by_layout.values()) / min(reference.values()),
            MEMORY: memory[name]['peak'] / memory[REFERENCE]['peak'],
        }
    if 'SLaK-T' in times and native in times:
        rows['SLaK-T'] |= {
            TO_NATIVE: times['SLaK-T']['NCHW'] / times[native]['NCHW'],
            MEMORY_TO_NATIVE: memory['SLaK-T']['peak'] / memory[native]['peak'],
            ADDED_TO_NATIVE: memory['SLaK-T']['above_start'] / memory[native]['above_start'],
        }
    return rows


def targets(ratios: dict[str, dict]) -> list[dict]:
    """What we want to reach on a CPU, what we reach."""
    reached = []
    for ratio, bound in ((TO_NCHW, 1.9), (MEMORY_TO_NATIVE, 1.5)):
        for operation, by_name in ratios.items():
            value = by_name.get('SLaK-T', {}).get(ratio)
            if value is not None:
                reached.append(
                    dict(
                        case='SLaK-T',
                        operation=operation,
                        target=f'at most {bound} {ratio}',
                        value=value,
                        met=value <= bound,
                    )
                )
    return reached


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__, rounds=7, budget=5.0)
    shape = dict(type=int, nargs=2, metavar=('BATCH', 'SIDE'))
    parser.add_argument('--forward', default=(1, 512), help='[1 512]', **shape)
    parser.add_argument('--training', default=(2, 256), help='[2 256]', **shape)
    parser.add_argument('--backbones', nargs='+', choices=BACKBONES, help='[all]')
    args = parse(parser, argv)
    backbones = BACKBONES
    if args.quick:
        backbones = QUICK
        args.forward, args.training, args.rounds = (1, 64), (2, 64), 1
    if args.backbones:
        backbones = {n: b for n, b in backbones.items() if n in (REFERENCE, *args.backbones)}
    result = facts(args)
    result |= dict(reference=REFERENCE, shapes={}, ratios={}, milliseconds={}, mebibytes={})
    for operation, training in (('forward', False), ('training', True)):
        models = {n: b for n, b in backbones.items() if not (training and b.deployed)}
        times = measure(models, training, args)
        memory = peak_memories(models, training, args)
        ratios = compare(times, memory)
        result['shapes'][operation] = images(training, args)
        result['ratios'][operation] = ratios
        result['milliseconds'][operation] = times
        result['mebibytes'][operation] = memory
        print(f'\n{operation}, {"×".join(map(str, images(training, args)))}')
        for name, row in ratios.items():
            by_layout = ', '.join(f'{layout} {ms:.0f} ms' for layout, ms in times[name].items())
            words = '; '.join(f'{value:.2f} {ratio}' for ratio, value in row.items())
            print(f'  {name:18} {by_layout}; {words}', flush=True)
    result['targets'] = targets(result['ratios']) if args.device.type == 'cpu' else []
    print()
    print_targets(result['targets'])
    save(result, out_file(args, 'backbones'))


if __name__ == '__main__':
    main()
