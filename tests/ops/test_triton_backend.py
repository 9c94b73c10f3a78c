"""The Triton kernels, interpreted on the CPU against float64.

Whether kernels are interpreted is fixed when triton is imported, and other tests import it too: so
they run in a process of their own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmslak.models import SLaK
from mmslak.ops import depthwise_conv2d_branches
from mmslak.ops import triton_backend as ops
from mmslak.ops.methods import compute_backward, compute_forward
from mmslak.ops.plans import Plan

ROOT = Path(__file__).parents[2]

BLOCK = [(51, 5), (5, 51), (5, 5)]
SIDES = [(1, 31), (31, 1), (5, 61), (61, 5), (13, 7), (3, 3), (1, 1), (31, 31)]


@pytest.fixture(scope='module')
def run():
    """Calls a function in a process with TRITON_INTERPRET=1."""
    skip_without_triton()
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool,
    ):
        patch.setenv('TRITON_INTERPRET', '1')
        pool.submit(torch.set_num_threads, 1).result()  # starts the process
        patch.undo()
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture
def run_as_program(tmp_path):
    """Runs this file as a program that calls one of its functions, compiled or interpreted."""

    def run_as_program(function: Callable[..., str], *args: str, interpret: str = '0') -> str:
        environment = dict(TRITON_INTERPRET=interpret, TRITON_CACHE_DIR=str(tmp_path))
        command = [sys.executable, __file__, function.__name__, *args]
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    skip_without_triton()
    return run_as_program


def skip_without_triton():
    try:
        ops._kernels()
    except ValueError as error:
        pytest.skip(str(error))


def tensors(sizes, shape, dtype=torch.float32):
    """x, weights, bias and one output gradient per weight."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, *[(shape[1], 1, *size) for size in sizes], shape[1:2], *[shape for _ in sizes]]
    x, *rest = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return x, rest[: len(sizes)], rest[len(sizes)], rest[len(sizes) + 1 :]


