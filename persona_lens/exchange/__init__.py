"""Exchange: vectors in the formats of other programs, in and out; and on the Hugging Face hub."""

from persona_lens.exchange.errors import ExchangeError
from persona_lens.exchange.form import Chosen, Imported, Stated
from persona_lens.exchange.hub import Pushed, pull_vectors, push_vectors
from persona_lens.exchange.registry import FORMATS, export_vectors, import_vectors
from persona_lens.exchange.repeng import from_control_vector, to_control_vector
from persona_lens.exchange.steering_vectors import from_steering_vector, to_steering_vector

__all__ = [
    "FORMATS",
    "Chosen",
    "ExchangeError",
    "Imported",
    "Pushed",
    "Stated",
    "export_vectors",
    "from_control_vector",
    "from_steering_vector",
    "import_vectors",
    "pull_vectors",
    "push_vectors",
    "to_control_vector",
    "to_steering_vector",
]
