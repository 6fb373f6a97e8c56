"""Fixtures for the client's unit tests."""

from __future__ import annotations

from typing import Any

import pytest

from ndif_client import Session
from tests.unit.client.trees import make_session


@pytest.fixture
def session() -> Session:
    """A session that can record and never connects."""
    return make_session()


@pytest.fixture
def model(session: Session) -> Any:
    """The root module of its model."""
    return session.model
