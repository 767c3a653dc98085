"""One server over a fake engine for all tests that leave it as it is."""

from collections.abc import Iterator

import pytest

from tests.server.fake import FakeEngine
from tests.server.running import Running, serving


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving(FakeEngine()) as running:
        yield running
