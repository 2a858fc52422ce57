"""Being here puts this folder on ``sys.path``, for the helpers that several folders share."""

import pytest
import torch
from mmengine.registry import DefaultScope


@pytest.fixture(scope='module')
def one_thread():
    """For many small calls, which are slower the more threads share them, busy cores above all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def default_scope_of_its_own():
    """A Runner in one test would leave its default scope to all later ones."""
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)
