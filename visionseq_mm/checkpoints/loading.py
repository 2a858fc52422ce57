"""From a checkpoint's tensors, whatever their names, to a backbone's."""

import logging
import re
from collections.abc import Mapping

from mmengine.logging import print_log


class CheckpointMismatchError(RuntimeError):
    """A checkpoint that is not this backbone's."""


def select_weights(checkpoint, prefer_ema=False):
    """Tensors of a checkpoint: bare, or under 'model', 'model_ema' or 'state_dict'.

    Args:
        checkpoint (Mapping): What the file held, or a state dict.
        prefer_ema (bool): Where both 'model' and 'model_ema' are there, which
            one to take; the choice is logged.

    Returns:
        dict: {name: tensor}, without the prefix of a DistributedDataParallel.
    """
    nested = [
        k for k in ('model', 'model_ema', 'state_dict') if isinstance(checkpoint.get(k), Mapping)
    ]
    if {'model', 'model_ema'} <= set(nested):
        key = 'model_ema' if prefer_ema else 'model'
        print_log(
            f'The checkpoint holds both model and model_ema: took {key}.',
            logger='current',
        )
        checkpoint = checkpoint[key]
    elif nested:
        checkpoint = checkpoint[nested[0]]
    if checkpoint and all(k.startswith('module.') for k in checkpoint):
        checkpoint = {k[len('module.') :]: v for k, v in checkpoint.items()}
    return dict(checkpoint)


def rename(tensors, table):
    """Apply a table of ``names`` to {name: tensor}."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table:
            if replacement is None:
                if re.search(pattern, name):
                    break
            else:
                name = re.sub(pattern, replacement, name)
        else:
            renamed[name] = tensor
    return renamed


def adapt(backbone, tensors, prefix=''):
    """Tensors of a checkpoint, renamed already, as ``backbone`` can load them.

    Converts what needs more than a new name, leaves out what this backbone
    does not build (the classifier, unused blocks), and checks the rest.

    Args:
        backbone (SequenceBackbone): Its hooks ``convert_tensors``,
            ``is_left_out`` and its ``min_matched`` are used.
        tensors (dict): {our name: tensor}.
        prefix (str): Where the backbone stands in the model that is loaded.

    Raises:
        CheckpointMismatchError: Where under ``min_matched`` of the backbone's
            tensors are there with the right shape, or under ``min_matched`` of
            the checkpoint's have a place in the backbone.
    """
    tensors = {k: v for k, v in tensors.items() if not k.startswith('head.')}
    tensors = backbone.convert_tensors(tensors)
    tensors = {k: v for k, v in tensors.items() if not backbone.is_left_out(k)}
    # Counters do not matter, and no ImageNet file has the norms of the outputs.
    own = {
        k: v
        for k, v in backbone.state_dict().items()
        if not k.endswith('num_batches_tracked') and not k.startswith('out_norms.')
    }
    given = {
        k: v
        for k, v in tensors.items()
        if not k.endswith('num_batches_tracked') and not k.startswith('out_norms.')
    }
    missing = [k for k in own if k not in given]
    unexpected = [k for k in given if k not in own]
    misshapen = [
        f'{k}: {tuple(getattr(given[k], "shape", ()))} in the checkpoint, {tuple(v.shape)} here'
        for k, v in own.items()
        if k in given and getattr(given[k], 'shape', None) != v.shape
    ]
    matched = len(own) - len(missing) - len(misshapen)
    share = matched / max(len(own), len(given))
    if share < backbone.min_matched:
        name = type(backbone).__name__
        lines = [
            f'This checkpoint does not fit the backbone {name}: {matched} tensors match in name '
            f'and shape, of {len(own)} here and {len(given)} in the checkpoint '
            f'(min_matched={backbone.min_matched}).'
        ]
        for title, names in (
            ('missing', missing),
            ('unexpected', unexpected),
            ('misshapen', misshapen),
        ):
            if names:
                rest = f', and {len(names) - 8} more' if len(names) > 8 else ''
                lines.append(f'{title} ({len(names)}): {", ".join(names[:8])}{rest}')
        lines.append(_advice(given, matched, prefix))
        raise CheckpointMismatchError('\n'.join(lines))
    if misshapen or missing:
        print_log(
            f'Loading a checkpoint: missing {missing}, misshapen {misshapen}',
            logger='current',
            level=logging.WARNING,
        )
    return tensors


def _advice(given, matched, prefix):
    """What to do about a checkpoint of which ``matched`` tensors fit."""
    if prefix and not given:
        return (
            f'No tensor in it is named {prefix}*. A file of ImageNet weights belongs into the '
            "backbone, init_cfg=dict(type='Pretrained', checkpoint=...), not into load_from or "
            '--checkpoint of a whole model; min_matched=0 would leave the backbone as it is.'
        )
    inner = next((k for k in given if 'backbone.' in k), None)
    if not matched and inner:
        part = inner[: inner.index('backbone.') + len('backbone.')]
        return (
            f'It is the checkpoint of a whole model: add prefix={part!r} to '
            "init_cfg=dict(type='Pretrained', ...)."
        )
    return (
        'Is it the file of another variant? Check arch, version and stride. To load what fits '
        'and leave the rest at its initialisation, lower min_matched.'
    )
