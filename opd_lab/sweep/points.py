"""Points by name: each a set of overrides, in place of a space from which they are drawn. The first is what the others
are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from opd_lab import config
from opd_lab.sweep.space import Parameter, Params, Space, describe, written

KEY = "point"  # the one param of such a trial


@dataclass(frozen=True)
class Point:
    """One set of overrides."""

    name: str
    values: Params  # key -> value, for people
    overrides: Sequence[str]

    @property
    def label(self) -> str:
        """`best: tau=0.619 divisor=mean_one`"""
        short = {key.removeprefix("method."): value for key, value in self.values.items()}
        return f"{self.name}: {describe(short)}" if short else self.name


@dataclass(frozen=True, kw_only=True)
class Points(Space):
    """A `Space` whose only parameter says which point."""

    by_label: Mapping[str, Point]

    def overrides(self, params: Params) -> list[str]:
        return list(self.by_label[params[KEY]].overrides) if params else []

    def samples(self) -> Iterator[dict[str, str]]:
        """All of them can be checked beforehand."""
        return ({KEY: label} for label in self.by_label)

    @property
    def keys(self) -> list[str]:
        return sorted({key for point in self.by_label.values() for key in point.values})

    def decides(self, params: Params) -> list[str]:
        return list(self.by_label[params[KEY]].values)

    @property
    def texts(self) -> dict[str, str]:
        return {f"points.{one.name}": f"{{{', '.join(one.overrides)}}}" for one in self.by_label.values()}

    @property
    def first(self) -> str:
        """The label of the point that the others are held against."""
        return next(iter(self.by_label))


def made(points: Sequence[Point]) -> Points:
    from optuna.distributions import CategoricalDistribution

    labels = tuple(point.label for point in points)
    text = "; ".join(f"{point.name}: {' '.join(point.overrides)}" for point in points)
    one = Parameter(KEY, "", CategoricalDistribution(labels), {}, labels, text)
    return Points([one], by_label=dict(zip(labels, points)))


def parse(given: Mapping[str, Mapping[str, object]]) -> Points:
    """A mapping `name: {key: value}` of a sweep file."""
    points = []
    for name, group in given.items():
        values = config.flat(dict(group)) if group else {}
        points.append(Point(str(name), values, [f"{key}={written(value)}" for key, value in values.items()]))
    return made(points)
