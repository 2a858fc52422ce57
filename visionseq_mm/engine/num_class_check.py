"""Number of classes: that of the heads against that of the data."""

import re

from mmengine.hooks import Hook

from visionseq_mm.registry import HOOKS

#: Heads of mmseg, mmdet and mmpretrain, 'module.' before them in a wrapper. An RPN has one class.
HEAD = re.compile(
    r'(?:module\.)*((?:roi_head\.)?(?:decode|auxiliary|bbox|mask)_head(?:\.\d+)?|head)'
)


@HOOKS.register_module()
class NumClassCheckHook(Hook):
    """``num_classes`` of the heads must fit the data, for mmdet, mmseg and mmpretrain.

    Compared with ``metainfo.classes`` of the data set before a training (of
    both its data sets; mmdet's hook of this name looks at the second when it
    is validated), a validation and a test.

    Raises:
        ValueError: A head has another ``num_classes``.
    """

    def before_train(self, runner):
        self._check(runner.model, runner.train_dataloader.dataset, 'train_dataloader')
        if runner.val_loop is not None:
            self.before_val(runner)

    def before_val(self, runner):
        self._check(runner.model, runner.val_dataloader.dataset, 'val_dataloader')

    def before_test(self, runner):
        self._check(runner.model, runner.test_dataloader.dataset, 'test_dataloader')

    def _check(self, model, dataset, loader):
        classes = getattr(dataset, 'metainfo', {}).get('classes')
        if classes is None:  # of a data set that is none of ours
            return
        for path, module in model.named_modules():
            head = HEAD.fullmatch(path)
            number = getattr(module, 'num_classes', None)
            if head and number not in (None, len(classes)):
                raise ValueError(
                    f'model.{head[1]}.num_classes is {number}, but {loader}.dataset has '
                    f'{len(classes)} classes: {", ".join(classes)}. Set num_classes='
                    f'{len(classes)} for each head, or correct metainfo.classes.'
                )
