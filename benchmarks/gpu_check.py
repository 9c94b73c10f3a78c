"""What a GPU that is at hand for minutes can tell about the Triton backend, in one run.

    python benchmarks/gpu_check.py --out gpu_check.json

It needs torch, triton and a C compiler, and of this repository `mmslak.ops` alone. Each step has a
budget, 430 seconds in all, and a process of its own: one that fails or takes too long is noted, and
the next one goes on. The file is complete after every result.

| step | what | seconds |
|---|---|---|
| ceilings | a large product and a large copy | 20 |
| compile | all kernels of the steps below, in parallel | 40 |
| correctness | 12 shapes, 3 dtypes, all results against float64; memory begins as NaN | 60 |
| repeats | 20 calls with equal bits; compute-sanitizer on tiny shapes, if it is installed | 60 |
| graphs | CUDA graph, torch.compile, another stream | 40 |
| tiles | every tile of every stage of SLaK-T | 90 |
| tables | stages beside nn.Conv2d and a 7×7: the ratios of depthwise_cuda.json | 90 |
| host | launches and host time of a call | 30 |

`--device cpu --tiny` tries the script without a GPU, under Triton's interpreter.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if '--device' in sys.argv and sys.argv[sys.argv.index('--device') + 1] == 'cpu':
    os.environ['TRITON_INTERPRET'] = '1'  # before triton is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from mmslak.ops import depthwise_conv2d_branches, triton_backend

LAYOUTS = {'NCHW': torch.contiguous_format, 'NHWC': torch.channels_last}
# Largest error relative to the largest value: outputs of 16 bits are rounded once.
TOLERANCES = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-5}
Results = Iterator[tuple[str, object]]


class Case(NamedTuple):
    """An input (N, C, H, W) in a layout, and the (height, width) of kernels."""

    shape: tuple[int, int, int, int]
    kernels: tuple[tuple[int, int], ...]
    layout: str = 'NHWC'

    @property
    def name(self) -> str:
        """As '16×124×128×128 51×5 5×51 5×5 NHWC'."""
        sizes = ['×'.join(map(str, size)) for size in (self.shape, *self.kernels)]
        return ' '.join([*sizes, self.layout])


class Run(NamedTuple):
    """What the steps need to know.

    Attributes:
        device: Where to compute.
        tiny: Whether to take small shapes only.
        deadline: time.monotonic() at which the step has to end.
    """

    device: torch.device
    tiny: bool
    deadline: float

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


def block(kernel: int) -> tuple[tuple[int, int], ...]:
    """The kernels of a block of SLaK."""
    return (kernel, 5), (5, kernel), (5, 5)


def stages(run: Run, size: int = 512, batch: int = 16) -> list[Case]:
    """Those of SLaK-T, which computes in NHWC."""
    if run.tiny:
        return [Case((1, 2, 8, 16), ((5, 3), (3, 5), (3, 3)))]
    figures = zip((124, 249, 499, 998), (4, 8, 16, 32), (51, 49, 47, 13), strict=True)
    return [Case((batch, c, size // s, size // s), block(kernel)) for c, s, kernel in figures]


def shapes(run: Run) -> list[Case]:
    """Twelve that differ in all that the code decides by."""
    if run.tiny:
        return [*stages(run), Case((2, 1, 5, 20), ((3, 7), (5, 1)), 'NCHW')]
    return [
        Case((2, 4, 128, 128), block(51), 'NCHW'),
        Case((2, 4, 128, 128), block(51)),
        Case((2, 5, 64, 64), block(49)),
        Case((4, 5, 32, 32), block(47)),
        Case((16, 6, 16, 16), block(13)),
        Case((2, 4, 56, 56), block(51)),
        Case((3, 5, 28, 28), block(49), 'NCHW'),
        Case((5, 6, 14, 14), block(47)),
        Case((8, 6, 7, 7), block(13)),
        Case((1, 3, 100, 70), ((31, 31),), 'NCHW'),
        Case((2, 3, 33, 129), ((1, 101), (101, 1)), 'NCHW'),
        Case((2, 2, 130, 90), ((51, 51), (5, 5))),
    ]


def dtypes(run: Run) -> list[torch.dtype]:
    return [torch.float32] if run.device.type == 'cpu' else list(TOLERANCES)


class Tensors:
    """Random input, kernels, bias and output gradients of a case."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        generator = torch.Generator(device).manual_seed(0)
        channels, layout = case.shape[1], LAYOUTS[case.layout]
        self.x = random(*case.shape).contiguous(memory_format=layout)
        self.weights = [random(channels, 1, *size) for size in case.kernels]
        self.bias = random(channels)
        self.gradients = [
            random(*case.shape).contiguous(memory_format=layout) for _ in case.kernels
        ]


