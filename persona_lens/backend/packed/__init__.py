"""Edits and reads where a pass holds any tokens of any rows, as the passes of serving engines do."""
