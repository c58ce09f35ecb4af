"""Judging samples: classifiers of labelled pictures, metrics of features with intervals, result cards."""
