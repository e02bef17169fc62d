"""What surrounds the steps of a run: metrics, evaluation, reports."""
