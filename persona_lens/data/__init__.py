"""Data: tables, sources of datasets, forms of conversations, transcripts and their encoding, demonstrations."""