def reference(x, weights, gradients):
    """Outputs, gradient of x and gradients of the weights in float64."""
    x, *weights = (t.double().requires_grad_() for t in (x, *weights))
    outputs = [
        F.conv2d(x, w, padding=(w.shape[2] // 2, w.shape[3] // 2), groups=x.shape[1])
        for w in weights
    ]
    gradients = [gradient.double() for gradient in gradients]
    dx, *dws = torch.autograd.grad(outputs, [x, *weights], gradients)
    return [output.detach() for output in outputs], dx, dws


def check(got, expected, tolerance=2e-5):
    assert got.shape == expected.shape
    assert float((got.double() - expected).abs().max() / expected.abs().max()) <= tolerance


def check_all(run, x, weights, gradients, tolerance=2e-5, tile=None):
    outputs, dx, dws = reference(x, weights, gradients)
    got = run(ops.forward, x, weights, tile=tile)
    got_dx, got_dws = run(ops.backward, x, weights, gradients, tile=tile)
    for a, b in zip([*got, got_dx, *got_dws], [*outputs, dx, *dws], strict=True):
        assert a.dtype == x.dtype
        check(a, b, tolerance)
    return got, got_dx


@pytest.mark.parametrize('size', SIDES)
def test_kernels_of_every_ratio(run, size):
    x, weights, _, gradients = tensors([size], (2, 2, 12, 20))
    check_all(run, x, weights, gradients)


@pytest.mark.parametrize(
    ('shape', 'sizes'),
    [
        ((1, 2, 20, 70), BLOCK),  # two tiles side by side, the second nearly empty
        ((1, 1, 70, 20), BLOCK),
        ((3, 2, 16, 16), [(13, 5), (5, 13), (5, 5)]),  # all images in one tile
        ((8, 1, 3, 4), [(31, 31), (51, 5)]),  # kernels that are larger than the map
        ((1, 1, 1, 1), [(5, 5)]),
        ((1, 1, 4, 70), [(3, 101)]),  # more than one window of the weight gradient
        ((20, 1, 10, 9), [(3, 7)]),  # more images than a tile has
        ((1, 1, 40, 35), BLOCK),  # weight gradients in one launch: turned lines, and others
        ((1, 1, 12, 16), [(1, 9), (9, 1), (5, 7), (7, 5), (3, 3)]),  # in three launches
    ],
)
def test_maps_of_any_size(run, shape, sizes):
    x, weights, _, gradients = tensors(sizes, shape)
    check_all(run, x, weights, gradients)


@pytest.mark.parametrize('name', ['triton', 'triton-2', 'triton-3'])
def test_tiles_as_methods_of_the_measured_choice(run, name):
    """Also where a map has fewer tiles than the one that the choice was measured on."""
    for shape in ((1, 2, 20, 36), (1, 2, 7, 7)):
        x, weights, _, gradients = tensors([(9, 3), (3, 9)], shape)
        outputs, dx, dws = reference(x, weights, gradients)
        plan = Plan((name,), (name,), (name,))
        got = run(compute_forward, plan.forward, x, weights, None, False)
        got_dx, got_dws = run(compute_backward, plan, x, weights, gradients, True, True)
        for a, b in zip([*got, got_dx, *got_dws], [*outputs, dx, *dws], strict=True):
            check(a, b)


@pytest.mark.parametrize(
    ('shape', 'sizes', 'dtype'),
    [
        ((1, 1, 20, 70), BLOCK, torch.float32),
        ((2, 1, 20, 36), [(5, 31), (3, 9)], torch.bfloat16),
        ((9, 1, 14, 7), [(13, 5), (5, 13), (5, 5)], torch.float16),
    ],
)
def test_every_tile(run, shape, sizes, dtype):
    x, weights, _, gradients = tensors(sizes, shape, dtype)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    found = ops.tiles(x, weights)
    assert 1 <= len(found) <= 3
    assert len(set(found)) == len(found)
    for tile in found:  # JSON keeps a tile as a list
        check_all(run, x, weights, gradients, tolerance, tile=list(tile))


@pytest.mark.parametrize(
    ('shape', 'sizes', 'tile'),
    [
        ((3, 2, 20, 70), BLOCK, (16, 32, 4, True)),  # four segments of five lines
        ((1, 1, 40, 33), [(1, 9), (7, 3), (5, 61)], (16, 16, 4, True)),
        ((20, 1, 9, 40), [(3, 3)], (16, 32, 4, True)),  # more images than a program has
        ((2, 1, 9, 40), [(3, 3), (1, 5), (3, 9)], (16, 32, 4, True)),  # a sum of one kernel
        ((2, 1, 5, 40), [(7, 7)], (16, 32, 4, True)),  # too many rows: not by marching
    ],
)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_marching(run, shape, sizes, tile, layout):
    x, weights, bias, gradients = tensors(sizes, shape)
    x = x.contiguous(memory_format=layout)
    outputs, _, _ = reference(x, weights, gradients)
    got = run(ops.forward, x, weights, tile=tile)
    for a, b in zip(got, outputs, strict=True):
        check(a, b)
        assert a.stride() == torch.empty_like(x).stride()
    (total,) = run(ops.forward, x, weights, bias, summed=True, tile=tile)
    check(total, sum(outputs) + bias.double().view(-1, 1, 1))


def test_who_marches():
    x, block = torch.empty(16, 1, 128, 128, dtype=torch.bfloat16), tensors(BLOCK, (1, 1, 1, 1))[1]
    square = tensors([(51, 51)], (1, 1, 1, 1))[1]
    assert ops.tiles(x, block)[2] == ops.MARCHING
    assert ops.tiles(x, square)[2] == (128, 32, 4, False)
    assert ops.MARCHING not in ops.tiles(x[:4], block)  # segments of 8 lines
    assert ops.MARCHING not in ops.tiles(x[..., :32, :32], block)
    assert ops.MARCHING not in ops.tiles(x.float(), block)


def test_no_tile_is_larger_than_the_maps():
    Tile = ops.Tile
    half = torch.empty(4, 1, 128, 128, dtype=torch.bfloat16)
    assert ops.tiles(half, []) == [Tile(128, 64, 4), Tile(64, 64, 4), Tile(128, 32, 4)]
    assert ops.tiles(half[:1], []) == [Tile(64, 64, 4), Tile(32, 32, 4)]
    assert ops.tiles(half[:1, :, :16, :9], []) == [Tile(16, 16, 4)]
    assert ops.tiles(half.float(), []) == [Tile(128, 64, 8), Tile(64, 64, 8), Tile(64, 32, 4)]
    assert [tile.images for tile in ops.tiles(half[..., :16, :9], [])] == [4]
    large = torch.empty(4, 2**23, 16, 9, device='meta')
    assert ops.tiles(large, [])[0].images == 1  # 32 bits do not reach from image to image


def test_rows_of_a_kernel_in_several_programs(run_as_program):
    assert float(run_as_program(error_in_several_programs, interpret='1')) <= 2e-5


def error_in_several_programs() -> float:
    """Of weight gradients with few rows in a program, and tiles shared by a few programs."""
    x, weights, _, gradients = tensors([(9, 7), (7, 9)], (3, 1, 20, 40))
    expected = reference(x, weights, gradients)[2]
    errors = []
    for rows, programs in ((1, 14), (2, 16), (3, 1)):
        ops._rows_at_once, ops.PROGRAMS = lambda _, rows=rows: rows, programs
        got = ops.backward(x, weights, gradients, input_gradient=False)[1]
        for a, b in zip(got, expected, strict=True):
            errors.append(float((a - b).abs().max() / b.abs().max()))
    return max(errors)


def test_no_image_at_all(run):
    x, weights, bias, gradients = tensors([(5, 9), (3, 3)], (0, 2, 10, 20))
    assert [output.shape for output in run(ops.forward, x, weights)] == [x.shape] * 2
    assert run(ops.forward, x, weights, bias, summed=True)[0].shape == x.shape
    dx, dws = run(ops.backward, x, weights, gradients)
    assert dx.shape == x.shape
    assert all(torch.equal(dw, torch.zeros_like(weight)) for dw, weight in zip(dws, weights))


def test_a_kernel_of_another_device(run):
    x, weights, bias, _ = tensors([(3, 3)], (1, 1, 4, 4))
    with pytest.raises(ValueError, match='weight: expected device cpu of x, got meta'):
        run(ops.forward, x, [weights[0].to('meta')])
    with pytest.raises(ValueError, match='bias: expected device cpu of x, got meta'):
        run(ops.forward, x, weights, bias.to('meta'), summed=True)


def test_launches_of_a_block(run_as_program):
    """A few of a launch's microseconds each: they decide the time of the small stages."""
    nchw, nhwc = json.loads(run_as_program(launches_of_a_block, interpret='1'))
    assert nchw == [
        ['arrange', 'build_bands', 'convolve'],
        ['arrange', 'build_bands', 'convolve'],
        ['arrange', 'build_bands', 'convolve', 'arrange', 'correlate', 'collect'],
    ]
    assert nhwc == [
        ['arrange', 'build_bands', 'convolve', 'arrange'],
        ['arrange', 'build_bands', 'convolve', 'arrange'],
        ['arrange', 'build_bands', 'convolve', 'arrange', 'arrange', 'correlate', 'collect'],
    ]


def launches_of_a_block() -> str:
    """Names of the kernels that forward, sum and backward launch, in NCHW and in NHWC."""
    launch, names = ops._launch, []

    def record(kernel: str, *args, **options) -> None:
        names[-1][-1].append(kernel)
        launch(kernel, *args, **options)

    ops._launch = record
    for layout in (torch.contiguous_format, torch.channels_last):
        x, weights, bias, gradients = tensors([(9, 3), (3, 9), (3, 3)], (1, 2, 16, 16))
        x, *gradients = (t.contiguous(memory_format=layout) for t in (x, *gradients))
        names.append([[]])
        ops.forward(x, weights)
        names[-1].append([])
        ops.forward(x, weights, bias, summed=True)
        names[-1].append([])
        ops.backward(x, weights, gradients)
    return json.dumps(names)


def test_compiled_in_a_full_graph(run_as_program):
    assert float(run_as_program(error_in_a_full_graph, interpret='1')) <= 2e-5


def error_in_a_full_graph() -> float:
    x, weights, _, gradients = tensors([(5, 9), (3, 3)], (1, 2, 8, 8))
    outputs, dx, _ = reference(x, weights, gradients)
    compiled = torch.compile(
        lambda x, *weights: depthwise_conv2d_branches(x, weights, 'triton'),
        fullgraph=True,
        backend='aot_eager',
    )
    x.requires_grad_()
    got = compiled(x, *weights)
    got_dx = torch.autograd.grad(got, x, gradients)
    return max(float((a - b).abs().max()) for a, b in zip([*got, *got_dx], [*outputs, dx]))


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.bfloat16, 2**-7), (torch.float16, 2**-11)])
def test_half_precision_is_rounded_once(run, dtype, tolerance):
    """To nearest; of bfloat16 the interpreter cuts off the lower bits instead."""
    x, weights, _, gradients = tensors([(31, 5), (5, 5)], (2, 1, 20, 24), dtype)
    check_all(run, x, weights, gradients, tolerance)


