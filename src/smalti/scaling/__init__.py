"""The scaling lab: what a run will cost, and how loss follows compute."""
