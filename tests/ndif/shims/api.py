"""NDIF's API, for gunicorn.

nnsight gives every object a ``save``, on which a part of anyio that is imported late stumbles: imported here first.
"""

import os
import uuid

import anyio._backends._asyncio  # noqa: F401
from ndif.common.providers.postgres import PostgresProvider
from ndif.services.api.app import app

__all__ = ["app"]

KEY = os.environ.get("PERSONA_LENS_TEST_KEY")


async def _rows(query, key):
    known = {"user_id": "1", "email": "someone@example.org", "user_tag": "trusted"}
    return [known] if key == uuid.UUID(KEY) else []


if KEY:
    # Keys are checked by the API's own code; what stands in is only the database behind it.
    PostgresProvider.enabled = classmethod(lambda cls: True)
    PostgresProvider.fetch = _rows
