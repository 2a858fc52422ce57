"""Smaller learning rates for earlier layers, and no weight decay where it does harm."""

import re

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor

from visionseq_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS

BACKBONE = 'backbone.'
#: What FSDP and activation checkpointing put into the names of what they wrap.
WRAPPERS = re.compile(r'_(?:fsdp|checkpoint)_wrapped_module\.')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with a rate that decays from the heads to the stem.

    Of a backbone with n blocks (pairs of ViL version 2, stages of pyramids), the
    k-th learns at ``layer_decay_rate ** (n + 1 - k)`` times the rate that
    mmengine gives it, the stem with its position table as k = 0; what follows
    the blocks, neck and heads learn at the full rate. This is BEiT's rule
    (Bao et al., arXiv 2106.08254), as Vim's and ViL's dense recipes have it.
    The backbone tells the depth, by mmpretrain's ``get_layer_depth``, so that
    those of mmpretrain will do too.

    Weights do not decay, in the whole model, where they have one dimension or none
    (norms, also those whose gain is 1 + weight, biases, Vim's D), nor what the
    backbone's ``no_weight_decay`` lists: position tables, Vim's A_log, ViL's
    gates, SecViT's layer scale; a ``decay_mult`` in mmengine's ``custom_keys``
    overrules this. Parameters with the same settings share a group.

    ``paramwise_cfg`` takes mmengine's keys and:

        layer_decay_rate (float): Above 0, at most 1; 1: the same rate for all.

    Raises:
        ValueError: Without ``layer_decay_rate``, for one out of range, for mmengine's
            multipliers of the decay of norms and biases unless they are 0, and for
            a model whose ``backbone`` does not know the depth of a parameter.
    """

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        for key in ('norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult'):
            if self.paramwise_cfg.get(key):
                raise ValueError(
                    f'paramwise_cfg has {key}={self.paramwise_cfg[key]}, but with '
                    f'{type(self).__name__} the weights of norms and biases do not decay: leave '
                    'it out, or give those that should a decay_mult in custom_keys'
                )
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
        backbone = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise ValueError(
                f'{type(self).__name__} asks the backbone of the model for the depth of a '
                f'parameter, but {type(backbone).__name__} has no get_layer_depth: take a '
                "backbone of visionseq_mm or mmpretrain, or optim_wrapper.constructor='"
                "DefaultOptimWrapperConstructor'"
            )
        names = {param: WRAPPERS.sub('', name) for name, param in module.named_parameters()}
        undecayed = self._undecayed(module)
        merged = {}
        for group in params:
            (param,) = group.pop('params')
            depth, num_depths = backbone.get_layer_depth(names[param], BACKBONE)
            scale = self.decay ** (num_depths - 1 - depth)
            group['lr'] = group.get('lr', self.base_lr) * scale
            if names[param] in undecayed:
                group['weight_decay'] = 0.0
            merged.setdefault(tuple(sorted(group.items())), []).append(param)
        params[:] = [dict(settings, params=group) for settings, group in merged.items()]
        if self.decay < 1:
            print_log(
                f'Rates decay by {self.decay} for each of {num_depths - 1} layers, to '
                f'{self.decay ** (num_depths - 1):.2e} of what is logged above at the stem.',
                logger='current',
            )

    def _undecayed(self, model):
        """Names whose weights do not decay, without those that a custom key decides on."""
        if self.base_wd is None:
            return set()
        names = {name for name, param in model.named_parameters() if param.ndim < 2}
        if hasattr(model.backbone, 'no_weight_decay'):
            names |= {BACKBONE + name for name in model.backbone.no_weight_decay()}
        names = {WRAPPERS.sub('', name) for name in names}
        return {name for name in names if 'decay_mult' not in self._custom_settings(name)}

    def _custom_settings(self, name):
        """Those of the longest key in ``name``, which mmengine obeys, too."""
        custom_keys = self.paramwise_cfg.get('custom_keys', {})
        for key in sorted(sorted(custom_keys), key=len, reverse=True):
            if key in name:
                return custom_keys[key]
        return {}
