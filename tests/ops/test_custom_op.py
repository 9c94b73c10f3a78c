import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mmslak.models import SLaK
from mmslak.ops import (
    depthwise_conv2d,
    depthwise_conv2d_branches,
    depthwise_conv2d_sum,
    fft,
    rows,
    toeplitz,
)
from mmslak.ops import rule as rules
from mmslak.ops.plans import Case
from mmslak.ops.rule import rule

BACKENDS = ('auto', 'native', 'fft', 'toeplitz')
STRIPS = ((13, 3), (3, 13), (15, 15), (3, 3))

registered = pytest.mark.skipif(
    not hasattr(torch.library, 'custom_op'), reason='torch 2.1 has no torch.library.custom_op'
)


def inputs(sizes=STRIPS, n=2, channels=3, height=14, width=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, height, width, generator=generator, dtype=dtype)
    weights = [torch.randn(channels, 1, *s, generator=generator, dtype=dtype) for s in sizes]
    bias = torch.randn(channels, generator=generator, dtype=dtype)
    return x.requires_grad_(), [w.requires_grad_() for w in weights], bias.requires_grad_()


def reference(x, weight, bias=None):
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])


def nhwc(x):
    return x.contiguous(memory_format=torch.channels_last)


odd = st.integers(0, 15).map(lambda half: 2 * half + 1)


@pytest.mark.parametrize('backend', BACKENDS)
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.tuples(odd, odd), min_size=1, max_size=3),
    n=st.integers(1, 8),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_any_branches_on_any_map(backend, sizes, n, height, width, seed):
    x, weights, bias = inputs(sizes, n, 2, height, width, seed=seed)
    parts = [reference(x, weight) for weight in weights]
    outputs = depthwise_conv2d_branches(x, weights, backend)
    torch.testing.assert_close(outputs, parts)

    gradients = [torch.randn_like(x) for _ in parts]
    torch.testing.assert_close(
        torch.autograd.grad(outputs, (x, *weights), gradients),
        torch.autograd.grad(parts, (x, *weights), gradients, retain_graph=True),
    )

    total = depthwise_conv2d_sum(x, weights, bias, backend)
    expected = sum(parts) + bias.view(-1, 1, 1)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(
        torch.autograd.grad(total, (x, *weights, bias), gradients[0]),
        torch.autograd.grad(expected, (x, *weights, bias), gradients[0]),
    )


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('frozen', ['x', 'weights', 'first'])
def test_what_is_frozen_gets_no_gradient(backend, frozen):
    x, weights, _ = inputs()
    learnt = [x, *weights]
    for tensor in {'x': [x], 'weights': weights, 'first': weights[:1]}[frozen]:
        tensor.requires_grad_(False)
        learnt = [t for t in learnt if t is not tensor]
    outputs = depthwise_conv2d_branches(x, weights, backend)
    expected = [reference(x, weight) for weight in weights]
    torch.testing.assert_close(
        torch.autograd.grad(sum(o.square().sum() for o in outputs), learnt),
        torch.autograd.grad(sum(o.square().sum() for o in expected), learnt),
    )


@pytest.mark.parametrize('backend', BACKENDS)
def test_an_unused_branch_has_gradient_zero(backend):
    x, weights, _ = inputs()
    depthwise_conv2d_branches(x, weights, backend)[1].sum().backward()
    assert [int(w.grad.count_nonzero()) > 0 for w in weights] == [False, True, False, False]


@pytest.mark.parametrize('backend', BACKENDS)
def test_outputs_and_gradients_keep_the_layout(backend):
    for layout in (torch.contiguous_format, torch.channels_last):
        x, weights, _ = inputs(height=26)
        view = x.detach().contiguous(memory_format=layout).requires_grad_()
        outputs = depthwise_conv2d_branches(view, weights, backend)
        assert all(output.is_contiguous(memory_format=layout) for output in outputs)
        sum(outputs).sum().backward()
        assert view.grad.is_contiguous(memory_format=layout)


@registered
@pytest.mark.parametrize(
    ('backend', 'layout'),
    [
        ('native', torch.channels_last),
        ('fft', torch.contiguous_format),
        ('toeplitz', torch.channels_last),
    ],
)
def test_registration(backend, layout):
    x, weights, bias = inputs()
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    operator = torch.ops.mmslak.depthwise_branches
    torch.library.opcheck(operator, (x, weights, None, backend, False))
    torch.library.opcheck(operator, (x, weights, bias, backend, True))
    with torch.no_grad():
        gradients = [torch.randn_like(x) for _ in weights]
    backward = torch.ops.mmslak.depthwise_branches_backward
    arguments = [t.detach() for t in weights], gradients, backend
    for wanted in ((True, True), (False, True)):
        torch.library.opcheck(backward, (x.detach(), *arguments, *wanted))


