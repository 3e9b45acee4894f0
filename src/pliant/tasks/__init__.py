"""Real data, a baseline model and a metric, one file per task."""
