"""The training loop and what it is made of: optimisers, learning-rate schedules, EMA, metrics."""
