"""Layer-wise and stage-wise learning-rate decay for any backbone with `get_layer_depth`."""

import re

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmslak.registry import OPTIM_WRAPPER_CONSTRUCTORS

KEYS = ('decay_type', 'decay_rate', 'num_layers')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Scales learning rates by `decay_rate ** (num_layers + 1 - id)`; 1-D parameters and biases get
    no weight decay.

    Layer-wise, the id is `backbone.get_layer_depth(name, 'backbone.')`'s. Stage-wise, it is 0 for
    the stem and for all `downsample_layers`, i + 1 in `stages.i`. Everything outside the backbone
    has num_layers + 1, so that heads learn at the full rate. Source: the layer decay of BEiT (arXiv
    2106.08254) as SLaK and ConvNeXt use it.

    `paramwise_cfg` takes:
        decay_type: 'layer_wise' or 'stage_wise'.
        decay_rate: Factor from one layer to the one below, in (0, 1].
        num_layers: The backbone's own when absent; layer-wise it must agree with that.

    Raises:
        ValueError: On unknown keys or values.
        TypeError: If the model has no backbone with `get_layer_depth`.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        cfg = dict(paramwise_cfg or {})
        unknown = sorted(set(cfg) - set(KEYS))
        if unknown:
            raise ValueError(
                f'paramwise_cfg: unknown key {unknown[0]!r}: expected {", ".join(KEYS)}'
            )
        if cfg.get('decay_type') not in ('layer_wise', 'stage_wise'):
            raise ValueError(
                "paramwise_cfg.decay_type: expected 'layer_wise' or 'stage_wise', "
                f'got {cfg.get("decay_type")!r}'
            )
        rate = cfg.get('decay_rate')
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg.decay_rate: expected a number in (0, 1], got {rate!r}')
        super().__init__(optim_wrapper_cfg, cfg)

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Appends to `params` a group for each id, with and without weight decay."""
        backbone = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(
                'LayerDecayOptimWrapperConstructor needs a model whose backbone has '
                f'get_layer_depth(param_name, prefix); {type(backbone).__name__} of '
                f'{type(module).__name__} has none'
            )
        num_layers = backbone.get_layer_depth('', 'backbone.')[1] - 2
        wanted = self.paramwise_cfg.get('num_layers', num_layers)
        stage_wise = self.paramwise_cfg['decay_type'] == 'stage_wise'
        if not stage_wise and wanted != num_layers:
            raise ValueError(
                f'paramwise_cfg.num_layers: {type(backbone).__name__} of this depth has '
                f'{num_layers}, got {wanted}'
            )
        num_layers = wanted

        groups = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            depth = num_layers + 1
            if name.startswith('backbone.'):
                depth = backbone.get_layer_depth(name, 'backbone.')[0]
                if stage_wise:
                    depth = _stage_depth(name, depth, num_layers)
            decays = parameter.ndim > 1 and not name.endswith('.bias')
            groups.setdefault((depth, decays), []).append((name, parameter))

        for (depth, decays), members in sorted(groups.items(), key=lambda item: item[0]):
            params.append(self._group(depth, decays, members, num_layers))

    def _group(
        self, depth: int, decays: bool, members: list[tuple[str, nn.Parameter]], num_layers: int
    ) -> dict:
        """One parameter group; schedulers keep the ratio between the groups' learning rates."""
        scale = self.paramwise_cfg['decay_rate'] ** (num_layers + 1 - depth)
        group = dict(
            params=[parameter for _, parameter in members],
            lr_scale=scale,
            param_names=[name for name, _ in members],
            group_name=f'layer_{depth}_{"decay" if decays else "no_decay"}',
        )
        if self.base_lr is not None:
            group['lr'] = self.base_lr * scale
        if not decays:
            group['weight_decay'] = 0.0
        print_log(
            f'{group["group_name"]}: {len(members)} parameters, lr scale {scale:.6g}', 'current'
        )
        return group


def _stage_depth(name: str, depth: int, num_layers: int) -> int:
    """Stage-wise id of a backbone's parameter, from its name and layer-wise depth."""
    stage = re.search(r'\bstages\.(\d+)\.', name)
    if '.downsample_layers.' in name or depth == 0:
        return 0
    return int(stage[1]) + 1 if stage else num_layers + 1
