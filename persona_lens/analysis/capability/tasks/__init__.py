"""Task files for lm-evaluation-harness that need no hub; the folder can be given to it with ``--include_path``."""
