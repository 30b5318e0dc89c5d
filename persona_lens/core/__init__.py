"""What everything else stands on: errors, files, text, progress, statistics. It knows nothing of models."""
