"""Judging samples: a classifier of the digits and the Frechet distance in its features."""
