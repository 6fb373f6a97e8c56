"""What the package offers by name."""

from __future__ import annotations

import ndif_client
from ndif_client import errors


def test_every_exported_name_exists_and_is_listed_in_order() -> None:
    assert all(hasattr(ndif_client, name) for name in ndif_client.__all__)
    assert ndif_client.__all__ == sorted(ndif_client.__all__)


def test_the_exceptions_are_found_where_the_docs_say() -> None:
    assert issubclass(errors.GraphError, ndif_client.NdifError)
