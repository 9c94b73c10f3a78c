"""The measuring, on methods and clocks that are made up, and once for real."""

import math
import time

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmslak.ops import DepthwiseConv2d, isolation, methods, native, spent, tuner, tuning
from mmslak.ops.layouts import NCHW, NHWC, layout_of
from mmslak.ops.methods import METHODS, Method
from mmslak.ops.plans import Case, Plan
from mmslak.ops.rule import rule
from tests.tuning_state import begin_anew


def case(*kernels, part='forward', summed=False, shape=(2, 4, 9, 8), dtype=torch.float32, **kwargs):
    layout = kwargs.pop('layout', NCHW)
    return Case(torch.device('cpu'), dtype, layout, shape, kernels, summed, part)


def by_parts(case):
    return tuner.measure(case, by_parts)


def forward(x, weights, bias=None, summed=False):
    return native.forward(x, weights, bias, summed, way='conv')


def backward(*arguments):
    return native.backward(*arguments, way='conv')


@pytest.fixture
def contest(monkeypatch):
    """Makes methods compete: name=(seconds, Method), on a clock that counts what they say.

    Seconds may be a function of x.
    """

    def start(**entries):
        clock, calls = [0.0], dict.fromkeys(entries, 0)

        def timed(name, function):
            def call(*arguments, **options):
                seconds = entries[name][0]
                clock[0] += seconds(arguments[0]) if callable(seconds) else seconds
                calls[name] += 1
                return function(*arguments, **options)

            return call

        made = {
            name: method._replace(
                forward=timed(name, method.forward), backward=timed(name, method.backward)
            )
            for name, (_, method) in entries.items()
        }
        monkeypatch.setattr(tuner, 'METHODS', made)
        monkeypatch.setattr(methods, 'METHODS', made)
        # By autograd, torch's own convolutions take the time of a forward and a backward call.
        monkeypatch.setattr(
            native, 'plain_branches', timed('conv', timed('conv', native.plain_branches))
        )

        def elapsed(call, device):
            before = clock[0]
            call()
            return clock[0] - before

        monkeypatch.setattr(tuner, 'elapsed', elapsed)
        return calls

    return start


GOOD = Method(forward, backward, shares=True)


def wrong_forward(*arguments):
    return [output * 1.01 for output in forward(*arguments)]


def unfinished_forward(x, weights, bias=None, summed=False):
    outputs = [torch.empty_like(output) for output in forward(x, weights, bias, summed)]
    for output, right in zip(outputs, forward(x, weights, bias, summed), strict=True):
        output.copy_(right)[:, -1, -1] = float('nan')
    return outputs


def raising(*arguments):
    raise RuntimeError('no kernel image')


def hungry(*arguments):
    raise MemoryError


def test_the_fastest_is_taken(contest):
    contest(good=(1.0, GOOD), better=(0.5, GOOD), conv=(2.0, GOOD))
    assert by_parts(case((5, 3))) == Plan(('better',))
    assert by_parts(case((5, 3), part='input')) == Plan((), ('better',))
    assert by_parts(case((5, 3), part='weight')) == Plan((), (), ('better',))


@pytest.mark.parametrize(
    'bad', [wrong_forward, unfinished_forward, raising, hungry], ids=lambda f: f.__name__
)
def test_a_bad_method_is_refused(contest, bad):
    contest(bad=(0.1, Method(bad, backward)), good=(1.0, GOOD), conv=(2.0, GOOD))
    assert by_parts(case((5, 3))) == Plan(('good',))
    assert by_parts(case((5, 3), (3, 5))) == Plan(('good',))


