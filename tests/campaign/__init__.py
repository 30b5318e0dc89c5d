"""Attacks that anyone can repeat: `make campaign`; what they found last is in docs/reliability.md."""
