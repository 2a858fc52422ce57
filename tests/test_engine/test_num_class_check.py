"""The hook refuses heads and data sets that count different classes."""

from types import SimpleNamespace

import pytest
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from torch import nn

from visionseq_mm.engine import NumClassCheckHook
from visionseq_mm.registry import HOOKS


class Head(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes


class Segmentor(nn.Module):
    def __init__(self, decode=3, auxiliary=(3,)):
        super().__init__()
        self.backbone = Head(1000)  # a classifier's, which the data set does not concern
        heads = nn.ModuleList(map(Head, auxiliary))
        self.auxiliary_head = heads if len(heads) > 1 else heads[0]
        self.decode_head = Head(decode)


class Wrapped(nn.Module):
    """As DistributedDataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def data(count=3):
    names = [f'class {i}' for i in range(count)]
    return BaseDataset(metainfo=dict(classes=names), lazy_init=True)


def runner(model, train=None, val=None, test=None):
    loaders = {
        f'{name}_dataloader': SimpleNamespace(dataset=data() if dataset is None else dataset)
        for name, dataset in (('train', train), ('val', val), ('test', test))
    }
    return SimpleNamespace(model=model, val_loop=object(), **loaders)


@pytest.fixture
def hook():
    return HOOKS.build(dict(type='NumClassCheckHook'))


def everything(hook, runner):
    hook.before_train(runner)
    hook.before_val(runner)
    hook.before_test(runner)


def test_equal_numbers(hook):
    assert type(hook) is NumClassCheckHook
    everything(hook, runner(Segmentor()))
    everything(hook, runner(Wrapped(Segmentor(auxiliary=(3, 3)))))


@pytest.mark.parametrize('wrap', [lambda model: model, Wrapped, lambda m: Wrapped(Wrapped(m))])
@pytest.mark.parametrize(
    'model, head',
    [
        (dict(decode=4), 'decode_head'),
        (dict(auxiliary=(4,)), 'auxiliary_head'),
        (dict(auxiliary=(3, 4)), 'auxiliary_head.1'),
    ],
)
def test_head_with_another_number(hook, wrap, model, head):
    for when in (hook.before_train, hook.before_val, hook.before_test):
        with pytest.raises(ValueError) as caught:
            when(runner(wrap(Segmentor(**model))))
        message = str(caught.value)
        assert message.startswith(f'model.{head}.num_classes is 4, but '), message
        assert 'has 3 classes: class 0, class 1, class 2. Set num_classes=3' in message


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize(
    'wrap',
    [
        lambda dataset: dataset,
        lambda dataset: RepeatDataset(dataset, times=2, lazy_init=True),
        lambda dataset: ConcatDataset([dataset, dataset], lazy_init=True),
    ],
)
def test_data_set_with_another_number(hook, split, wrap):
    """The validation's too before a training."""
    spoilt = runner(Segmentor(), **{split: wrap(data(2))})
    begin = hook.before_test if split == 'test' else hook.before_train
    with pytest.raises(ValueError, match=rf'{split}_dataloader.dataset has 2 classes'):
        begin(spoilt)


class Detector(nn.Module):
    """With three box heads, as a cascade has them."""

    def __init__(self, boxes=(3, 3, 3), mask=3):
        super().__init__()
        self.rpn_head = Head(1)
        self.roi_head = nn.Module()
        self.roi_head.bbox_head = nn.ModuleList(map(Head, boxes))
        self.roi_head.mask_head = Head(mask)


@pytest.mark.parametrize(
    'model, head',
    [(dict(boxes=(3, 80, 3)), 'roi_head.bbox_head.1'), (dict(mask=80), 'roi_head.mask_head')],
)
def test_detector(hook, model, head):
    everything(hook, runner(Detector()))
    with pytest.raises(ValueError, match=rf'^model\.{head}\.num_classes is 80, but train'):
        hook.before_train(runner(Detector(**model)))


def test_training_without_validation(hook):
    without = runner(Segmentor())
    del without.val_dataloader
    without.val_loop = None
    hook.before_train(without)


def test_nothing_to_compare(hook):
    everything(hook, runner(Segmentor(decode=None), *[object()] * 3))
    everything(hook, runner(nn.Conv2d(1, 1, 1)))


def test_classifier(hook):
    """mmpretrain's head, in a wrapper too; its backbone's numbers do not matter."""
    model = nn.Module()
    model.backbone, model.head = Head(1000), Head(3)
    everything(hook, runner(model))
    model.head.num_classes = 4
    for each in (model, Wrapped(model)):
        with pytest.raises(ValueError, match=r'model\.head\.num_classes is 4, .* 3 classes'):
            hook.before_train(runner(each))