@pytest.mark.parametrize('of', ['input', 'weight'])
def test_a_wrong_gradient_is_refused(contest, of):
    def wrong(*arguments):
        dx, dws = backward(*arguments)
        if of == 'input':
            dx = dx if dx is None else -dx
        else:
            dws = dws and [dw * 1.01 for dw in dws]
        return dx, dws

    contest(bad=(0.1, Method(forward, wrong, shares=True)), good=(1.0, GOOD), conv=(2.0, GOOD))
    plan = by_parts(case((5, 3), part='training-xw'))
    # Both gradients by one call take less than each by its fastest method.
    assert plan == Plan(('bad',), ('good',), ('good',))
    assert by_parts(case((5, 3), part=of))[1 if of == 'input' else 2] == ('good',)


def test_a_method_that_needs_too_much_memory_is_not_called(contest):
    large = GOOD._replace(extra_bytes=lambda case: 5 * case.map_bytes)
    calls = contest(large=(0.1, large), good=(1.0, GOOD), conv=(2.0, GOOD))
    assert by_parts(case((5, 3))) == Plan(('good',))
    assert calls['large'] == 0


def test_a_slow_method_is_called_once_and_on_a_sample(contest):
    sizes = []

    def slow(x, *arguments):
        sizes.append(x.shape)
        return forward(x, *arguments)

    calls = contest(good=(1.0, GOOD), conv=(50.0, Method(slow, backward)))
    assert by_parts(case((5, 3), shape=(2, 40, 9, 8))) == Plan(('good',))
    assert calls['conv'] == 1
    assert sizes == [(1, 32, 9, 8)]


@pytest.mark.parametrize(('times', 'sides'), [(50, [1]), (6, [1, 2, 4, 8, 16]), (0.5, None)])
def test_smaller_maps_tell_what_would_take_minutes(contest, monkeypatch, times, sides):
    """A call of torch's own cannot be stopped. It is tried on maps that grow from one pixel on."""
    monkeypatch.setattr(tuner, 'BIG', 1e3)
    seen = []

    def watched(x, *arguments):
        seen.append(x.shape[2])
        return forward(x, *arguments)

    def seconds(x):
        return times * x.shape[2:].numel() / 256

    contest(good=(lambda x: x.shape[2:].numel() / 256, GOOD), conv=(seconds, Method(watched)))
    plan = by_parts(case((5, 3), shape=(1, 32, 16, 16)))
    if sides:
        assert plan == Plan(('good',))
        assert sorted(set(seen)) == sides
        assert seen.count(16) == (16 in sides)
    else:
        assert plan.plain


def test_what_a_call_takes_at_least_is_not_multiplied(contest):
    """A sample of one image says little of eight where most of its time is around the work."""

    def busy(x, *arguments):
        return forward(x, *arguments)

    contest(good=(3e-4, GOOD), conv=(2e-4, Method(busy, backward)))
    assert by_parts(case((5, 3), shape=(8, 320, 9, 8))) == Plan(('conv',), plain=True)


def test_torch_is_called_as_it_is_unless_another_is_clearly_faster(contest):
    contest(good=(0.98, GOOD), conv=(1.0, GOOD))
    assert by_parts(case((5, 3))) == Plan(('conv',), plain=True)
    assert by_parts(case((5, 3), part='training-xw')) == Plan(*(('conv',),) * 3, plain=True)
    contest(good=(0.9, GOOD), conv=(1.0, GOOD))
    assert by_parts(case((5, 3))) == Plan(('good',))


def test_torch_is_not_called_backward_where_its_forward_is_far_too_slow(contest):
    calls = contest(good=(1.0, GOOD), conv=(50.0, GOOD._replace(shares=False)))
    assert by_parts(case((5, 3), part='training-xw')) == Plan(*(('good',),) * 3)
    assert calls['conv'] == 4  # on a sample: the output, each gradient, and what the whole needs


def test_entries_that_only_meet_padding_are_not_left_to_torch(contest):
    contest(conv=(1.0, GOOD))
    assert by_parts(case((5, 3), shape=(1, 4, 3, 2))).plain
    assert not by_parts(case((7, 3), shape=(1, 4, 3, 2))).plain