@registered
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_registration_of_one_convolution(layout):
    x, weights, bias = inputs()
    x, weight = x.detach().contiguous(memory_format=layout), weights[0].detach()
    checks = ['test_schema', 'test_faketensor']  # it has no gradients
    operator = torch.ops.mmslak.convolution
    torch.library.opcheck(operator, (x, weight, bias.detach()), test_utils=checks)
    torch.library.opcheck(operator, (x, weight, None), test_utils=checks)


@registered
@pytest.mark.parametrize('backend', BACKENDS)
def test_fake_tensors(backend):
    with FakeTensorMode():
        x = nhwc(torch.empty(2, 8, 16, 12)).requires_grad_()
        weight = torch.empty(8, 1, 31, 5, requires_grad=True)
        output = depthwise_conv2d(x, weight, torch.empty(8), backend)
        assert (output.shape, output.stride()) == (x.shape, x.stride())
        output.sum().backward()
        assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


@registered
@pytest.mark.parametrize('device', ['cpu', 'mps', 'xpu'])
@pytest.mark.parametrize('backend', BACKENDS)
def test_autocast_of_any_device(device, backend):
    """On tensors without values, which take a device for granted."""
    with FakeTensorMode():
        sizes = (2, 8, 16, 12), (8, 1, 31, 5), (8,)
        x, weight, bias = (torch.empty(size, device=device) for size in sizes)
        assert depthwise_conv2d(x, weight, bias, backend).dtype == torch.float32
        with torch.autocast(device, torch.float16):
            output = depthwise_conv2d(x, weight, bias, backend)
            assert output.dtype == reference(x, weight, bias).dtype == torch.float16


@registered
@pytest.mark.parametrize(
    ('mode', 'compiler', 'backend'),
    [
        ('train', 'inductor', 'auto'),
        ('train', 'aot_eager', 'fft'),
        ('eval', 'aot_eager', 'auto'),
        ('deployed', 'aot_eager', 'fft'),
    ],
)
def test_compiled_block_equals_eager(mode, compiler, backend):
    torch.manual_seed(0)
    model = SLaK(
        dict(depths=[1], dims=[8]),
        kernel_sizes=(31,),
        width_factor=1.0,
        out_indices=(0,),
        layer_scale_init_value=1.0,
        conv_backend=backend,
    )
    block = model.stages[0][0].train(mode == 'train')
    if mode == 'deployed':
        model.switch_to_deploy()
    x = torch.randn(2, 8, 32, 32)

    def run(function):
        view = x.clone().requires_grad_()
        block.zero_grad()
        output = function(view)
        output.square().sum().backward()
        return output.detach(), view.grad, [p.grad for p in block.parameters()]

    expected = run(block)
    torch._dynamo.reset()
    got = run(torch.compile(block, backend=compiler, fullgraph=True))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@registered
