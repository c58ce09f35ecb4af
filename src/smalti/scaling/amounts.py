"""Amounts as people write them: 1.3M pictures, 1e18 FLOPs, 41.3 GiB, 2.5 hours."""

import math

from smalti.errors import UserError

_FACTORS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


def parse_amount(text: str, name: str) -> float:
    """1.3M, 400K, 2B, 1e18 or 50000 as a number. name: the option it came from, for messages.

    Raises UserError for what is no number, not above 0 or not finite.
    """
    bare = text.strip().replace("_", "").replace(",", "")
    factor = _FACTORS.get(bare[-1:].upper()) if bare[-1:].isalpha() else 1.0
    try:
        amount = float(bare[:-1] if bare[-1:].isalpha() else bare) * (math.nan if factor is None else factor)
    except ValueError:
        amount = math.nan
    if math.isnan(amount):
        raise UserError(f"{name} {text!r} must be a number such as 50000, 400K, 1.3M, 2B or 1e18")
    if not 0 < amount < math.inf:
        raise UserError(f"{name} {text} must be above 0 and finite")
    return amount


def parse_count(text: str, name: str) -> int:
    """As parse_amount, of whole things. Raises UserError also for less than one."""
    count = round(parse_amount(text, name))
    if count < 1:
        raise UserError(f"{name} {text} must be at least 1")
    return count


def amount_text(amount: float) -> str:
    """1300000 as 1.3M; three digits."""
    for suffix in ("E", "P", "T", "G", "M", "K"):
        if amount >= 0.9995 * _FACTORS[suffix]:
            return f"{amount / _FACTORS[suffix]:.3g}{'B' if suffix == 'G' else suffix}"
    return f"{amount:.3g}"


def flops_text(flops: float) -> str:
    """Operations: 12.1 GFLOP up to PFLOP, past that 1.2e+20 FLOP."""
    if flops >= 1e18:
        return f"{flops:.3g} FLOP"
    for suffix in ("P", "T", "G", "M"):
        if flops >= _FACTORS[suffix]:
            return f"{flops / _FACTORS[suffix]:.3g} {suffix}FLOP"
    return f"{flops:.3g} FLOP"


def bytes_text(amount: float) -> str:
    """Bytes as GiB, or MiB below a tenth of one."""
    return f"{amount / 2**30:,.2f} GiB" if amount >= 0.1 * 2**30 else f"{amount / 2**20:,.1f} MiB"


def duration_text(seconds: float) -> str:
    """Seconds in the unit that suits them, up to days."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} minutes"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:,.1f} days"
