"""The comparison lab: contenders trained on the same work, sampled at the same calls, judged by the same judge."""
