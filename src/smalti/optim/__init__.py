"""How weights move: optimisers, learning-rate schedules and averages (EMA)."""
