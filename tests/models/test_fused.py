"""Fused kernels are computed once and again after every change of what they are made of."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import EMAHook
from torch import nn
from torch.nn.utils import prune

from mmslak.models import PeLK, SLaK, fused
from tests.models.test_compile import compiles, whole_graphs

SMALL = dict(
    arch=dict(depths=[1, 1], dims=[8, 12]),
    kernel_sizes=(13, 9),
    out_indices=(0, 1),
    layer_scale_init_value=1.0,
)
FORMS = {
    'SLaK': (SLaK, {}),
    'square': (SLaK, dict(decomposed=False, norm_cfg=dict(type='BN', affine=False))),
    'PeLK': (PeLK, dict(center=3)),
    'strict PeLK': (PeLK, dict(center=3, strict_borders=True)),
}
each_form = pytest.mark.parametrize('form', FORMS)


@pytest.fixture(params=['values', 'versions'])
def by(request, monkeypatch) -> str:
    """How a change is seen: as on a CPU, or as on a GPU."""
    if request.param == 'versions':
        monkeypatch.setattr(fused, '_by_value', lambda tensor: False)
    return request.param


@pytest.fixture
def folds(monkeypatch) -> list[nn.Module]:
    """The large kernels that were fused, in order."""
    found = []
    for kind in {type(build(form).stages[0][0].large_kernel) for form in FORMS}:

        def counted(self, *args, _fused=kind._fused):
            found.append(self)
            return _fused(self, *args)

        monkeypatch.setattr(kind, '_fused', counted)
    return found


def build(form: str, **options) -> nn.Module:
    kind, own = FORMS[form]
    torch.manual_seed(0)
    model = kind(**{**SMALL, **own, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def picture() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    x = picture().to(next(model.parameters()).dtype)
    return torch.cat([y.flatten() for y in model(x)])


def weight_of(model: nn.Module) -> nn.Parameter:
    kernel = model.stages[0][0].large_kernel
    return next(p for p in kernel.parameters() if p.dim() == 4)


def norm_of(model: nn.Module) -> nn.BatchNorm2d:
    return next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.cat([y.flatten() for y in model(picture())]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def average(model: nn.Module) -> None:
    """Exchanges the weights as EMAHook does, followed by what MMEngine's loops do."""
    hook = EMAHook()
    runner = SimpleNamespace(model=model)
    hook.before_run(runner)
    for parameter in hook.ema_model.module.parameters():
        parameter.data.mul_(1.5)
    hook.before_val_epoch(runner)
    model.eval()


def halve(model: nn.Module) -> None:
    weight_of(model).data.mul_(0.5)


def share(model: nn.Module) -> None:
    """Another parameter in the same memory, with other values and the same number of changes."""
    old = weight_of(model)
    new = nn.Parameter(old.data)
    while new._version < old._version:
        new.detach().mul_(1.5)
    for module in model.modules():
        if module._parameters.get('weight') is old:
            module.weight = new


CHANGES = {
    'SGD': lambda m: step(m, torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)),
    'foreach': lambda m: step(m, torch.optim.AdamW(m.parameters(), 0.1, foreach=True)),
    'in place': lambda m: weight_of(m).detach().mul_(2),
    'data, then eval()': lambda m: [halve(m), m.eval()],
    'other memory': lambda m: setattr(weight_of(m), 'data', weight_of(m).data * 2),
    'shared memory': share,
    'state dict': lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
    'assigned': lambda m: m.load_state_dict(
        {k: v * 1.5 for k, v in m.state_dict().items()}, assign=True
    ),
    'EMAHook': average,
    'double': lambda m: m.double(),
    'rounded': lambda m: m.bfloat16().float(),
    'statistics': lambda m: [m.train()(picture()), m.eval()],
    'a mean': lambda m: norm_of(m).running_mean.add_(1),
    'eps': lambda m: setattr(norm_of(m), 'eps', 0.5),
    'embedding': lambda m: [
        p.detach().add_(1) for n, p in m.named_parameters() if 'stages.0' in n and p.dim() > 2
    ],
}
if hasattr(torch, '_fused_adamw_') and torch.__version__ >= '2.4':  # on the CPU since then
    CHANGES['fused'] = lambda m: step(m, torch.optim.AdamW(m.parameters(), 0.1, fused=True))


@each_form
@pytest.mark.parametrize('change', CHANGES)
def test_a_change_is_seen(form, change, by, folds):
    model = build(form)
    before = outputs(model)
    folds.clear()
    assert torch.equal(outputs(model), before)
    assert folds == []  # kept
    CHANGES[change](model)
    after = outputs(model)
    assert not torch.equal(after, before.to(after.dtype))
    assert torch.equal(after, outputs(copy.deepcopy(model)))


