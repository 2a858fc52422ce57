import pytest


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder that has nothing to do with the checkout."""
    return tmp_path_factory.mktemp('elsewhere')
