"""How mmengine's FLOP analyser counts the ops, by the names they have in a trace of torch.jit.

``mmengine.analysis`` counts a multiplication and addition as one, torch's ``FlopCounterMode`` as
two. So these handles give half of what the ops have registered with torch, but for the selective
scan, which the field counts in single operations everywhere: 9 for each token, channel, state and
direction (state-spaces/mamba, issue 110). Importing ``visionseq_mm.registry`` is enough for
mmengine to know them.
"""

import torch
from torch.utils.flop_counter import flop_registry

from visionseq_mm.ops.vim_mixer import projection_flops


def _read(value):
    """A tensor's shape, what a constant is, a list of them; None where the trace does not say."""
    if value.node().kind() == 'prim::ListConstruct':
        return [_read(x) for x in value.node().inputs()]
    return value.type().sizes() if value.isCompleteTensor() else value.toIValue()


def _torch_flops(op, inputs):
    return flop_registry[getattr(torch.ops.visionseq_mm, op)](*inputs)


def _halved(op):
    return lambda inputs, outputs: _torch_flops(op, map(_read, inputs)) // 2


def _scan(inputs, outputs):
    return _torch_flops('selective_scan', map(_read, inputs))


def _mixer(inputs, outputs):
    tokens, _, conv_weight, _, _, dt_proj, _, A, *_ = inputs = [_read(x) for x in inputs]
    projections = projection_flops(tokens, A, conv_weight, dt_proj)
    return _torch_flops('vim_mixer', inputs) - projections // 2


def _attention(inputs, outputs):
    *tensors, num_clusters = (_read(value) for value in list(inputs)[:5])
    if num_clusters is None:  # it came from the image's size: as many clusters as tokens
        num_clusters = tensors[0][1]
    return _torch_flops('sec_attention', (*tensors, num_clusters)) // 2


#: {name in a trace: function of its inputs and outputs}, as ``set_op_handle`` takes them; None
#: leaves an op out: no counter has numbers for sorting and means, nor for products by element,
#: which ``rotary_2d`` is made of.
HANDLES = {
    'visionseq_mm::vim_mixer': _mixer,
    'visionseq_mm::selective_scan': _scan,
    'visionseq_mm::conv1d_silu': _halved('conv1d_silu'),
    'visionseq_mm::mlstm': _halved('mlstm'),
    'visionseq_mm::vil_mixer': _halved('vil_mixer'),
    'visionseq_mm::sec_attention': _attention,
    'visionseq_mm::depthwise_conv2d': _halved('depthwise_conv2d'),
    'visionseq_mm::sec_partition': None,
    'visionseq_mm::rotary_2d': None,
}
