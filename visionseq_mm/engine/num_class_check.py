"""Number of classes: that of the heads against that of the data."""

import re

from mmengine.hooks import Hook

from visionseq_mm.registry import HOOKS

#: Names of the heads of a segmentor; a wrapper puts 'module.' before them.
HEAD = re.compile(r'(?:module\.)*((?:decode|auxiliary)_head(?:\.\d+)?)')


@HOOKS.register_module()
class NumClassCheckHook(Hook):
    """For mmseg what mmdet's hook of this name is: ``num_classes`` must fit the data.

    Compared with ``metainfo.classes`` of the data set before a training (of
    both its data sets), a validation and a test.

    Raises:
        ValueError: A decode head or auxiliary head has another ``num_classes``.
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
