"""The scaling laws of one's own runs: what they are, how sure they are, and the next run that they plan."""
