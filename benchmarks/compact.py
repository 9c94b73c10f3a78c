"""SLaK-T without 40 % of its hidden units, against itself whole and ConvNeXt-T, in one run.

Examples:
    python benchmarks/compact.py --out      # benchmarks/results/MACHINE/compact_cpu.json
    python benchmarks/compact.py --share 0.6 --forward 1 224

Each block has lost the same share, as `mmslak compact` would leave it. Forward and training step,
layouts and peak memory are those of benchmarks/backbones.py.
"""

from collections.abc import Sequence
from dataclasses import replace

from backbones import BACKBONES, QUICK, REFERENCE, Backbone, measure, peak_memories
from options import facts, new_parser, out_file, parse
from timing import print_targets, save

WHOLE, COMPACT = 'SLaK-T', 'SLaK-T, compact'
TIME, MEMORY, ADDED = '× the time', '× the peak memory', '× what is added to the memory before'
LAYOUT = 'NCHW'  # of the input; the MLPs are in NHWC at any rate
TARGETS = (  # operation, ratio, to what, at most
    *((operation, TIME, WHOLE, 0.72) for operation in ('forward', 'training')),
    ('training', MEMORY, WHOLE, 0.75),
    ('forward', TIME, REFERENCE, 1.4),
)


def without(whole: Backbone, share: float) -> Backbone:
    """A backbone whose blocks lack a share of their hidden units."""
    model = whole.build()
    widths = [
        [round((1 - share) * 4 * channels)] * depth
        for depth, channels in zip(model.depths, model.channels, strict=True)
    ]
    return replace(whole, changes=whole.changes | dict(hidden_channels=widths))


def compare(times: dict[str, dict], memory: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Ratios of the compact backbone, and of the whole one, to what each is compared with."""
    rows = {}
    for name, others in ((COMPACT, (WHOLE, REFERENCE)), (WHOLE, (REFERENCE,))):
        for other in others:
            rows[f'{name} to {other}'] = {
                TIME: times[name][LAYOUT] / times[other][LAYOUT],
                MEMORY: memory[name]['peak'] / memory[other]['peak'],
                ADDED: memory[name]['above_start'] / memory[other]['above_start'],
            }
    return rows


def targets(ratios: dict[str, dict]) -> list[dict]:
    """What we want to reach, what we reach."""
    reached = []
    for operation, ratio, other, bound in TARGETS:
        case = f'{COMPACT} to {other}'
        value = ratios[operation][case][ratio]
        target = dict(case=case, operation=operation, target=f'at most {bound} {ratio}')
        reached.append(target | dict(value=value, met=value <= bound))
    return reached


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__, rounds=9, budget=10.0)
    shape = dict(type=int, nargs=2, metavar=('BATCH', 'SIDE'))
    parser.add_argument('--forward', default=(1, 512), help='[1 512]', **shape)
    parser.add_argument('--training', default=(2, 256), help='[2 256]', **shape)
    parser.add_argument('--share', type=float, default=0.4, help='of the units gone [%(default)s]')
    args = parse(parser, argv)
    known = BACKBONES
    if args.quick:
        known = QUICK
        args.forward, args.training, args.rounds = (1, 64), (2, 64), 1
    networks = {name: known[name] for name in (REFERENCE, WHOLE)}
    networks[COMPACT] = without(known[WHOLE], args.share)
    result = facts(args) | dict(share=args.share, parameters={}, shapes={}, table={})
    for name, network in networks.items():
        result['parameters'][name] = sum(p.numel() for p in network.build().parameters())
    result |= dict(milliseconds={}, mebibytes={})
    for operation, training in (('forward', False), ('training', True)):
        times = measure(networks, training, args)
        memory = peak_memories(networks, training, args)
        result['shapes'][operation] = args.training if training else args.forward
        result['table'][operation] = rows = compare(times, memory)
        result['milliseconds'][operation], result['mebibytes'][operation] = times, memory
        print(f'\n{operation}, {result["shapes"][operation]}')
        for name, row in rows.items():
            print(f'  {name:32}', ', '.join(f'{value:.2f} {what}' for what, value in row.items()))
    result['targets'] = targets(result['table'])
    print()
    print_targets(result['targets'])
    save(result, out_file(args, 'compact'))


if __name__ == '__main__':
    main()
