"""Fixtures of the driver conformance suite, for the tests that run inside of `scripts/kvm-lab`."""

import pytest

from tests.conformance.conftest import idle, rig

__all__ = ["idle", "rig"]


@pytest.fixture(scope="session")
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(driver, form of its layers), which each module gives for itself."""
    found: tuple[str, str] = request.param
    return found
