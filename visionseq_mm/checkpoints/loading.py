"""From a checkpoint's tensors, whatever their names, to a backbone's."""

import logging
import re
from collections.abc import Mapping

from mmengine.logging import print_log
from torch import Tensor


class CheckpointMismatchError(RuntimeError):
    """A checkpoint that is not this backbone's."""


def weights_key(checkpoint, prefer_ema=False):
    """The entry of ``checkpoint`` that holds its weights; None: it is bare.

    Args:
        checkpoint (Mapping): What the file held, or a state dict.
        prefer_ema (bool): Where both 'model' and 'model_ema' are there, which
            one to take.
    """
    nested = [k for k in ('model', 'model_ema', 'state_dict') if _has_tensors(checkpoint.get(k))]
    if prefer_ema and 'model_ema' in nested:
        return 'model_ema'
    return nested[0] if nested else None


def _has_tensors(entry):
    return isinstance(entry, Mapping) and any(isinstance(v, Tensor) for v in entry.values())


def select_weights(checkpoint, prefer_ema=False):
    """Tensors of a checkpoint: bare, or under 'model', 'model_ema' or 'state_dict'.

    Args:
        checkpoint, prefer_ema: See :func:`weights_key`; a choice between
            'model' and 'model_ema' is logged.

    Returns:
        dict: {name: tensor}, without the prefix of a DistributedDataParallel
        and without what is no tensor.

    Raises:
        CheckpointMismatchError: For a checkpoint with entries, but no tensor.
    """
    key = weights_key(checkpoint, prefer_ema)
    if all(_has_tensors(checkpoint.get(k)) for k in ('model', 'model_ema')):
        print_log(f'The checkpoint holds both model and model_ema: took {key}.', logger='current')
    weights = checkpoint[key] if key else checkpoint
    tensors = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
    if checkpoint and not tensors:
        raise CheckpointMismatchError(
            'There are no weights in this checkpoint, neither by themselves nor under model, '
            f'model_ema or state_dict. It has {_listed(checkpoint)}.'
        )
    if all(k.startswith('module.') for k in tensors):
        tensors = {k.removeprefix('module.'): v for k, v in tensors.items()}
    return tensors


def rename(tensors, table):
    """Apply a table of ``names`` to {name: tensor}.

    Raises:
        CheckpointMismatchError: Where two names become one.
    """
    renamed, sources = {}, {}
    for source, tensor in tensors.items():
        name = source
        for pattern, replacement in table:
            if replacement is None:
                if re.search(pattern, name):
                    break
            else:
                name = re.sub(pattern, replacement, name)
        else:
            if name in renamed:
                raise CheckpointMismatchError(
                    f'The checkpoint has both {sources[name]} and {source}, names of the same '
                    f'tensor, {name}. Leave one of them out.'
                )
            renamed[name], sources[name] = tensor, source
    return renamed