@pytest.mark.parametrize('shape', [(2, 3, 10, 12), (1, 1, 12, 70)])
@pytest.mark.parametrize('has_bias', [False, True])
def test_sum_of_the_branches(run, shape, has_bias):
    x, weights, bias, gradients = tensors([(5, 31), (31, 5), (5, 5)], shape)
    outputs, dx, dws = reference(x, weights, gradients[:1] * 3)
    (got,) = run(ops.forward, x, weights, bias if has_bias else None, summed=True)
    check(got, sum(outputs) + (bias.double().view(-1, 1, 1) if has_bias else 0))
    got_dx, got_dws = run(ops.backward, x, weights, gradients[:1])
    check(got_dx, dx)
    for a, b in zip(got_dws, dws, strict=True):
        check(a, b)


@pytest.mark.parametrize('layout', ['nhwc', 'nhwc_sliced', 'transposed', 'sliced', 'expanded'])
def test_layouts(run, layout):
    x, weights, _, (gradient,) = tensors([(5, 9)], (2, 4, 10, 20))
    change = dict(
        nhwc=lambda t: t.contiguous(memory_format=torch.channels_last),
        transposed=lambda t: t.transpose(2, 3),
        nhwc_sliced=lambda t: t.contiguous(memory_format=torch.channels_last)[:, 1:3],
        sliced=lambda t: t[:, 1:3, 1:, ::2],
        expanded=lambda t: t[:, :, :1, :1].expand_as(t),
    )[layout]
    x, gradient = change(x), change(gradient)
    weights = [weight[: x.shape[1]] for weight in weights]
    outputs, dx = check_all(run, x, weights, [gradient])
    expected = torch.channels_last if 'nhwc' in layout else torch.contiguous_format
    assert all(t.is_contiguous(memory_format=expected) for t in (*outputs, dx))


