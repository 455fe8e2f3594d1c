"""Fixtures of the tests with training frameworks."""

import pytest
from integrations.programs import forget


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget()
