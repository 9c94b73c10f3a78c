"""Large depthwise kernels: mmslak.ops against nn.Conv2d and a 7×7, as ratios of medians of one run.

Examples:
    python benchmarks/depthwise.py --out     # benchmarks/results/MACHINE/depthwise_cpu.json
    python benchmarks/depthwise.py --default-allocator --out
    python benchmarks/depthwise.py --device cuda --dtype bfloat16 --batch 16 --out
    python benchmarks/depthwise.py --table   # the fastest backend of every part

A case is a stage of a network: SLaK's three kernels with an output gradient each (as under the norm
of each branch), or one square kernel. "training" is forward plus all gradients. nn.Conv2d is timed
call by call. The authors' fallback is what RepLKNet and SLaK run where their CUDA extension is not
built: the sum of the calls in NCHW. The best layout is what a careful user has: the sum of the
faster of NCHW and NHWC for every single call.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from box_sums import box_sums
from options import LAYOUTS, facts, new_parser, out_file, parse
from timing import medians, print_targets, save
from torch import Tensor
from torch.func import functional_call

from mmslak.ops import (
    BACKENDS,
    depthwise_conv2d_branches,
    depthwise_conv2d_sum,
    merge_kernels,
)

# Seconds above which a call is not repeated: nn.Conv2d takes half a minute for 101×101 in NCHW.
SLOW = 1.0
# Ratios, in the order in which they are printed.
FALLBACK = "× faster than nn.Conv2d, authors' fallback"
BEST = '× faster than nn.Conv2d, best layout'
SEVEN = '× the time of nn.Conv2d 7×7'
PERIPHERAL = '× faster by PeripheralConv2d than nn.Conv2d, best layout'
BOXES = '× faster by PeripheralConv2d than by box sums'
PERIPHERAL_51 = '× the time of PeripheralConv2d 51×51'
ROOFLINE = 'of the roofline'
PARTS = ('forward', 'input gradient', 'weight gradient')
Function = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """Channels and side of the map, (height, width) of each kernel."""

    name: str
    channels: int
    side: int
    kernels: tuple[tuple[int, int], ...]
    center: int | None = None  # of PeLK's grid, by which the weights of the one kernel are shared

    @property
    def square(self) -> bool:
        """Whether there is a large kernel that is no strip."""
        return max(min(size) for size in self.kernels) > 13


def slak(size: int, sides: Sequence[int]) -> list[Case]:
    """Stages of SLaK-T for square images of that size."""
    stages = zip((124, 249, 499, 998), sides, (51, 49, 47, 13), strict=True)
    return [
        Case(f'SLaK-T at {size}, stage {i}', channels, side, ((k, 5), (5, k), (5, 5)))
        for i, (channels, side, k) in enumerate(stages, 1)
    ]


def pelk(name: str, kernels: Sequence[int], center: int, size: int = 512) -> list[Case]:
    """Stages of PeLK-T, which convolves 3/8 of its channels, for square images of that size."""
    stages = zip((46, 93, 187, 374), (size // s for s in (4, 8, 16, 32)), kernels, strict=True)
    return [
        Case(f'{name} at {size}, stage {i}', channels, side, ((k, k),), center)
        for i, (channels, side, k) in enumerate(stages, 1)
    ]


SLAK = slak(512, (128, 64, 32, 16))
SQUARES = [
    Case('square 51×51', 124, 128, ((51, 51),), center=5),
    Case('square 101×101', 124, 128, ((101, 101),), center=7),
]
CASES = [
    *SLAK,
    *slak(224, (56, 28, 14, 7)),
    *SQUARES,
    *pelk('PeLK-T', (51, 49, 47, 13), center=5),
    *pelk('PeLK-T', (51, 49, 47, 13), center=5, size=224),
    *pelk('PeLK-T-101', (101, 69, 67, 13), center=7),
]
QUICK = [
    Case('quick strips', 8, 24, ((13, 5), (5, 13), (5, 5))),
    Case('quick square', 8, 24, ((15, 15),), center=5),
]


class Tensors:
    """Random input, kernels and output gradients in a layout."""

    def __init__(
        self, case: Case, batch: int, layout: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        def random(*shape: int) -> Tensor:
            tensor = torch.randn(shape, device=device, dtype=dtype)
            return tensor.contiguous(memory_format=LAYOUTS[layout])

        shape = (batch, case.channels, case.side, case.side)
        self.x = random(*shape)
        self.weights = [random(case.channels, 1, *size) for size in case.kernels]
        self.gradients = [random(*shape) for _ in self.weights]
        self.bias = torch.randn(case.channels, device=device, dtype=dtype)


def stock(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """What nn.Conv2d does, once per kernel."""
    return [
        F.conv2d(x, w, padding=(w.shape[2] // 2, w.shape[3] // 2), groups=len(w)) for w in weights
    ]


def stock_deployed(x: Tensor, weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Strips with the small kernel and the bias in one of them, as nn.Conv2d evaluates them."""
    first, *others = stock(x, merge_kernels(weights))
    return sum(others, first + bias.view(-1, 1, 1))


