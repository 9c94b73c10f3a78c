"""What users hang on the convolutions of a large kernel takes effect, in every mode."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from mmslak.models import PeLK, SLaK
from tests.models.test_slak import randomise_norms, relative_error

SMALL = dict(
    arch=dict(depths=[2], dims=[8]),
    kernel_sizes=(13,),
    out_indices=0,
    layer_scale_init_value=1.0,
)
# Kind, its options, and the convolutions of a block.
FORMS = {
    'decomposed': (SLaK, {}, ('vertical.conv', 'horizontal.conv', 'small.conv')),
    'square': (SLaK, dict(decomposed=False), ('square.conv', 'small.conv')),
    'convnext': (SLaK, dict(decomposed=False, small_kernel=None), ('square.conv',)),
    'peripheral': (PeLK, dict(center=3), ('peripheral', 'small')),
    'one peripheral': (PeLK, dict(center=3, small_kernel=None), ('peripheral',)),
}
each_form = pytest.mark.parametrize('form', FORMS)


def build(form: str, **options) -> tuple[nn.Module, list[nn.Module]]:
    """A backbone, and the convolutions of its first block."""
    kind, own, _ = FORMS[form]
    torch.manual_seed(0)
    model = kind(**{**SMALL, **own, **options})
    randomise_norms(model)
    return model, convolutions(model, form)


def convolutions(model: nn.Module, form: str) -> list[nn.Module]:
    return [model.stages[0][0].large_kernel.get_submodule(name) for name in FORMS[form][2]]


def run(model: nn.Module, training: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs and gradients of the parameters outside of the pruned kernels."""
    torch.manual_seed(1)
    model.train(training).zero_grad()
    (y,) = model(torch.randn(2, 3, 32, 32))
    y.square().sum().backward()
    return y.detach(), [model.norm0.weight.grad, model.stages[0][0].pwconv1.weight.grad]


@each_form
@pytest.mark.parametrize('training', [True, False])
def test_hooks_see_inputs_and_outputs(form, training):
    model, convs = build(form)
    expected, seen = run(model, training), []
    model, convs = build(form)
    for i, conv in enumerate(convs):
        conv.register_forward_pre_hook(lambda module, args, i=i: seen.append((i, args[0].shape)))
        conv.register_forward_hook(lambda module, args, y, i=i: seen.append((i, y.shape)))
        conv.register_full_backward_hook(lambda *_, i=i: seen.append((i, 'gradient')))
    got = run(model, training)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    shape = torch.Size([2, 10 if len(FORMS[form][2][0].split('.')) == 2 else 3, 8, 8])
    assert [s for _, s in seen].count('gradient') == len(convs)
    assert [s for s in seen if s[1] != 'gradient'] == [
        (i, shape) for i in range(len(convs)) for _ in range(2)
    ]


@each_form
def test_a_hook_can_change_the_output(form):
    model, convs = build(form)
    (before,) = model.eval()(torch.ones(1, 3, 32, 32))
    for deploy in (False, True):
        if deploy:
            model.switch_to_deploy()
        handle = convs[0].register_forward_hook(lambda module, args, y: 100 * y.square())
        (after,) = model(torch.ones(1, 3, 32, 32))
        assert float((after - before).abs().max()) > 1e-3
        handle.remove()
        (again,) = model(torch.ones(1, 3, 32, 32))
        torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('form', ['decomposed', 'square', 'convnext'])
@pytest.mark.parametrize('part', ['', 'bn'])
@pytest.mark.parametrize('training', [True, False])
def test_hooks_of_branches_and_norms(form, part, training):
    model, _ = build(form)
    seen = []
    for branch in model.stages[0][0].large_kernel.children():
        branch.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    run(model, training)
    assert len(seen) == len(FORMS[form][2])


def prune_half(conv: nn.Module) -> None:
    prune.l1_unstructured(conv, 'weight', 0.5)


def quantise(conv: nn.Module) -> None:
    class Rounded(nn.Module):
        def forward(self, weight):
            return weight + (weight * 64).round().detach() / 64 - weight.detach()

    parametrize.register_parametrization(conv, 'weight', Rounded())


CHANGES = {
    'pruned': prune_half,
    'rounded': quantise,
    'weight norm': parametrizations.weight_norm,
    'spectral norm': parametrizations.spectral_norm,
    'weight norm by hooks': nn.utils.weight_norm,
}


@each_form
@pytest.mark.parametrize('change', CHANGES)
def test_weights_that_are_made_anew(form, change):
    """As a plain weight of that value, and trained through what makes it; then fused."""
    model, convs = build(form)
    for conv in convs:
        CHANGES[change](conv)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):  # what a step has changed has to arrive in the next
        run(model, True)
        learnt = [p for conv in convs for p in conv.parameters()]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learnt)
        optimizer.step()
    plain, others = build(form)
    state = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(state, strict=False)
    model.eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        got = model(x)[0]
        for conv, other in zip(convs, others, strict=True):
            other.weight.copy_(conv.weight)
            assert not torch.equal(other.weight, getattr(conv, 'weight_orig', other.weight + 1))
        expected = plain.eval()(x)[0]
        assert relative_error(got, expected) <= 1e-5
        if change == 'weight norm by hooks':
            with pytest.raises(ValueError, match='weight'):
                model.switch_to_deploy()
            return
        model.switch_to_deploy()
        assert relative_error(model(x)[0], expected) <= 1e-5
    plain.switch_to_deploy()
    assert model.state_dict().keys() == plain.state_dict().keys()


@each_form
def test_pruning_is_fused_as_the_last_step_left_it(form):
    model, convs = build(form)
    for conv in convs:
        prune_half(conv)
    with torch.no_grad():
        for conv in convs:
            conv.weight_orig.add_(1)  # nothing has run since
    expected = copy_of_pruned(model, form)
    model.eval().switch_to_deploy()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(model(x)[0], expected.eval()(x)[0]) <= 1e-5


def copy_of_pruned(model: nn.Module, form: str) -> nn.Module:
    plain, convs = build(form)
    for conv, other in zip(convs, convolutions(model, form), strict=True):
        conv.weight.data = other.weight_orig.detach() * other.weight_mask
    return plain


@pytest.mark.parametrize('form', ['decomposed', 'peripheral'])
@pytest.mark.parametrize('training', [True, False])
def test_another_layer_in_the_place_of_a_convolution(form, training):
    """As quantisation and adapters put it there."""

    class Skipped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.weight = inner.weight

        def forward(self, x):
            return x + self.inner(x)

    model, convs = build(form)
    expected = copy.deepcopy(model)
    convolutions(expected, form)[-1].weight.data[:, :, 2, 2] += 1
    kernel, name = model.stages[0][0].large_kernel, FORMS[form][2][-1]
    parent, _, last = name.rpartition('.')
    setattr(kernel.get_submodule(parent), last, Skipped(convs[-1]))
    torch.testing.assert_close(run(model, training), run(expected, training), rtol=1e-4, atol=1e-4)


@each_form
def test_recomputation_with_hooks(form):
    results = []
    for with_cp in (False, True):
        model, convs = build(form, with_cp=with_cp)
        for conv in convs:
            prune_half(conv)
        results.append([*run(model, True), *model.buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)