@pytest.mark.parametrize(('side', 'ours'), [(11, False), (13, True)])
def test_small_kernels_of_compiled_graphs_are_plain_convolutions(side, ours):
    """Which a compiler can fuse."""
    targets = []

    def backend(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x, weight = torch.randn(1, 2, 16, 16), torch.randn(2, 1, side, 3)
    torch._dynamo.reset()
    got = torch.compile(depthwise_conv2d, backend=backend, fullgraph=True)(x, weight)
    torch.testing.assert_close(got, reference(x, weight), rtol=1e-4, atol=1e-4)
    assert any('mmslak' in target for target in targets) == ours
    assert any('conv2d' in target for target in targets) != ours


def test_second_derivatives_are_refused():
    x, weights, _ = inputs()
    output = depthwise_conv2d(x, weights[0])
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize('size', [(5, 51), (51, 5), (5, 5), (1, 31), (7, 201), (3, 300 + 1)])
@pytest.mark.parametrize('height', [1, 2, 100])
def test_rows(size, height):
    x, weights, bias = inputs([size, (3, 3)], 2, 2, height, 110, dtype=torch.float32)
    parts = [reference(x.double(), weight.double()) for weight in weights]
    got = rows.forward(x, weights)
    total = rows.forward(x, weights, bias, summed=True)[0]
    for a, b in zip([*got, total], [*parts, sum(parts) + bias.view(-1, 1, 1)], strict=True):
        assert float((a - b).abs().max() / b.abs().max()) <= 2e-5


@pytest.mark.parametrize('method', [fft, toeplitz])
def test_chunks_of_one_channel(method, monkeypatch):
    monkeypatch.setattr(method, 'CHUNK_BYTES', 1)
    x, weights, _ = inputs()
    parts = [reference(x, weight) for weight in weights]
    torch.testing.assert_close(method.forward(x, weights), parts)
    gradients = [torch.randn_like(x) for _ in parts]
    dx, dws = method.backward(x, weights, gradients)
    torch.testing.assert_close((dx, *dws), torch.autograd.grad(parts, (x, *weights), gradients))


def test_fourier_matrices_are_made_once(monkeypatch):
    """On a GPU each would be launches, in every call."""
    x, weights, _ = inputs([(5, 37), (37, 5)], height=41, width=43)
    first = fft.forward(x, weights)
    monkeypatch.setattr(torch, 'polar', None)  # what makes them
    assert all(map(torch.equal, fft.forward(x, weights), first))
    with torch.inference_mode():
        assert all(map(torch.equal, fft.forward(x, weights), first))


def test_fourier_matrices_of_inference_serve_training():
    x, weights, _ = inputs([(5, 39)], height=45, width=47)
    with torch.inference_mode():
        fft.forward(x, weights)
    output = depthwise_conv2d(x, weights[0], backend='fft')
    (dx,) = torch.autograd.grad(output.sum(), x)
    (expected,) = torch.autograd.grad(reference(x, weights[0]).sum(), x)
    torch.testing.assert_close(dx, expected)


def test_many_channels_in_a_chunk_on_a_gpu():
    x, weight = torch.empty(16, 124, 128, 128), torch.empty(124, 1, 51, 51)
    assert len(list(fft._Plan(x, [weight]).chunks())) == 124
    assert len(list(fft._Plan(x.to('meta'), [weight.to('meta')]).chunks())) == 1


def test_rule():
    def methods(side, *sizes, summed=False, layout=torch.contiguous_format, **options):
        x = torch.empty(1, 2, side, side, **options).contiguous(memory_format=layout)
        plan = rule(Case.of(x, [torch.empty(2, 1, *size) for size in sizes], summed))
        assert all(len(names) == 1 for names in plan[:3])
        return tuple(names[0] for names in plan[:3])

    block = (51, 5), (5, 51), (5, 5)
    assert methods(128, *block) == ('rows', 'fft', 'fft')
    assert methods(128, *block, summed=True) == ('fft', 'fft', 'fft')
    assert methods(64, *block) == ('native', 'native', 'fft')
    assert methods(32, *block) == ('native', 'native', 'toeplitz')
    assert methods(40, *block) == ('native', 'native', 'fft')
    assert methods(16, (51, 9), (9, 51)) == ('native', 'native', 'fft')
    assert methods(28, (51, 51)) == ('fft', 'fft', 'fft')
    assert methods(16, (51, 51)) == ('native', 'native', 'fft')
    assert methods(128, (7, 7)) == ('native', 'native', 'native')
    assert methods(128, (51, 51), device='meta') == ('conv', 'conv', 'conv')


@pytest.mark.parametrize('supported', [True, False])
def test_bfloat16_goes_through_the_fft_where_the_cpu_has_no_instructions_for_it(
    supported, monkeypatch
):
    monkeypatch.setattr(rules, '_has_bfloat16', lambda: supported)
    x, weight = (torch.empty(2, 2, 16, 16), torch.empty(2, 1, 51, 5))
    plan = rule(Case.of(x.bfloat16(), [weight.bfloat16()], False))
    assert plan[:3] == ((('native',),) * 2 + (('fft',),) if supported else (('fft',),) * 3)


def test_the_rule_is_what_was_measured_to_be_fast():
    """In benchmarks/results, on each of the cases; 'rows' is not among the methods timed there."""
    results = Path(__file__).parents[2] / 'benchmarks/results/epyc-avx512-2c'
    for case in json.loads((results / 'methods_cpu.json').read_text())['cases']:
        weights = [torch.empty(1, 1, *map(int, size.split('×'))) for size in case['kernels']]
        for layout, memory_format in (
            ('NCHW', torch.contiguous_format),
            ('NHWC', torch.channels_last),
        ):
            times = {name: by_layout[layout] for name, by_layout in case['milliseconds'].items()}

            def gradients(of_x, of_weights, times=times):
                if of_x == of_weights:
                    return times[of_x]['both gradients']
                return times[of_x]['input gradient'] + times[of_weights]['weight gradient']

            x = torch.empty(case['shape']).contiguous(memory_format=memory_format)
            (forward,), *chosen = rule(Case.of(x, weights, summed=False))[:3]
            fastest = min(gradients(a, b) for a in times for b in times)
            assert gradients(*(name for (name,) in chosen)) <= 1.2 * fastest, (case['name'], layout)
            if forward in times:
                fastest = min(by_part['forward'] for by_part in times.values())
                assert times[forward]['forward'] <= 1.2 * fastest, (case['name'], layout)