def timed(
    function: Function, t: Tensors, weights: Sequence[Tensor], parts: bool
) -> dict[str, Callable]:
    """Calls by what they compute: forward, training, and on request the gradients alone."""
    x = t.x
    leaf, leaves = x.clone().requires_grad_(), [w.clone().requires_grad_() for w in weights]

    def training():
        return torch.autograd.grad(function(leaf, leaves), [leaf, *leaves], t.gradients)

    calls = dict(forward=partial(function, x, weights), training=training)
    if parts:
        grad = partial(torch.autograd.grad, grad_outputs=t.gradients, retain_graph=True)
        calls['input gradient'] = partial(grad, function(leaf, weights), leaf)
        calls['weight gradient'] = partial(grad, function(x, leaves), leaves)
        calls['both gradients'] = partial(grad, function(leaf, leaves), [leaf, *leaves])
    return calls


def stock_calls(t: Tensors, index: int) -> dict[str, Callable]:
    """The three calls of nn.Conv2d with one of the kernels."""
    x, weight, gradient = t.x, t.weights[index], t.gradients[index]
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    backward = partial(
        torch.ops.aten.convolution_backward,
        *(gradient, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], len(weight)),
    )
    return {
        'forward': partial(stock, x, [weight]),
        'input gradient': partial(backward, [True, False, False]),
        'weight gradient': partial(backward, [False, True, False]),
    }