def calls(t: Tensors, tile: triton_backend.Tile | None = None) -> dict[str, Callable]:
    """Calls of the backend by what they compute; each returns a list of tensors."""

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        dx, dws = triton_backend.backward(t.x, t.weights, gradients, tile=tile)
        return [dx, *dws]

    forward = partial(triton_backend.forward, t.x, t.weights, tile=tile)
    return {
        'forward': forward,
        'sum': partial(forward, bias=t.bias, summed=True),
        'backward': partial(backward, t.gradients),
        'backward of sum': partial(backward, t.gradients[:1]),
    }


def stock(t: Tensors) -> list[Tensor]:
    """nn.Conv2d's outputs."""
    return [
        F.conv2d(t.x, w, padding=(w.shape[2] // 2, w.shape[3] // 2), groups=len(w))
        for w in t.weights
    ]


def stock_gradients(t: Tensors) -> dict[str, Callable]:
    """nn.Conv2d's gradients of x and of the kernels."""

    def gradient(mask: list[bool]) -> list[Tensor]:
        results = []
        for weight, dy in zip(t.weights, t.gradients, strict=True):
            padding = [weight.shape[2] // 2, weight.shape[3] // 2]
            rest = [None, [1, 1], padding, [1, 1], False, [0, 0], len(weight), mask]
            results += torch.ops.aten.convolution_backward(dy, t.x, weight, *rest)
        return results

    return {
        'input gradient': partial(gradient, [True, False, False]),
        'weight gradient': partial(gradient, [False, True, False]),
    }


def expected(t: Tensors) -> dict[str, list[Tensor]]:
    """What `calls` return, in float64."""
    x, bias = t.x.double().requires_grad_(), t.bias.double()
    weights = [weight.double().requires_grad_() for weight in t.weights]
    double = argparse.Namespace(x=x, weights=weights)
    outputs = stock(double)
    gradients = [gradient.double() for gradient in t.gradients]
    inputs = [x, *weights]
    return {
        'forward': [output.detach() for output in outputs],
        'sum': [(sum(outputs) + bias.view(-1, 1, 1)).detach()],
        'backward': list(torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)),
        'backward of sum': list(torch.autograd.grad(sum(outputs), inputs, gradients[0])),
    }


def error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest, relative to the largest value of its tensor; NaN if there is one."""
    errors = [
        (a.double() - b.double()).abs().max() / b.double().abs().max()
        for a, b in zip(got, wanted, strict=True)
    ]
    return float(torch.stack(errors).max())


def milliseconds(call: Callable, run: Run, rounds: int = 9) -> float:
    """Median of calls from a cold cache, with the launches in the queue before the first begins."""
    times = []
    if not run.tiny:
        call()
    for _ in range(1 if run.tiny else rounds):
        if run.device.type == 'cpu':
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(1 << 28, dtype=torch.uint8, device=run.device).zero_()
        torch.cuda._sleep(2_000_000)
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def ceilings(run: Run) -> Results:
    """TFLOP/s of a product and TB/s of a copy."""
    side, size = (64, 1 << 16) if run.tiny else (8192, 1 << 30)
    for dtype in dtypes(run):
        a, b = (torch.randn(side, side, device=run.device).to(dtype) for _ in range(2))
        yield f'TFLOP/s {dtype}', 2 * side**3 / milliseconds(partial(torch.mm, a, b), run) / 1e9
    buffer = torch.empty(size, dtype=torch.uint8, device=run.device)
    yield 'TB/s', 2 * size / milliseconds(buffer.clone, run) / 1e9
    if run.device.type == 'cuda':
        found = torch.cuda.get_device_properties(run.device)
        yield 'device', f'{found.name}, compute capability {found.major}.{found.minor}'
        yield 'multiprocessors', found.multi_processor_count
        yield 'GB', found.total_memory / 1e9


def compile_all(run: Run) -> Results:
    """Seconds of each case's first calls, whose kernels Triton keeps on disk."""
    jobs = [(case, dtype, False) for dtype in dtypes(run) for case in shapes(run)]
    jobs = jobs[:1] if run.tiny else [*((c, torch.bfloat16, True) for c in stages(run)), *jobs]
    context = multiprocessing.get_context('fork')  # this process has not used the GPU yet
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=context) as pool:
        futures = {pool.submit(_first_calls, *job, run.device): job for job in jobs}
        for future in as_completed(futures):
            case, dtype, _ = futures[future]
            yield f'{case.name} {dtype}', _outcome(future.result)


def _first_calls(case: Case, dtype: torch.dtype, every: bool, device: torch.device) -> float:
    start = time.perf_counter()
    t = Tensors(case, dtype, device)
    for tile in triton_backend.tiles(t.x, t.weights)[: None if every else 1]:
        for call in calls(t, tile).values():
            call()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _outcome(call: Callable[[], object]) -> object:
    """What the call returns, or its error in a line: one case must not stop the others."""
    try:
        return call()
    except Exception as failure:
        return f'failed: {type(failure).__name__}: {failure}'


def correctness(run: Run) -> Results:
    """Largest errors of all results, in units of what is allowed: above 1 is wrong."""
    for dtype, case in itertools.product(dtypes(run), shapes(run)):
        yield f'{case.name} {dtype}', _outcome(partial(_errors, case, dtype, run.device, 0))
    for case in shapes(run):  # as far as the time goes
        name = f'{case.name}, other tiles'
        yield name, _outcome(partial(_errors, case, dtypes(run)[0], run.device, 1))


def _errors(
    case: Case, dtype: torch.dtype, device: torch.device, first_tile: int
) -> dict[str, float]:
    t = Tensors(case, dtype, device)
    wanted = expected(t)
    errors = {}
    for tile in triton_backend.tiles(t.x, t.weights)[first_tile : None if first_tile else 1]:
        torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
        got = {name: call() for name, call in calls(t, tile).items()}
        torch.use_deterministic_algorithms(False)
        for name, results in got.items():
            errors[f'{name} {tuple(tile)}'] = error(results, wanted[name]) / TOLERANCES[dtype]
    return errors


def repeats(run: Run) -> Results:
    """Whether 20 calls have equal bits, and what compute-sanitizer says."""
    for dtype, case in itertools.product(dtypes(run), shapes(run)[: 1 if run.tiny else 5]):
        t = Tensors(case, dtype, run.device)
        for name, call in calls(t).items():
            first = call()
            equal = True
            for _ in range(1 if run.tiny else 20):
                equal &= all(map(torch.equal, call(), first))
            yield f'{case.name} {dtype} {name}', equal
    tool = shutil.which('compute-sanitizer')
    if run.device.type == 'cpu' or tool is None:
        yield 'compute-sanitizer', 'skipped: not installed, or no GPU'
        return
    yield 'compute-sanitizer', _outcome(partial(_sanitized, tool, run))


def _sanitized(tool: str, run: Run) -> dict[str, object]:
    script = [sys.executable, __file__, '--tiny', '--steps', 'correctness', '--out', os.devnull]
    done = subprocess.run(
        [tool, '--target-processes', 'all', '--error-exitcode', '9', *script],
        capture_output=True,
        text=True,
        timeout=max(1, run.left() - 2),
    )
    return dict(code=done.returncode, output=done.stdout[-2000:])


def graphs(run: Run) -> Results:
    """Errors of calls in a compiled graph, in a CUDA graph and on another stream."""
    case, dtype = shapes(run)[1], dtypes(run)[0]
    t = Tensors(case, dtype, run.device)
    wanted = calls(t)['forward']()
    yield 'torch.compile', _outcome(partial(_compiled_error, t, wanted))
    if run.device.type == 'cpu':
        yield 'CUDA graph', 'skipped: no GPU'
        return
    yield 'other stream', _outcome(partial(_error_on_other_stream, t, wanted))
    yield 'CUDA graph', _outcome(partial(_captured_error, t, wanted))
    other = Tensors(Case((1, 1, 8, 24), ((3, 3),)), torch.float16, run.device)
    # An error is expected, since a first call compiles; it may leave the GPU's context broken.
    yield 'CUDA graph around a first call', _outcome(partial(_captured_error, other, []))


def _compiled_error(t: Tensors, wanted: list[Tensor]) -> float:
    backend = 'inductor' if t.x.is_cuda else 'aot_eager'
    compiled = torch.compile(
        lambda x, *weights: depthwise_conv2d_branches(x, weights, 'triton'),
        fullgraph=True,
        backend=backend,
    )
    return error(compiled(t.x, *t.weights), wanted)


def _error_on_other_stream(t: Tensors, wanted: list[Tensor]) -> float:
    stream = torch.cuda.Stream()
    x, t.x = t.x, torch.zeros_like(t.x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        t.x.copy_(x)  # a launch on the wrong stream reads the zeros
        got = calls(t)['forward']()
    stream.synchronize()
    return error(got, wanted)


def _captured_error(t: Tensors, wanted: list[Tensor]) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = calls(t)['forward']()
    x = t.x.clone()
    t.x.zero_()
    graph.replay()
    zeros = sum(float(output.abs().max()) for output in got)
    t.x.copy_(x)
    graph.replay()
    return error(got, wanted) + zeros


def tile_sweep(run: Run) -> Results:
    """Milliseconds of each tile, in bfloat16."""
    dtype = dtypes(run)[0]
    for case in stages(run):
        t = Tensors(case, dtype, run.device)
        for tile in triton_backend.tiles(t.x, t.weights):
            for name, call in calls(t, tile).items():
                key = f'{case.name} {dtype} {name} {tuple(tile)}'
                yield key, _outcome(partial(milliseconds, call, run, rounds=5))


def tables(run: Run) -> Results:
    """Times of the stages in bfloat16 beside nn.Conv2d, and ratios as in depthwise_cuda.json."""
    cases = stages(run) if run.tiny else [*stages(run), *stages(run, size=224)]
    if not run.tiny:
        squares = [((16, 124, 128, 128), ((k, k),)) for k in (51, 101)]
        cases += [Case(*square) for square in squares]
    for case in cases:
        yield case.name, _outcome(partial(_table, case, run))


def _table(case: Case, run: Run) -> dict[str, dict[str, float]]:
    dtype = torch.float32 if run.tiny else torch.bfloat16
    by_layout = {name: Tensors(case._replace(layout=name), dtype, run.device) for name in LAYOUTS}
    seven = Tensors(case._replace(kernels=((7, 7),), layout='NCHW'), dtype, run.device)
    rounds = partial(milliseconds, run=run, rounds=5)
    times = {f'triton {layout}': {} for layout in LAYOUTS}
    for layout, t in by_layout.items():
        ours = calls(t)
        forward, backward = rounds(ours['forward']), rounds(ours['backward'])
        times[f'triton {layout}'] = dict(forward=forward, training=forward + backward)
    by_call = {layout: [rounds(partial(stock, t))] for layout, t in by_layout.items()}
    for layout, t in by_layout.items():
        by_call[layout] += [rounds(call) for call in stock_gradients(t).values()]
    best = [min(both) for both in zip(*by_call.values(), strict=True)]
    sevens = [rounds(call) for call in (partial(stock, seven), *stock_gradients(seven).values())]
    for name, parts in {'default': by_call['NCHW'], 'best': best, '7×7': sevens}.items():
        times[f'nn.Conv2d {name}'] = dict(forward=parts[0], training=sum(parts))
    ours = times['triton NCHW']
    ratios = {
        name: {part: ms / ours[part] for part, ms in found.items()} for name, found in times.items()
    }
    return dict(milliseconds=times, ratios=ratios)


def host(run: Run) -> Results:
    """Launches of ours, and microseconds in which the host has put a call into the queue."""
    launch = triton_backend._launch
    for case in stages(run):
        t = Tensors(case, torch.float32 if run.tiny else torch.bfloat16, run.device)
        for name, call in calls(t).items():
            names: list[str] = []

            def record(kernel: str, *args, names: list[str] = names, **options) -> None:
                names.append(kernel)
                launch(kernel, *args, **options)

            triton_backend._launch = record
            call()
            triton_backend._launch = launch
            times = []
            for _ in range(1 if run.tiny else 20):
                if run.device.type == 'cuda':
                    torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                times.append(1e6 * (time.perf_counter() - start))
            yield f'{case.name} {name}', dict(launches=names, microseconds=statistics.median(times))


STEPS: dict[str, tuple[Callable[[Run], Results], float]] = {
    'ceilings': (ceilings, 20),
    'compile': (compile_all, 40),
    'correctness': (correctness, 60),
    'repeats': (repeats, 60),
    'graphs': (graphs, 40),
    'tiles': (tile_sweep, 90),
    'tables': (tables, 90),
    'host': (host, 30),
}


def run_step(
    step: Callable[[Run], Results],
    run: Run,
    note: Callable[[str, object], None],
) -> str:
    """Runs a step in a process of its own, until it ends or its deadline has come.

    Args:
        step: Yields results, each a name and a value.
        run: What it needs to know.
        note: Gets every result at once.

    Returns:
        'done', 'out of time', or what went wrong.
    """
    context = multiprocessing.get_context('fork')  # which has torch imported already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_results, args=(step, run, sender))
    process.start()
    sender.close()
    status = 'out of time'
    try:
        while receiver.poll(max(0, run.left())):
            kind, *content = receiver.recv()
            if kind == 'end':
                (status,) = content
                break
            note(*content)
    except EOFError:
        process.join()
        status = f'failed: the process ended with code {process.exitcode}'
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with those that it has started
    process.join()
    return status


def _send_results(step: Callable[[Run], Results], run: Run, sender: Connection) -> None:
    os.setpgrp()
    try:
        for name, value in step(run):
            sender.send(('result', name, value))
        sender.send(('end', 'done'))
    except Exception:
        sender.send(('end', f'failed: {traceback.format_exc()[-2000:]}'))
    sys.stdout.flush()
    os._exit(0)  # a broken GPU context cannot be taken down


def rounded(value: object) -> object:
    """Numbers to four digits, as JSON has them: NaN is a string."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, float):
        return float(f'{value:.4g}') if abs(value) < float('inf') else str(value)
    return value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--tiny', action='store_true', help='one or two small shapes')
    parser.add_argument('--steps', nargs='+', choices=STEPS, default=list(STEPS))
    parser.add_argument(
        '--seconds', type=float, default=430, help='of all steps together [%(default)s]'
    )
    parser.add_argument('--out', default='gpu_check.json', help='file [%(default)s]')
    args = parser.parse_args(argv)
    scale = args.seconds / sum(seconds for _, seconds in STEPS.values())
    report = dict(
        python=platform.python_version(), torch=torch.__version__, device=args.device, steps={}
    )
    for name in args.steps:
        step, seconds = STEPS[name]
        start = time.monotonic()
        run = Run(torch.device(args.device), args.tiny, start + scale * seconds)
        report['steps'][name] = entry = dict(status='running', seconds=0.0, results={})

        def note(key: str, value: object, name: str = name, entry: dict = entry) -> None:
            entry['results'][key] = rounded(value)
            print(f'{name}: {key}: {json.dumps(entry["results"][key])}', flush=True)
            save(report, args.out)

        entry['status'] = run_step(step, run, note)
        entry['seconds'] = rounded(time.monotonic() - start)
        print(f'{name}: {entry["status"]} after {entry["seconds"]} s', flush=True)
        save(report, args.out)


def save(report: dict, path: str) -> None:
    Path(path).write_text(json.dumps(report, indent=2, ensure_ascii=False) + '\n')


if __name__ == '__main__':
    main()
