"""What a run reports: metrics, progress, goodput and profiles."""
