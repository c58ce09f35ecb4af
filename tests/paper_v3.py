"""DPM-Solver-v3 from its paper, in the paper's own terms: eps, integrals from lambda_T, lists and no table.

Zheng et al. 2023, section 3 and algorithm 1, with the order of things of the authors' code.
"""

# ruff: noqa: E741 (the paper's letters)

import math
from itertools import pairwise

import numpy as np
import torch

_LARGEST_STEP = 0.005  # in lambda, of the Runge-Kutta rule that stands for the integrals


def statistics_at(ems, log_snr):
    """(l, s, b), linear between the nodes, each [elements]."""
    nodes = ems.log_snrs.numpy()
    columns = [value.numpy().reshape(len(nodes), -1) for value in (ems.l, ems.s, ems.b)]
    return [np.array([np.interp(log_snr, nodes, column) for column in value.T]) for value in columns]


def integrate(rate, state, ems, start, end):
    """The solution at end of dstate/dlambda = rate(lambda, state), whose kinks are at the nodes of ems."""
    inside = [node for node in ems.log_snrs.tolist() if start < node < end]
    for left, right in pairwise([start, *inside, end]):
        count = math.ceil((right - left) / _LARGEST_STEP)
        h = (right - left) / count
        for i in range(count):
            at = left + i * h
            k1 = rate(at, state)
            k2 = rate(at + h / 2, state + h / 2 * k1)
            k3 = rate(at + h / 2, state + h / 2 * k2)
            k4 = rate(at + h, state + h * k3)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def absolute_integrals(ems, log_snrs):
    """L, S, B, I and C from the first of log_snrs to each of them: arrays [len(log_snrs), elements]."""

    def rate(log_snr, state):
        l, s, b = statistics_at(ems, log_snr)
        L, S, B, _, _ = state
        return np.stack([l, s, np.exp(-S) * b, np.exp(L + S), np.exp(L + S) * B])

    state = np.zeros((5, len(statistics_at(ems, 0.0)[0])))
    states = [state]
    for start, end in pairwise(log_snrs):
        state = integrate(rate, state, ems, start, end)
        states.append(state)
    return np.stack(states, 1)


def weighted_powers(ems, start, end, count):
    """Integrals from start to end of e^(L + S - L_start - S_start) (lambda - start)^k / k! for k = 1 .. count."""

    def rate(log_snr, state):
        l, s, _ = statistics_at(ems, log_snr)
        powers = [(log_snr - start) ** k / math.factorial(k) * np.exp(state[0]) for k in range(1, count + 1)]
        return np.stack([l + s, *powers])

    elements = len(statistics_at(ems, start)[0])
    return integrate(rate, np.zeros((1 + count, elements)), ems, start, end)[1:]


def derivatives(log_snrs, g, pseudo):
    """g^(1) .. g^(n) at the first of n + 1 nodes."""
    n = len(g) - 1
    if n == 0:
        return []
    if pseudo:
        differences = [g]
        for i in range(1, n + 1):
            last = differences[-1]
            differences.append(
                [(last[j] - last[j + 1]) / (log_snrs[j] - log_snrs[i + j]) for j in range(len(last) - 1)]
            )
        return [math.factorial(i) * differences[i][0] for i in range(1, n + 1)]
    powers = np.array([[(at - log_snrs[0]) ** k for k in range(1, n + 1)] for at in log_snrs[1:]])
    solved = np.einsum("kj,j...->k...", np.linalg.inv(powers), np.stack([value - g[0] for value in g[1:]]))
    return [math.factorial(k + 1) * solved[k] for k in range(n)]


def paper_v3(process, denoiser, x, times, ems, order, corrector, pseudo, lower_order_final):
    """x where the network is called, and where the solver ends: float64 [len(times), batch, elements]."""
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma, lam = (value.numpy() for value in (process.alpha(t), process.sigma(t), process.log_snr(t)))
    L, S, B, I, C = absolute_integrals(ems, lam.tolist())
    l = [statistics_at(ems, at)[0] for at in lam]

    def noise_prediction(x, i):
        estimate = denoiser(torch.from_numpy(x), t[i].expand(len(x))).numpy()
        return (x - alpha[i] * estimate) / sigma[i]

    def step(base, end, nodes, x, eps, pseudo):
        """x at node end from base = nodes[0], with the estimates at nodes."""
        f = [(sigma[j] * eps[j] - l[j] * x[j]) / alpha[j] for j in nodes]
        g = [np.exp(S[base] - S[j]) * f_j - np.exp(S[base]) * (B[j] - B[base]) for j, f_j in zip(nodes, f, strict=True)]
        moved = alpha[end] / alpha[base] * np.exp(L[base] - L[end]) * x[base]
        moved = moved - alpha[end] * np.exp(-L[end] - S[base]) * (I[end] - I[base]) * g[0]
        moved = moved - alpha[end] * np.exp(-L[end]) * (C[end] - C[base] - B[base] * (I[end] - I[base]))
        weights = weighted_powers(ems, lam[base], lam[end], len(nodes) - 1)
        for weight, g_k in zip(weights, derivatives([lam[j] for j in nodes], g, pseudo), strict=True):
            moved = moved - alpha[end] * np.exp(L[base] - L[end]) * weight * g_k
        return moved

    steps = len(times) - 1
    x = [x.numpy()]
    called_at, eps = [], []
    step_order = 0
    for i in range(steps):
        called_at.append(x[i])
        eps.append(noise_prediction(x[i], i))
        if corrector and step_order > 1:
            corrected = step(i - 1, i, [i - 1, i, *range(i - 2, i - step_order, -1)], x, eps, False)
            eps[i] = eps[i] + l[i] * (corrected - x[i]) / sigma[i]
            x[i] = corrected
        step_order = min(order, i + 1, steps - i if lower_order_final else order)
        x.append(step(i, i + 1, list(range(i, i - step_order, -1)), x, eps, pseudo))
    return np.stack([*called_at, x[-1]])
