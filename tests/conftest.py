"""Being here puts this folder on ``sys.path``, for the helpers that several folders share."""

import pytest
import torch


@pytest.fixture(scope='module')
def one_thread():
    """For many small calls, which are slower the more threads share them, busy cores above all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