def test_only_what_is_wanted(run):
    x, weights, _, gradients = tensors([(3, 5)], (1, 1, 6, 7))
    dx, dws = run(ops.backward, x, weights, gradients)
    assert run(ops.backward, x, weights, gradients, True, False)[1] is None
    only = run(ops.backward, x, weights, gradients, False, True)
    assert only[0] is None
    assert torch.equal(only[1][0], dws[0])
    assert torch.equal(run(ops.backward, x, weights, gradients, True, False)[0], dx)


def test_availability_under_the_interpreter(run):
    assert run(ops.available, torch.zeros(1, 1, 2, 2))
    assert not run(ops.available, torch.zeros(1, 1, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ('dtypes', 'message'),
    [
        ((torch.float64, torch.float64), 'expected float32, float16 or bfloat16, got torch.float6'),
        ((torch.float16, torch.float32), 'weight: expected dtype torch.float16 of x, got torch.fl'),
    ],
)
def test_wrong_dtypes(run, dtypes, message):
    x, weight = torch.zeros(1, 1, 4, 4, dtype=dtypes[0]), torch.zeros(1, 1, 3, 3, dtype=dtypes[1])
    with pytest.raises(ValueError, match=message):
        run(ops.forward, x, [weight])
    with pytest.raises(ValueError, match=message):
        run(ops.backward, x, [weight], [x])


def test_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match='expected x on a GPU, got the CPU'):
        ops.forward(x, [torch.zeros(1, 1, 3, 3)])
    assert not ops.available(x)


