"""What people read: sizes, times and factors with few digits, and texts from files."""

from __future__ import annotations

__all__ = ["few_digits", "printable", "size", "span", "time_of", "times"]

_SIZES = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_TIMES = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def few_digits(number: float) -> str:
    """Returns a number with three digits, or all those before the point."""
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.2f}" if abs(number) < 10 else f"{number:.1f}"


def size(num_bytes: float) -> str:
    """Returns bytes in the largest unit that they fill."""
    for unit, unit_bytes in _SIZES:
        if num_bytes >= unit_bytes:
            return f"{few_digits(num_bytes / unit_bytes)} {unit}"
    return f"{num_bytes:.0f} B"


def span(seconds: float) -> str:
    """Returns a length of time of a run: seconds, or minutes and hours."""
    if seconds < 90:
        return f"{few_digits(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def time_of(seconds: float) -> str:
    """Returns a short time in the largest unit that it fills: 1.25 ms."""
    for unit, unit_s in _TIMES:
        if seconds >= unit_s:
            return f"{few_digits(seconds / unit_s)} {unit}"
    return f"{few_digits(seconds / _TIMES[-1][1])} us" if seconds else "0 s"


def times(factor: float) -> str:
    """Returns how many times the mean something is: 1.4x."""
    return f"{factor:.2f}x" if factor < 10 else f"{factor:.0f}x"


def printable(text: str) -> str:
    """Returns a text from a file without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