def test_each_kernel_by_its_own_method(contest):
    def only(kernel):
        return lambda case: kernel in case.kernels and len(case.kernels) == 1

    own = Method(forward, backward)
    contest(
        tall=(0.5, own._replace(suits=only((5, 3)))),
        wide=(0.5, own._replace(suits=only((3, 5)))),
        joint=(1.2, GOOD),
        conv=(2.0, own),
    )
    assert by_parts(case((5, 3), (3, 5))) == Plan(('tall', 'wide'))
    plan = by_parts(case((5, 3), (3, 5), part='training-xw'))
    assert plan == Plan(*(('tall', 'wide'),) * 3)


def test_what_is_around_a_method_counts_too(contest, monkeypatch):
    contest(good=(0.9, GOOD), conv=(1.0, GOOD))
    elapsed, function = tuner.elapsed, tuner.DepthwiseFunction
    calls = []

    class Slow:
        @staticmethod
        def apply(*arguments):
            calls.append(arguments)
            return function.apply(*arguments)

    def slower(call, device):
        before = len(calls)
        return elapsed(call, device) + 0.5 * (len(calls) - before)

    assert by_parts(case((5, 3), part='training-xw')) == Plan(*(('good',),) * 3)
    monkeypatch.setattr(tuner, 'DepthwiseFunction', Slow)
    monkeypatch.setattr(tuner, 'elapsed', slower)
    assert by_parts(case((5, 3), part='training-xw')) == Plan(*(('conv',),) * 3, plain=True)


@pytest.mark.parametrize(
    ('best', 'times', 'seconds'),
    [
        (0.004, [0.04, 0.003, 0.001, 0.002], 0.001),  # the first one makes code
        (0.001, [0.06], 0.06),  # which does not take that long
        (0.001, [0.04, 0.003], 0.003),  # slower without it, too
        (0.0, [0.04], 0.04),  # asked for
    ],
)
def test_a_first_call_may_make_what_later_ones_use(best, times, seconds, monkeypatch):
    left = iter(times)
    monkeypatch.setattr(tuner, 'elapsed', lambda call, device: next(left))
    measurement = tuner._Measurement(case((5, 3)), None, math.inf)
    assert measurement.seconds('forward', ('conv',), measurement.data, best) == seconds
    assert not list(left)


def test_torch_and_a_plan_are_called_in_turns(contest, monkeypatch):
    """A method that is fast only after itself is not fast in a network."""
    contest(good=(0.5, GOOD), conv=(1.0, GOOD))
    assert by_parts(case((5, 3))) == Plan(('good',))
    elapsed, plain, calls = tuner.elapsed, native.plain_branches, []
    after_torch = [False]

    def noted(*arguments):
        calls.append(arguments)
        return plain(*arguments)

    def slower_after_torch(call, device):
        before = len(calls)
        seconds = elapsed(call, device)
        is_torch = len(calls) > before
        disturbed, after_torch[0] = after_torch[0] and not is_torch, is_torch
        return seconds + 2.0 * disturbed

    monkeypatch.setattr(native, 'plain_branches', noted)
    monkeypatch.setattr(tuner, 'elapsed', slower_after_torch)
    assert by_parts(case((5, 3))) == Plan(('conv',), plain=True)


def test_no_time(contest):
    calls = contest(good=(1.0, GOOD), conv=(1.0, GOOD))
    assert tuner.measure(case((5, 3)), by_parts, end=time.monotonic()) is None
    assert set(calls.values()) == {0}