def test_interpreter_switched_on_too_late(run_as_program):
    assert 'was set after' in run_as_program(error_of_a_late_switch)


def error_of_a_late_switch() -> str:
    ops._kernels()
    os.environ['TRITON_INTERPRET'] = '1'
    try:
        ops.check(torch.zeros(1, 1, 4, 4))
    except ValueError as error:
        return str(error)
    return 'no error'


@pytest.mark.parametrize(
    ('capturing', 'message'), [(True, 'make one such call before'), (False, 'not permitted')]
)
def test_a_cuda_graph_around_the_first_call(monkeypatch, capturing, message):
    def launch(*args, **options):
        raise RuntimeError('operation not permitted when stream is capturing')

    monkeypatch.setattr(ops, '_kernels', lambda: SimpleNamespace(arrange={(1,): launch}))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: capturing)
    monkeypatch.setattr(torch.cuda, 'device_of', lambda tensor: nullcontext())
    with pytest.raises(RuntimeError, match=message):
        ops._launch('arrange', SimpleNamespace(is_cuda=True), (1,))


@pytest.mark.parametrize(
    ('version', 'message'), [('3.3.1', 'triton 3.4 or newer, got 3.3.1'), (None, 'not installed')]
)
def test_triton_missing_or_too_old(monkeypatch, version, message):
    module = version and SimpleNamespace(__version__=version)  # None: an import fails
    monkeypatch.setitem(sys.modules, 'triton', module)
    with pytest.raises(ValueError, match=message):
        ops._kernels()


def golden_error(options: str, checkpoint: str, arrays: str, deploy: str) -> float:
    """Largest error of the model's stages, relative to the reference's largest output."""
    init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
    model = SLaK(**json.loads(options), conv_backend='triton', init_cfg=init_cfg)
    model.init_weights()
    model.eval()
    if deploy == 'True':
        model.switch_to_deploy()
    stages = {}
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda _m, _x, out, i=i: stages.update({f'stage{i}': out}))
    expected = np.load(arrays)
    with torch.no_grad():
        model(torch.from_numpy(expected['input']))
    return max(
        float(abs(stage.numpy() - expected[key]).max() / abs(expected[key]).max())
        for key, stage in stages.items()
    )


@pytest.mark.parametrize(
    ('name', 'deploy'),
    [('slak_decomposed_sparse40', False), ('slak_decomposed', True), ('slak_square7', False)],
)
def test_outputs_equal_the_reference_implementation(run_as_program, name, deploy):
    # This file is run as a program as well, which does not find `tests`: not at its top.
    from tests.golden import GOLDEN, slak_options

    files = str(GOLDEN / f'{name}.pth'), str(GOLDEN / f'{name}_expected.npz')
    arguments = json.dumps(slak_options(name)), *files, str(deploy)
    output = run_as_program(golden_error, *arguments, interpret='1')
    assert float(output.splitlines()[-1]) <= 1e-5


if __name__ == '__main__':
    print(globals()[sys.argv[1]](*sys.argv[2:]))
