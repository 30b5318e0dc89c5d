"""NDIF's API, for gunicorn.

nnsight gives every object a ``save``, on which a part of anyio that is imported late stumbles: imported here first.
"""

import anyio._backends._asyncio  # noqa: F401
from ndif.services.api.app import app

__all__ = ["app"]
