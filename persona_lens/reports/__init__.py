"""The reports: one HTML file each, that shows a run's result, how sure it is, and how to repeat it."""