def peripheral_calls(case: Case, t: Tensors) -> dict[tuple, Callable]:
    """Calls of PeLK's convolution, from its shared weights, by (way, operation).

    None on a machine without MMEngine, which the models need.
    """
    try:
        from mmslak.models import PeripheralConv2d
    except ModuleNotFoundError:
        return {}
    device, dtype = t.x.device, t.x.dtype
    module = PeripheralConv2d(case.channels, case.kernels[0][0], case.center).to(device, dtype)

    def function(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        return [functional_call(module, {'weight': weights[0]}, (x,))]

    def boxes(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        return [box_sums(x, weights[0], module.grid)]

    return {
        (way, operation): call
        for way, how in {'peripheral': function, 'box sums': boxes}.items()
        for operation, call in timed(how, t, [module.weight.detach()], parts=False).items()
    }


def backends(case: Case, device: torch.device) -> Iterator[str]:
    """Backends that make sense for a case."""
    for backend in BACKENDS:
        if backend == 'triton' and device.type != 'cuda':
            continue  # interpreted there, for tests
        if backend == 'toeplitz' and case.square:
            continue  # one matrix per kernel row: gigabytes
        if backend == 'native' and min(case.kernels[0]) > 64:
            continue  # minutes
        yield backend


def our_calls(case: Case, by_layout: dict[str, Tensors], parts: bool) -> dict[tuple, Callable]:
    """Calls by (backend, layout, operation)."""
    calls = {}
    for layout, t in by_layout.items():
        for backend in backends(case, t.x.device):
            function = partial(depthwise_conv2d_branches, backend=backend)
            for operation, call in timed(function, t, t.weights, parts).items():
                calls[backend, layout, operation] = call
            if len(case.kernels) > 1:
                calls[backend, layout, 'deployed'] = partial(
                    depthwise_conv2d_sum, t.x, t.weights, t.bias, backend
                )
    return calls


def measure(case: Case, args: argparse.Namespace) -> dict:
    """Medians of a case in milliseconds, and how we compare."""
    make = partial(Tensors, batch=args.batch, device=args.device, dtype=args.dtype)
    by_layout = {layout: make(case, layout=layout) for layout in LAYOUTS}
    seven = make(Case('', case.channels, case.side, ((7, 7),)), layout='NCHW')
    calls = our_calls(case, by_layout, args.parts)
    for layout, t in by_layout.items():
        for index, (height, width) in enumerate(case.kernels):
            for part, call in stock_calls(t, index).items():
                calls['nn.Conv2d', f'{height}×{width}', layout, part] = call
    for part, call in stock_calls(seven, 0).items():
        calls['7×7', part] = call
    if len(case.kernels) > 1:
        t = by_layout['NCHW']
        calls['nn.Conv2d', 'deployed'] = partial(stock_deployed, t.x, t.weights, t.bias)
    if case.center:
        calls |= peripheral_calls(case, by_layout['NCHW'])
    for key, call in calls.items():
        if key[0] in ('auto', 'peripheral'):
            call()  # measures the choice
    times = medians(calls, args.device, args.rounds, args.budget, SLOW)

    sizes = [f'{height}×{width}' for height, width in case.kernels]
    totals = {"authors' fallback": {}, 'best layout': {}, '7×7': {}}
    for operation, parts in dict(forward=PARTS[:1], training=PARTS).items():
        by_call = [
            [times['nn.Conv2d', size, layout, part] for layout in LAYOUTS]
            for size in sizes
            for part in parts
        ]
        totals["authors' fallback"][operation] = sum(nchw for nchw, _ in by_call)
        totals['best layout'][operation] = sum(min(both) for both in by_call)
        totals['7×7'][operation] = sum(times['7×7', part] for part in parts)
    if len(case.kernels) > 1:
        totals["authors' fallback"]['deployed'] = times['nn.Conv2d', 'deployed']
    auto = {key[2]: ms for key, ms in times.items() if key[:2] == ('auto', 'NCHW')}
    peripheral, boxes = (
        {key[1]: ms for key, ms in times.items() if key[0] == way}
        for way in ('peripheral', 'box sums')
    )
    best = totals['best layout']
    ratios = {
        FALLBACK: {name: ms / auto[name] for name, ms in totals["authors' fallback"].items()},
        BEST: {name: ms / auto[name] for name, ms in best.items()},
        SEVEN: {name: auto[name] / ms for name, ms in totals['7×7'].items()},
    }
    if peripheral:
        ratios[PERIPHERAL] = {name: best[name] / ms for name, ms in peripheral.items()}
        ratios[BOXES] = {name: boxes[name] / ms for name, ms in peripheral.items()}
    if args.device.type == 'cuda':
        floors = roofline(case, args)
        ratios[ROOFLINE] = {name: floor / auto[name] for name, floor in floors.items()}
    return dict(
        name=case.name,
        shape=[args.batch, case.channels, case.side, case.side],
        kernels=sizes,
        ratios=ratios,
        milliseconds={
            **nested({key: ms for key, ms in times.items() if key[0] in BACKENDS}),
            **({'peripheral': peripheral, 'box sums': boxes} if peripheral else {}),
            **{f'nn.Conv2d, {name}': by_operation for name, by_operation in totals.items()},
            'nn.Conv2d by call': nested(
                {k[1:]: ms for k, ms in times.items() if k[0] == 'nn.Conv2d' and k[3:]}
            ),
        },
    )


def nested(flat: dict[tuple, float]) -> dict:
    """{(a, b): value} as {a: {b: value}}."""
    tree = {}
    for (*path, last), value in flat.items():
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def roofline(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds that no version goes below: every tensor moved once, every product done once.

    Training reads x once for the outputs and once for the gradients.
    """
    maps = args.batch * case.channels * case.side**2
    bytes_per_map = maps * torch.finfo(args.dtype).bits / 8
    flops = 2 * maps * sum(height * width for height, width in case.kernels)
    outputs = len(case.kernels)
    moved = dict(forward=1 + outputs, training=1 + outputs + 1 + outputs + 1)
    done = dict(forward=1, training=3)
    return {
        operation: 1e3
        * max(
            moved[operation] * bytes_per_map / (args.bandwidth * 1e12),
            done[operation] * flops / (args.peak_tflops * 1e12),
        )
        for operation in moved
    }


def set_ceilings(args: argparse.Namespace) -> None:
    """Fills in what the command line does not say by a large product and a large copy."""
    side, buffer = 8192, torch.empty(1 << 30, dtype=torch.uint8, device=args.device)
    a, b = (torch.randn(side, side, device=args.device, dtype=args.dtype) for _ in range(2))
    times = medians(dict(product=partial(torch.mm, a, b), copy=buffer.clone), args.device)
    args.peak_tflops = args.peak_tflops or 2 * side**3 / times['product'] / 1e9
    args.bandwidth = args.bandwidth or 2 * buffer.numel() / times['copy'] / 1e9


def targets(results: list[dict], device: torch.device) -> list[dict]:
    """What we want to reach, what we reach."""
    stages, (square, square_101) = [case.name for case in SLAK], [case.name for case in SQUARES]
    if device.type == 'cuda':
        wanted = [(name, 'training', FALLBACK, 10) for name in stages]
        wanted += [(name, 'training', SEVEN, 1) for name in stages]
    else:
        wanted = [
            (stages[0], 'forward', FALLBACK, 11),
            (stages[0], 'training', FALLBACK, 9),
            (stages[0], 'training', BEST, 4.5),
            (stages[0], 'training', SEVEN, 1.5),
            (square, 'forward', BEST, 4),
            (square_101, 'forward', BEST, 10),
            (square_101, 'training', PERIPHERAL, 10),
            (square_101, 'training', PERIPHERAL_51, 1.6),
        ]
    by_name = {result['name']: result for result in results}
    if square in by_name and square_101 in by_name:
        small, large = (by_name[n]['milliseconds']['peripheral'] for n in (square, square_101))
        by_name[square_101]['ratios'][PERIPHERAL_51] = {n: large[n] / small[n] for n in large}
    reached = []
    for name, operation, ratio, bound in wanted:
        value = by_name.get(name, {}).get('ratios', {}).get(ratio, {}).get(operation)
        if value is not None:
            at_most = ratio in (SEVEN, PERIPHERAL_51)
            reached.append(
                dict(
                    case=name,
                    operation=operation,
                    target=f'at {"most" if at_most else "least"} {bound} {ratio}',
                    value=value,
                    met=value <= bound if at_most else value >= bound,
                )
            )
    return reached


def print_table(case: Case, args: argparse.Namespace) -> dict:
    """Fastest backend for each part of a case in each layout, and all medians."""
    t = {name: Tensors(case, args.batch, name, args.device, args.dtype) for name in LAYOUTS}
    calls = our_calls(case, t, parts=True)
    calls = {key: call for key, call in calls.items() if key[0] != 'auto'}
    times = medians(calls, args.device, args.rounds, args.budget, SLOW)
    fastest = {}
    kernels = ' + '.join(f'{height}×{width}' for height, width in case.kernels)
    print(f'\n{args.batch}×{case.channels}×{case.side}×{case.side}, {kernels}')
    for layout in LAYOUTS:
        for operation in dict.fromkeys(operation for _, _, operation in times):
            row = {b: ms for (b, *rest), ms in times.items() if rest == [layout, operation]}
            ranked = sorted(row, key=row.get)
            fastest[layout, operation] = ranked[0]
            listing = '  '.join(f'{backend} {row[backend]:.2f}' for backend in ranked)
            print(f'  {layout} {operation:16} {listing}')
    return dict(
        name=case.name,
        shape=[args.batch, case.channels, case.side, case.side],
        kernels=kernels.split(' + '),
        fastest=nested(fastest),
        milliseconds=nested(times),
    )


def print_result(result: dict) -> None:
    """One line per operation of a case."""
    print(f'\n{result["name"]}: {"×".join(map(str, result["shape"]))}, {result["kernels"]}')
    nchw, nhwc = (result['milliseconds']['auto'][layout] for layout in LAYOUTS)
    for operation, ms in nchw.items():
        words = [f'  {operation:16} {ms:.2f} ms, from NHWC {nhwc[operation]:.2f} ms']
        for name, by_operation in result['ratios'].items():
            if operation in by_operation:
                words.append(f'{by_operation[operation]:.2f} {name}')
        print('; '.join(words), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__, rounds=9, budget=2.0)
    parser.add_argument('--batch', type=int, default=1, help='[%(default)s]')
    parser.add_argument('--cases', default='', help='only those whose name has this in it')
    parser.add_argument('--parts', action='store_true', help='also our gradients one by one')
    parser.add_argument(
        '--table',
        action='store_true',
        help='every backend, part and layout at the batch and at twice it, without nn.Conv2d: what '
        "'auto' should choose",
    )
    parser.add_argument('--peak-tflops', type=float, help='of the GPU [measured]')
    parser.add_argument('--bandwidth', type=float, help='of the GPU, in TB/s [measured]')
    args = parse(parser, argv)
    cases = [case for case in (QUICK if args.quick else CASES) if args.cases in case.name]
    if not cases:
        parser.error(f'--cases {args.cases}: no case has this in its name')
    result = facts(args)
    if args.device.type == 'cuda':
        set_ceilings(args)
        result |= dict(peak_tflops=args.peak_tflops, bandwidth_tb_per_s=args.bandwidth)
        print(f'{args.peak_tflops:.0f} TFLOP/s, {args.bandwidth:.2f} TB/s')

    result['cases'] = []
    if args.table:
        batch = args.batch
        for case in cases:
            for args.batch in (batch, 2 * batch):
                result['cases'].append(print_table(case, args))
    else:
        for case in cases:
            result['cases'].append(measure(case, args))
            print_result(result['cases'][-1])
        result['targets'] = targets(result['cases'], args.device)
        print()
        print_targets(result['targets'])
    save(result, out_file(args, 'methods' if args.table else 'depthwise'))


if __name__ == '__main__':
    main()