def adapt(backbone, tensors, prefix=''):
    """Tensors of a checkpoint, renamed already, as ``backbone`` can load them.

    Converts what needs more than a new name, leaves out what this backbone
    does not build (the classifier, unused blocks), and checks the rest.

    Args:
        backbone (LoadsOfficialFiles): Its hooks ``convert_tensors``,
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
    own = _counted(backbone.state_dict())
    given = _counted(tensors)
    missing = [k for k in own if k not in given]
    unexpected = [k for k in given if k not in own]
    misshapen = [
        f'{k}: {tuple(given[k].shape)} in the checkpoint, {tuple(v.shape)} here'
        for k, v in own.items()
        if k in given and given[k].shape != v.shape
    ]
    matched = len(own) - len(missing) - len(misshapen)
    if matched < backbone.min_matched * max(len(own), len(given)):
        lines = [
            f'This checkpoint does not fit the backbone {type(backbone).__name__}: {matched} '
            f'tensors match in name and shape, of {len(own)} here and {len(given)} in the '
            f'checkpoint (min_matched={backbone.min_matched}).'
        ]
        for title, names in (
            ('missing', missing),
            ('unexpected', unexpected),
            ('misshapen', misshapen),
        ):
            if names:
                lines.append(f'{title} ({len(names)}): {_listed(names)}')
        lines.append(_advice(given, matched, prefix))
        raise CheckpointMismatchError('\n'.join(lines))
    if misshapen or missing:
        print_log(
            f'Loading a checkpoint: missing {missing}, misshapen {misshapen}',
            logger='current',
            level=logging.WARNING,
        )
    return tensors


class LoadsOfficialFiles:
    """Mixin of a backbone, before its module class: official files load as they were published.

    Whatever loads it, torch's ``load_state_dict``, mmengine's ``load_checkpoint`` or ``init_cfg``,
    alone or as a part of a model.
    """

    #: Table from ``visionseq_mm.checkpoints``: official names -> ours.
    official_names = ()
    #: Share of the backbone's tensors that a checkpoint must bring, and of the checkpoint's that
    #: must have a place here.
    min_matched = 0.95

    def prefer_ema(self):
        """Whether the published accuracy is that of a file's ``model_ema``."""
        return False

    def convert_tensors(self, tensors):
        """Hook for what a change of name cannot express; {our name: tensor} in and out."""
        return tensors

    def is_left_out(self, name):
        """Whether ``name`` is part of this arch that this instance does not build."""
        return False

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # torch's and mmengine's loaders both come here with a dict of their own, so that names
        # can be changed in place before the children read theirs.
        names = [k for k in state_dict if k.startswith(prefix)]
        found = {k[len(prefix) :]: state_dict.pop(k) for k in names}
        found = select_weights(found, self.prefer_ema())
        adapted = adapt(self, rename(found, self.official_names), prefix)
        state_dict.update({prefix + k: v for k, v in adapted.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def convert(backbone, checkpoint):
    """An official checkpoint as a state dict in our names.

    Loads it into ``backbone``, strictly, so that all of it must fit.

    Args:
        backbone (LoadsOfficialFiles): What it belongs to; overwritten.
        checkpoint (Mapping): What the file held.

    Returns:
        dict: {name: tensor}. With ``out_type='featmap'`` those of the
        backbone; with 'cls' those of mmpretrain's ImageClassifier with a
        LinearClsHead, ``backbone.*`` and ``head.fc.*``.

    Raises:
        CheckpointMismatchError: For another model's checkpoint, or 'cls'
            without a classifier.
    """
    weights = select_weights(checkpoint, backbone.prefer_ema())
    backbone.load_state_dict(weights)
    tensors = dict(backbone.state_dict())
    if backbone.out_type == 'featmap':
        return tensors
    names = rename(weights, backbone.official_names)
    if not {'head.fc.weight', 'head.fc.bias'} <= set(names):
        raise CheckpointMismatchError(
            'There is no classifier in this checkpoint: convert it for dense prediction instead.'
        )
    return {
        **{f'backbone.{k}': v for k, v in tensors.items()},
        'head.fc.weight': names['head.fc.weight'].flatten(1),  # SecViT's is a 1x1 convolution
        'head.fc.bias': names['head.fc.bias'],
    }


def _counted(tensors):
    """Without counters, which do not matter, and what no ImageNet file has: output norms, and the
    positions relative to a window that a ViT gets for dense prediction."""
    ends = ('num_batches_tracked', 'rel_pos_h', 'rel_pos_w')
    return {
        k: v for k, v in tensors.items() if not k.endswith(ends) and not k.startswith('out_norms.')
    }


def _listed(names, limit=8):
    names = list(names)
    rest = f', and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + rest


def _advice(given, matched, prefix):
    """What to do about a checkpoint of which ``matched`` tensors fit."""
    if prefix and not given:
        return (
            f'No tensor in it is named {prefix}*. A file of ImageNet weights belongs into the '
            "backbone, init_cfg=dict(type='Pretrained', checkpoint=...), not into load_from or "
            '--checkpoint of a whole model; for a classifier, tools/convert_checkpoint.py '
            '--task cls makes a file of a whole model from it.'
        )
    inner = next((k for k in given if 'backbone.' in k), None)
    if not matched and inner:
        part = inner[: inner.index('backbone.') + len('backbone.')]
        return (
            f'It is the checkpoint of a whole model: add prefix={part!r} to '
            "init_cfg=dict(type='Pretrained', ...)."
        )
    return (
        'Is it the file of another variant? Check arch, and version and traversal (ViL) or '
        'bidirectional (Vim). To load what fits and leave the rest as it is, lower min_matched.'
    )
