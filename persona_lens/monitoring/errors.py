"""The error of monitoring."""

from __future__ import annotations

from persona_lens.errors import PersonaLensError


class MonitoringError(PersonaLensError):
    """What cannot be monitored or shown; where one row of a file is at fault, the message begins with its place."""
