"""What a training run needs, counted, measured and estimated: see scripts/plan_training.py."""
