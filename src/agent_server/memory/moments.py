"""Dates that a query names, and how far a moment is from them.

Leans on the standard library. Refuses to guess: a word that is only sometimes a month ("may",
"march") counts when it is written like one. English, and dates of ISO 8601.
"""

import re
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Final

_MONTHS: Final = (
    "january february march april may june july august september october november december"
).split()
_MONTH = "|".join(f"{name}|{name[:3]}" for name in _MONTHS) + "|sept"
_YEAR = r"(?:19|20)\d\d"
_ISO = re.compile(rf"\b({_YEAR})-(\d\d)(?:-(\d\d))?\b")
_DAY_FIRST = re.compile(
    rf"\b(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?({_MONTH})\b\.?(?:,?\s+({_YEAR}))?", re.IGNORECASE
)
_MONTH_FIRST = re.compile(
    rf"\b({_MONTH})\b\.?(?:\s+(\d{{1,2}})(?:st|nd|rd|th)?\b(?!\d))?(?:,?\s+(?:of\s+)?({_YEAR}))?",
    re.IGNORECASE,
)
_BARE_YEAR = re.compile(rf"\b(?:in|of|during|since|year)\s+({_YEAR})\b", re.IGNORECASE)
_RELATIVE = re.compile(
    r"\b(today|yesterday|this (?:week|month|year)|last (?:week|month|year))\b", re.IGNORECASE
)
_LATEST = re.compile(
    r"\b(latest|newest|most recent(?:ly)?|recent(?:ly)?|currently|these days|right now|as of now)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Period:
    """From ``start`` on, before ``end``; of every year when ``yearly``."""

    start: date
    end: date
    yearly: bool = False

    def days_from(self, moment: datetime) -> int:
        """Days between ``moment`` and the period; 0 inside."""
        day = moment.date()
        if not self.yearly:
            return _gap(day, self.start, self.end)
        shifts = range(day.year - self.start.year - 1, day.year - self.start.year + 2)
        return min(_gap(day, _years(self.start, n), _years(self.end, n)) for n in shifts)


def periods_in(text: str, now: datetime) -> list[Period]:
    """The periods that ``text`` names, each once."""
    found: dict[Period, None] = {}
    rest = text
    for pattern, read in (
        (_ISO, lambda g: _period(int(g[0]), int(g[1]), _number(g[2]))),
        (_DAY_FIRST, lambda g: _period(_number(g[2]), _month(g[1]), int(g[0]))),
        (_MONTH_FIRST, lambda g: _period(_number(g[2]), _month(g[0]), _number(g[1]))),
        (_BARE_YEAR, lambda g: _period(int(g[0]), None, None)),
        (_RELATIVE, lambda g: _relative(g[0].lower(), now.date())),
    ):
        for match in pattern.finditer(rest):
            if pattern is _MONTH_FIRST and not _is_month(match):
                continue
            period = read(match.groups())  # type: ignore[no-untyped-call]  # of the table above
            if period is not None:
                found[period] = None
        rest = pattern.sub(" ", rest)
    return list(found)


def asks_for_latest(text: str) -> bool:
    return _LATEST.search(text) is not None


def _is_month(match: "re.Match[str]") -> bool:
    name = match[1]
    if match[2] or match[3]:
        return True
    sure = name.lower() not in {"may", "march", "mar", "jan", "dec", "sep", "oct", "jun"}
    return sure or (name[0].isupper() and match.start() > 0)


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def _month(name: str) -> int:
    return next(i for i, full in enumerate(_MONTHS, 1) if full.startswith(name.lower()[:3]))


def _period(year: int | None, month: int | None, day: int | None) -> Period | None:
    try:
        base = year if year is not None else 2024  # A leap year, which has every day.
        start = date(base, month or 1, day or 1)
        if day:
            end = start + timedelta(days=1)
        elif month:
            end = date(base + month // 12, month % 12 + 1, 1)
        else:
            end = date(base + 1, 1, 1)
    except ValueError:  # The 40th of May.
        return None
    return Period(start, end, yearly=year is None)


def _relative(words: str, today: date) -> Period:
    first = today.replace(day=1)
    monday = today - timedelta(days=today.weekday())
    starts = {
        "today": (today, today + timedelta(days=1)),
        "yesterday": (today - timedelta(days=1), today),
        "this week": (monday, monday + timedelta(days=7)),
        "last week": (monday - timedelta(days=7), monday),
        "this month": (first, (first + timedelta(days=32)).replace(day=1)),
        "last month": ((first - timedelta(days=1)).replace(day=1), first),
        "this year": (first.replace(month=1), date(today.year + 1, 1, 1)),
        "last year": (date(today.year - 1, 1, 1), first.replace(month=1)),
    }
    return Period(*starts[" ".join(words.split())])


def _years(day: date, count: int) -> date:
    try:
        return day.replace(year=day.year + count)
    except ValueError:  # The 29th of February, or a year that there is not.
        return day.replace(year=max(1, min(9999, day.year + count)), day=28)


def _gap(day: date, start: date, end: date) -> int:
    if day < start:
        return (start - day).days
    return max(0, (day - end).days + 1)
