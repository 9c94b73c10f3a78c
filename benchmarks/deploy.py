"""Ways to run the deployed SLaK-T on a CPU: latency and accuracy side by side.

Examples:
    python benchmarks/deploy.py --out     # benchmarks/results/MACHINE/deploy_cpu.json
    python benchmarks/deploy.py --sizes 224 --ways 'eager float32' 'eager bfloat16'

The backbone of the UperNet config after `switch_to_deploy()`, for one picture. Latencies are
medians of calls taken in turns, as shares of that of eager float32 in NCHW. Errors are those of the
feature maps against float64: the largest difference as a share of the largest value, the mean one
as a share of the mean absolute value, and of the four maps the worst. The norms have the statistics
of random pictures. onnxruntime is left out where it is not installed.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from backbones import QUICK, SLAK_T, Backbone
from options import LAYOUTS, facts, new_parser, out_file, parse
from timing import medians, save
from torch import Tensor, nn

from mmslak.analysis.export import to_onnx

Run = Callable[[Tensor], Sequence[Tensor]]
REFERENCE = 'eager float32, NCHW'
DTYPES = ('float32', 'bfloat16')
WAYS = (*(f'{how} {dtype}' for how in ('eager', 'compile') for dtype in DTYPES), 'onnxruntime')


def build(backbone: Backbone) -> nn.Module:
    """The deployed backbone, whose norms have seen random pictures before."""
    model = backbone.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # averages all batches
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, 224, 224))
    model.eval()
    model.switch_to_deploy()
    return model


def ways(model: nn.Module, names: Sequence[str], folder: str) -> dict[str, Run]:
    """Functions from pictures to feature maps, by name and layout."""
    found = {}
    for name in names:
        if name == 'onnxruntime':
            if find_spec('onnxruntime') and find_spec('onnx'):
                found['onnxruntime float32'] = _onnxruntime(model, Path(folder) / 'slak.onnx')
            else:
                print("onnxruntime is left out: pip install 'mmslak[export]'")
            continue
        how, dtype = name.split()
        for layout in LAYOUTS:
            found[f'{name}, {layout}'] = _torch(model, how, dtype, layout)
    return found


def _torch(model: nn.Module, how: str, dtype: str, layout: str) -> Run:
    memory_format = LAYOUTS[layout]
    model = copy.deepcopy(model).to(memory_format=memory_format)
    run = torch.compile(model) if how == 'compile' else model
    half = dtype == 'bfloat16'

    def call(pictures: Tensor) -> Sequence[Tensor]:
        amp = torch.autocast('cpu', torch.bfloat16) if half else nullcontext()
        with torch.no_grad(), amp:
            return run(pictures.contiguous(memory_format=memory_format))

    return call


def _onnxruntime(model: nn.Module, path: Path) -> Run:
    """The graph that `mmslak export` writes, with as many threads as torch has."""
    import onnxruntime

    names = [f'stage{i}' for i in model.out_indices]
    to_onnx(copy.deepcopy(model), torch.randn(1, 3, 224, 224), path, names)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), settings, providers=['CPUExecutionProvider'])
    return lambda pictures: [
        torch.from_numpy(array) for array in session.run(None, {'input': pictures.numpy()})
    ]


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Largest and mean relative error of feature maps, each of the worst map."""
    largest, mean = [], []
    for one, other in zip(found, expected, strict=True):
        difference = (one.double() - other).abs()
        largest.append(float(difference.max() / other.abs().max()))
        mean.append(float(difference.mean() / other.abs().mean()))
    return max(largest), max(mean)


def measure(
    runs: dict[str, Run], expected: Sequence[Tensor], pictures: Tensor, args: argparse.Namespace
) -> dict[str, dict]:
    """Errors, latency in milliseconds and seconds of the first call, by way."""
    rows = {}
    for name, run in runs.items():
        start = time.perf_counter()
        outputs = run(pictures)  # compiles, or measures the choices
        first = time.perf_counter() - start
        largest, mean = errors(outputs, expected)
        rows[name] = dict(largest=largest, mean=mean, first_call_seconds=first)
        run(pictures)
    calls = {name: lambda run=run: run(pictures) for name, run in runs.items()}
    for name, ms in medians(calls, 'cpu', args.rounds, args.budget).items():
        rows[name]['ms'] = ms
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__, rounds=15, budget=5.0, dtypes=())
    parser.add_argument('--sizes', type=int, nargs='+', default=[224, 512], help='[224 512]')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS, help='[all]')
    args = parse(parser, argv)
    if args.device.type != 'cpu':
        parser.error(f'--device {args.device}: this compares ways to use a CPU')
    backbone = Backbone(SLAK_T, dict(drop_path_rate=0.0))
    if args.quick:
        backbone, args.sizes, args.rounds = QUICK['SLaK-T'], [64], 1
    model = build(backbone)
    exact = copy.deepcopy(model).double()
    result = facts(args) | dict(
        model='SLaK-T, deployed', sizes=args.sizes, table={}, milliseconds={}
    )
    with tempfile.TemporaryDirectory() as folder:
        # Each of several sizes has a compiled graph of its own, and no graph of free sizes.
        torch._dynamo.config.automatic_dynamic_shapes = False
        runs = ways(model, args.ways, folder)
        for size in args.sizes:
            pictures = torch.randn(1, 3, size, size)
            with torch.no_grad():
                expected = exact(pictures.double())
            rows = measure(runs, expected, pictures, args)
            print(f'\n1×3×{size}×{size}')
            for name, row in rows.items():
                line = result['table'].setdefault(name, {})
                if REFERENCE in rows:
                    line[f'latency at {size}'] = row['ms'] / rows[REFERENCE]['ms']
                line[f'largest error at {size}'] = row['largest']
                line[f'mean error at {size}'] = row['mean']
                words = ', '.join(f'{title} {value:.3g}' for title, value in row.items())
                print(f'  {name:26} {words}', flush=True)
            result['milliseconds'][str(size)] = {name: row['ms'] for name, row in rows.items()}
            save(result, out_file(args, 'deploy'))


if __name__ == '__main__':
    main()
