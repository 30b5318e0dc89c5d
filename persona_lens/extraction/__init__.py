"""Extraction: a trait and a model become persona vectors."""

from __future__ import annotations

from persona_lens.extraction.means import ExtractionError, ExtractionSettings, Filtered, filter_responses, plan_requests
from persona_lens.extraction.run import Extraction, extract, extraction_work

__all__ = [
    "Extraction",
    "ExtractionError",
    "ExtractionSettings",
    "Filtered",
    "extract",
    "extraction_work",
    "filter_responses",
    "plan_requests",
]
