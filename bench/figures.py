"""Figures as they are summed up and shown: percentiles, tables."""

from collections.abc import Iterable, Sequence


def percentiles(values: Iterable[float], percents: Sequence[float]) -> list[float]:
    """Of each percent, the smallest value that at least so many of them do not exceed (nearest rank).

    Args:
        values: at least one.
        percents: above 0 up to 100, to a tenth.

    Raises:
        ValueError: there are no values.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values to take a percentile of")
    # In whole tenths of a percent: as a float, 99.9 % of 1,000 is a little more than 999.
    return [ordered[max(1, -(-len(ordered) * round(percent * 10) // 1000)) - 1] for percent in percents]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown that is readable as it stands: the first column to the left, the others to the right."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    first, *others = widths
    lines = ["| " + " | ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) + " |" for row in cells]
    rule = "|".join(["", "-" * (first + 2), *("-" * (width + 1) + ":" for width in others), ""])
    return "\n".join([lines[0], rule, *lines[1:]])