@each_form
def test_on_a_cpu_a_change_through_data_is_seen_at_once(form):
    model = build(form)
    before = outputs(model)
    halve(model)
    assert not torch.equal(outputs(model), before)
    assert torch.equal(outputs(model), outputs(copy.deepcopy(model)))


@each_form
def test_large_weights_are_compared_too(form):
    kernel = build(form, arch=dict(depths=[1], dims=[800]), kernel_sizes=(13,), out_indices=0)
    weight = weight_of(kernel)
    assert weight.numel() > 10000
    before = outputs(kernel)
    weight.data[-1, -1, -1, -1] += 1
    assert not torch.equal(outputs(kernel), before)


@each_form
def test_frozen_stages_keep_theirs_while_the_others_train(form, by, folds):
    model = build(form, frozen_stages=1).train()
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = None
        sum(y.square().sum() for y in model(picture())).backward()
    frozen = model.stages[0][0].large_kernel
    assert folds == [frozen]
    assert all(p.grad is not None for p in model.stages[1].parameters())
    assert torch.equal(outputs(model.eval()), outputs(copy.deepcopy(model)))


@each_form
def test_gradients_are_those_without_keeping(form, folds):
    """Weights that learn in eval mode are fused in every forward, after one that kept, too."""
    found = []
    for kept in (False, True):
        model = build(form)
        if kept:
            outputs(model)
        sum(y.square().sum() for y in model(picture())).backward()
        found.append([p.grad for p in model.stages.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each_form
def test_what_inference_mode_has_kept_serves_autograd(form, folds):
    model, x = build(form).requires_grad_(False), picture()
    with torch.inference_mode():
        model(x)
    folds.clear()
    x.requires_grad_()
    sum(y.square().sum() for y in model(x)).backward()
    assert folds == []
    assert float(x.grad.abs().max()) > 0


@each_form
def test_inference_tensors_are_fused_in_every_forward(form, folds):
    with torch.inference_mode():
        model = build(form)
    before = outputs(model)
    with torch.inference_mode():
        weight_of(model).mul_(2)
    assert not torch.equal(outputs(model), before)


@each_form
def test_copies_and_pickles_begin_without(form, by):
    model = build(form)
    before = outputs(model)
    for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        if twin.stages is not model.stages:
            assert twin.stages[0][0].large_kernel._kept is None
            with torch.no_grad():
                weight_of(twin).mul_(2)
            assert not torch.equal(outputs(twin), before)
        assert torch.equal(outputs(model), before)
    assert not any('kept' in name for name in model.state_dict())


@each_form
def test_pruning_and_its_end(form, by):
    model = build(form)
    before = outputs(model)
    kernel = model.stages[0][0].large_kernel
    conv = next(m for m in kernel.modules() if m._parameters.get('weight') is weight_of(model))
    prune.l1_unstructured(conv, 'weight', 0.5)
    pruned = outputs(model)
    assert not torch.equal(pruned, before)
    prune.remove(conv, 'weight')
    torch.testing.assert_close(outputs(model), pruned, rtol=1e-4, atol=1e-5)


@each_form
def test_transforms_of_torch_func(form):
    model, x = build(form), picture()
    before = outputs(model)
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(values):
        return sum(y.square().sum() for y in torch.func.functional_call(model, values, x))

    gradients = torch.func.grad(loss)(weights)
    model.zero_grad()
    loss(dict(model.named_parameters())).backward()
    name = next(n for n, p in model.named_parameters() if p is weight_of(model))
    torch.testing.assert_close(gradients[name], weight_of(model).grad, rtol=1e-4, atol=1e-4)
    several = {n: torch.stack([p, p]) for n, p in weights.items()}
    with torch.no_grad():
        torch.testing.assert_close(*torch.func.vmap(loss)(several), rtol=1e-4, atol=1e-4)
    assert model.stages[0][0].large_kernel._kept is None  # nothing of a transform outlives it
    model.eval().requires_grad_(False)
    gradient = torch.func.grad(lambda x: model(x)[0].square().sum())(x)
    assert float(gradient.abs().max()) > 0
    assert torch.equal(outputs(model), before)


@compiles
@each_form
def test_compiled_models_see_changes(form):
    model = build(form)
    outputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=whole_graphs)
    for _ in range(2):
        with torch.no_grad():
            got = torch.cat([y.flatten() for y in compiled(picture())])
        torch.testing.assert_close(got, outputs(model), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            weight_of(model).mul_(2)


@each_form
def test_deployment_frees_what_was_kept(form):
    model = build(form)
    before = outputs(model)
    model.switch_to_deploy()
    assert all(block.large_kernel._kept is None for stage in model.stages for block in stage)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-4)
