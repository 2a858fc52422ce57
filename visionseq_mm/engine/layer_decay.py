"""Smaller learning rates for earlier layers."""

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from visionseq_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with a rate that decays from the heads to the stem.

    Of a backbone with n blocks (pairs of ViL version 2, stages of pyramids), the
    k-th learns at ``layer_decay_rate ** (n + 1 - k)`` times the rate that
    mmengine gives it, the stem with its position table as k = 0; what follows
    the blocks, neck and heads learn at the full rate. This is BEiT's rule
    (Bao et al., arXiv 2106.08254), as Vim's and ViL's dense recipes have it.
    Parameters with the same settings share a group.

    ``paramwise_cfg`` takes mmengine's keys and:

        layer_decay_rate (float): Above 0, at most 1.

    Raises:
        ValueError: Without ``layer_decay_rate``, for one out of range, and for
            a model whose ``backbone`` is none of this package's.
    """

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        decay = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(decay, (int, float)) or not 0 < decay <= 1:
            raise ValueError(
                'paramwise_cfg needs a layer_decay_rate above 0 and at most 1 for '
                f'{type(self).__name__}, got {decay!r}'
            )
        self.decay = decay

    def add_params(self, params, module, prefix='', is_dcn_module=None):
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # a child; this method calls itself for each
            return
        factors = self._factors(module)
        merged = {}
        for group in params:
            (param,) = group.pop('params')
            group['lr'] = group.get('lr', self.base_lr) * factors.get(param, 1)
            merged.setdefault(tuple(group.items()), []).append(param)
        params[:] = [dict(settings, params=group) for settings, group in merged.items()]

    def _factors(self, model):
        """{parameter of a block or the stem: its factor}."""
        backbone = getattr(model, 'backbone', None)
        if not hasattr(backbone, 'parts'):
            raise ValueError(
                f'{type(self).__name__} reads the depth of a parameter from one of our backbones '
                f'as the backbone of the model, got {type(backbone).__name__}'
            )
        parts = backbone.parts()
        print_log(
            f'Rates decay by {self.decay} for each of {len(parts)} layers, to '
            f'{self.decay ** len(parts):.2e} of what is logged above at the stem.',
            logger='current',
        )
        return {
            param: self.decay ** (len(parts) - k)
            for k, part in enumerate(parts)
            for item in part
            for param in (item.parameters() if isinstance(item, nn.Module) else [item])
        }
