"""Nearest neighbours among features: distances in blocks, and the radius to each row's k-th neighbour."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from smalti.evaluation.intervals import Features

_BLOCK = 1000  # rows whose distances are held at once


def squared_distances(a: Features, b: Features) -> NDArray[np.float64]:
    """Of each pair of rows: [rows of a, rows of b]."""
    products = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * (a @ b.T)
    return np.asarray(np.clip(products, 0, None))


def distance_blocks(a: Features, b: Features) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """(rows of a, their squared distances to all rows of b), block by block."""
    middle = b.mean(axis=0)  # of small numbers the differences of squares are more exact
    a, b = a - middle, b - middle
    for start in range(0, len(a), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(a)))
        yield rows, squared_distances(a[rows], b)


def nearest_others(rows: Features, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(indices, squared distances) of each row's `count` nearest other rows, nearest first: [rows, count] each."""
    indices = np.empty((len(rows), count), dtype=np.int64)
    distances = np.empty((len(rows), count))
    for block, squared in distance_blocks(rows, rows):
        squared[np.arange(len(squared)), block.start + np.arange(len(squared))] = np.inf
        nearest = np.argpartition(squared, count - 1, axis=1)[:, :count]
        near = np.take_along_axis(squared, nearest, axis=1)
        order = np.argsort(near, axis=1)
        indices[block] = np.take_along_axis(nearest, order, axis=1)
        distances[block] = np.take_along_axis(near, order, axis=1)
    return indices, distances


def radii(rows: Features, neighbours: int) -> NDArray[np.float64]:
    """Squared distance of each row to its k-th nearest other row: [rows]."""
    return nearest_others(rows, neighbours)[1][:, -1]


def nearest_rows(a: Features, b: Features) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(index of the nearest row of b, distance to it) for each row of a; the distance of equal rows is exactly 0."""
    indices = np.concatenate([squared.argmin(axis=1) for _, squared in distance_blocks(a, b)])
    return indices, np.asarray(np.linalg.norm(a - b[indices], axis=1))
