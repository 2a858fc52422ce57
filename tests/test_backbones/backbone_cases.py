"""Small models for the tests that all backbones share."""

import torch
from torch import nn

from visionseq_mm.backbones import SECFasterViT, SECSwin, SecViT, ViL, Vim

PLAIN = dict(embed_dims=16, depth=4)
SEC_SWIN = dict(embed_dims=(16, 16, 32, 32), depths=(1, 2, 1, 1), num_heads=(2, 2, 4, 2))
PYRAMID = dict(**SEC_SWIN, layer_scale=(False, False, True, True))
SEC_FASTERVIT = {**SEC_SWIN, 'stem_dims': 8, 'num_heads': (4, 2)}

#: {name: (class, arguments)}: every model has four outputs, and table grids unlike the images'.
CASES = {
    'vim': (Vim, dict(arch=PLAIN, img_size=64)),
    'vim-stride8': (Vim, dict(arch=PLAIN, img_size=64, stride=8)),
    'vil1': (ViL, dict(arch=PLAIN, img_size=64, version=1)),
    'vil1-stride8': (ViL, dict(arch=PLAIN, img_size=64, version=1, stride=8)),
    'vil2': (ViL, dict(arch=PLAIN, img_size=64)),
    'secvit': (SecViT, dict(arch=PYRAMID, num_clusters=(4, 3, 2, 1))),
    'sec-swin': (SECSwin, dict(arch=SEC_SWIN, num_clusters=(4, 3, 2, 1))),
    'sec-fastervit': (SECFasterViT, dict(arch=SEC_FASTERVIT, num_clusters=(2, 1))),
}
#: One for each class and version.
PLAIN_KINDS = ('vim', 'vil1', 'vil2')
PYRAMIDS = ('secvit', 'sec-swin', 'sec-fastervit')
KINDS = PLAIN_KINDS + PYRAMIDS


def build(name, seed=0, **kwargs):
    """Model ``name`` with ``kwargs`` added, its weights as the constructor draws them."""
    torch.manual_seed(seed)
    cls, arguments = CASES[name]
    return cls(**{**arguments, **kwargs})


def randomize(model, seed=0):
    """Float64, in eval mode, with no parameter or buffer at a value that hides an error."""
    model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if tensor.dim() < 2 or tensor.shape[0] == 1 or name.endswith('_log'):
                tensor += 0.2 * noise
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.abs_().add_(0.1)
    return model


def image(height, width, batch=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=dtype)


def loss_of(outputs):
    """A number to which every element of every output contributes with another weight."""
    total = 0
    for i, out in enumerate(outputs):
        generator = torch.Generator().manual_seed(i)
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        total = total + (out * weight.to(out.dtype)).sum()
    return total


def step_and_count(model, picture):
    """Gradients of all parameters, and the bytes that are kept for them besides these."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = loss_of(model(picture))
    loss.backward()
    return [p.grad for p in model.parameters()], sum(sizes.values())


def gradients(model, *inputs):
    """Outputs, and {parameter name: gradient or None} of their :func:`loss_of`."""
    model.zero_grad(set_to_none=True)
    outputs = model(*inputs)
    loss_of(outputs).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}
