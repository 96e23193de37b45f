import pytest


@pytest.fixture(autouse=True)
def _all_uncounted(uncounted):
    """Counted are those of tests/e2e."""
