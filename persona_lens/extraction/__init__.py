"""Extraction: a trait and a model become persona vectors."""

from persona_lens.extraction.filtering import Filtered, filter_responses
from persona_lens.extraction.plan import ExtractionError, ExtractionSettings, plan_requests
from persona_lens.extraction.run import Extraction, extract, extraction_work, run_extraction

__all__ = [
    "Extraction",
    "ExtractionError",
    "ExtractionSettings",
    "Filtered",
    "extract",
    "extraction_work",
    "filter_responses",
    "plan_requests",
    "run_extraction",
]
