"""Training runs: steps, records, checkpoints, processes, signals."""