@pytest.mark.parametrize('layout', [NCHW, NHWC])
def test_convolutions_that_never_end_are_not_called(monkeypatch, layout):
    """Of oneDNN, in NHWC; `never_ends` says which."""
    endless = case((17, 3), shape=(1, 16, 32, 32), dtype=torch.bfloat16, layout=layout)
    assert endless.never_ends
    for change in (
        dict(dtype=torch.float32),
        dict(shape=(1, 20, 32, 32)),
        dict(shape=(1, 16, 24, 24)),
        dict(kernels=((13, 13),)),
        dict(device=torch.device('cuda')),
    ):
        assert not endless._replace(**change).never_ends
    layouts = []

    def plain(x, weight, bias=None):
        layouts.append(layout_of(x))
        return x * 0 + weight.sum() * 0

    monkeypatch.setattr(native, 'plain', plain)
    monkeypatch.setattr(native, 'plain_branches', lambda x, weights, *_: [plain(x, weights[0])])
    for part in ('forward', 'input', 'weight', 'training-xw'):
        by_parts(endless._replace(part=part))
    assert set(layouts) == {NCHW}
    assert rule(endless).forward == ('fft',)


def test_no_memory_for_random_data(monkeypatch):
    monkeypatch.setattr(tuner, '_Data', hungry)
    assert by_parts(case((5, 3))) is None


def test_random_numbers_of_the_run_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    by_parts(case((5, 3), part='training-xw'))
    assert torch.equal(torch.rand(4), expected)


def test_hooks_and_modes_of_a_network_do_not_see_what_is_measured():
    def refuse(tensor):
        raise AssertionError

    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError

    with saved_tensors_hooks(refuse, refuse), Refusing():
        plan = by_parts(case((5, 3), (3, 3), part='training-xw'))
    assert plan.forward


@pytest.mark.parametrize('reentrant', [False, True])
def test_a_checkpointed_block_that_is_measured(monkeypatch, tmp_path, reentrant):
    begin_anew(monkeypatch, tmp_path)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(DepthwiseConv2d(4, (15, 3)), DepthwiseConv2d(4, (3, 15)))
    x = torch.randn(2, 4, 12, 10, requires_grad=True)
    with tuning('off'):
        expected = torch.autograd.grad(layers(x).square().sum(), x)[0]
    with tuning('on'):
        checkpoint(layers, x, use_reentrant=reentrant).square().sum().backward()
    assert spent()[0] >= 2
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('layout', [NCHW, NHWC])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ('kernels', 'summed'),
    [([(13, 3)], False), ([(3, 3), (15, 5), (5, 15)], False), ([(9, 3), (3, 9)], True)],
)
def test_what_is_chosen_is_right(kernels, summed, dtype, layout):
    """For real: every method that suits is tried, and passes."""
    one = case(*kernels, part='training-xw', summed=summed, dtype=dtype, layout=layout)
    plan = by_parts(one)
    names = {name for part in plan[:3] for name in part}
    assert names <= set(METHODS)
    data = tuner._Data(one, *one.shape[:2])
    assert tuner.is_right(data, 'forward', plan.forward)
    assert tuner.is_right(data, 'both', plan[1:3])
    for name, method in METHODS.items():
        if method.suits(one) and name not in ('flipped', 'native'):
            assert tuner.is_right(data, 'forward', (name,))
            if method.backward:
                assert tuner.is_right(data, 'both', ((name,), (name,)))


def test_a_method_that_ends_the_process_is_tried_in_another_one(monkeypatch):
    one = case((5, 3), part='training-xw')
    assert isolation.passes_alone('fft', one)
    assert not isolation.passes_alone('no such method', one)
    calls = []
    monkeypatch.setattr(isolation, '_try', lambda *arguments: calls.append(arguments))
    assert isolation.passes_alone('fft', one._replace(shape=(1, 4, 20, 20)))
    assert not calls


def test_a_method_that_fails_alone_is_left_out(contest, monkeypatch):
    calls = contest(risky=(0.1, GOOD._replace(alone=True)), conv=(1.0, GOOD))
    monkeypatch.setattr(tuner, 'passes_alone', lambda name, case: False)
    assert by_parts(case((5, 3))) == Plan(('conv',), plain=True)
    assert calls['risky'] == 0
