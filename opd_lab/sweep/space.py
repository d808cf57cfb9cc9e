"""Hydra's override grammar -> what Optuna draws from, and back to overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString, RangeSweep

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

Params = Mapping[str, Any]  # key -> value, as Optuna knows it
Condition = Callable[[str, Params], bool]  # is there this key, given the keys before it?


@dataclass(frozen=True)
class Parameter:
    """One key of a space."""

    key: str  # `optim.lr`
    prefix: str  # ``, `+` or `++`
    distribution: BaseDistribution
    words: Mapping[Any, str]  # choices: how each is written as an override
    finite: tuple[Any, ...] | None  # every value, in the order given; None = not finite
    text: str  # for people, and to tell one space from another

    def override(self, value: Any) -> str:
        """`optim.lr=0.001`"""
        return f"{self.prefix}{self.key}={self.words.get(value, repr(value))}"

    @property
    def most(self) -> Any:
        """The largest value, of a key that holds numbers."""
        return max(self.finite) if self.finite else self.distribution.high  # pyright: ignore[reportAttributeAccessIssue]

    def suggest(self, trial: Trial) -> Any:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return trial.suggest_categorical(self.key, d.choices)
        if isinstance(d, IntDistribution):
            return trial.suggest_int(self.key, d.low, d.high, step=d.step, log=d.log)
        assert isinstance(d, FloatDistribution)
        return trial.suggest_float(self.key, d.low, d.high, step=d.step, log=d.log)


@dataclass(frozen=True)
class Space:
    """Every key that differs between trials. `method` comes first, since other keys may depend on it."""

    parameters: Sequence[Parameter]
    condition: Condition = lambda key, chosen: True

    def overrides(self, params: Params) -> list[str]:
        return [p.override(params[p.key]) for p in self.parameters if p.key in params]

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """The params of a trial, drawn one after another, and only those it has."""
        chosen: dict[str, Any] = {}
        for parameter in self.parameters:
            if self.condition(parameter.key, chosen):
                chosen[parameter.key] = parameter.suggest(trial)
        return chosen

    @property
    def keys(self) -> list[str]:
        """What differs between trials."""
        return [p.key for p in self.parameters]

    def decides(self, params: Params) -> list[str]:
        """The keys whose values in a trial with these params are the space's, not the config's."""
        return self.keys

    @property
    def texts(self) -> dict[str, str]:
        """It all, for people, and to tell one space from another."""
        return {p.key: p.text for p in self.parameters}

    @property
    def finite(self) -> bool:
        return all(p.finite is not None for p in self.parameters)

    def points(self) -> list[dict[str, Any]]:
        """Every point of a finite space, the last key changing fastest.

        Raises:
            ValueError: it is not finite.
        """
        endless = [p.key for p in self.parameters if p.finite is None]
        if endless:
            raise ValueError(
                f"sweep.sampler=grid needs a finite space, got {endless[0]}={self._of(endless[0]).text}; "
                "give sweep.sampler and sweep.trials, or a choice of values"
            )
        return list(self._points(0, {}))

    def samples(self) -> Iterator[dict[str, Any]]:
        """One point per choice of `method`, with the first value of every other key: what can be checked beforehand."""
        first = self.parameters[:1]
        methods = first[0].finite if first and first[0].key == "method" else None
        for method in methods or [None]:
            chosen: dict[str, Any] = {}
            for p in self.parameters:
                if self.condition(p.key, chosen):
                    chosen[p.key] = method if p.key == "method" else p.finite[0] if p.finite else _low(p)
            yield chosen

    def _points(self, place: int, chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if place == len(self.parameters):
            yield dict(chosen)
            return
        p = self.parameters[place]
        if not self.condition(p.key, chosen):
            yield from self._points(place + 1, chosen)
            return
        for value in p.finite or ():
            yield from self._points(place + 1, chosen | {p.key: value})

    def _of(self, key: str) -> Parameter:
        return next(p for p in self.parameters if p.key == key)


def parse(given: Mapping[str, Any], loader: Any = None) -> list[Parameter]:
    """A mapping `key: values` of a sweep file as parameters.

    Raises:
        ValueError: something that holds one value, or that no sampler can draw from.
    """
    parser = OverridesParser.create(loader)
    out = []
    for key, value in given.items():
        if isinstance(value, list):
            words = ",".join(map(written, value))
            value = words if len(value) > 1 else f"choice({words})" if value else ""
        override = parser.parse_override(f"{key}={value}")
        if not override.is_sweep_override():
            raise ValueError(
                f"sweep.space.{key} must be several values, such as [1, 2], range(1,9) or interval(0,1), got {value}; "
                "a single value belongs to sweep.fixed"
            )
        out.append(parameter(override))
    return sorted(out, key=lambda p: p.key != "method")


def parameter(override: Override) -> Parameter:
    """One sweep override of the command line, `method=opd,scope`, as a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    name = override.get_key_element()
    key = name.lstrip("+")
    prefix, value = name[: len(name) - len(key)], override._value
    words: dict[Any, str] = {}
    finite: tuple[Any, ...] | None = None
    if getattr(value, "shuffle", False):
        raise ValueError(f"{key}: shuffle(...) has no seed; sweep.sampler=random sweep.seed=N draws in a random order")
    if override.is_choice_sweep():
        for one in override.sweep_iterator():
            if _label(one) in words:
                raise ValueError(f"{key} must be different values, got {written(one)} twice")
            words[_label(one)] = written(one)
        finite, text = tuple(words), f"choice({','.join(words.values())})"
        distribution: BaseDistribution = CategoricalDistribution(finite)
    elif isinstance(value, RangeSweep):
        finite = tuple(value.range())
        if not finite:
            raise ValueError(f"{key} must hold at least one value, got {override.input_line}")
        log, whole = "log" in value.tags, all(isinstance(one, int) for one in finite)
        if log and not (whole and abs(value.step) == 1):
            raise ValueError(f"{key}: tag(log, range) needs whole numbers and step 1, got {override.input_line}")
        if whole:
            step = 1 if log else abs(int(value.step))
            distribution = IntDistribution(int(min(finite)), int(max(finite)), log=log, step=step)
        else:
            distribution = FloatDistribution(min(finite), max(finite), step=abs(value.step))
        text = f"range({value.start},{value.stop},{value.step}){' log' if log else ''}"
    elif isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        assert low is not None and high is not None
        if not low < high or (log and low <= 0):
            raise ValueError(f"{key}: an interval needs low < high, and low > 0 with log, got {override.input_line}")
        if isinstance(low, int) and isinstance(high, int):
            distribution = IntDistribution(low, high, log=log)
        else:
            distribution = FloatDistribution(low, high, log=log)
        text = f"interval({low},{high}){' log' if log else ''}"
    else:
        raise ValueError(f"{key} must be choice, range or interval, got {override.input_line}")
    return Parameter(key, prefix, distribution, words, finite, text)


def describe(params: Params) -> str:
    """`method=opd optim.lr=0.000312`"""
    short = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in params.items()}
    return " ".join(f"{key}={value}" for key, value in short.items())


def written(value: Any) -> str:
    """A value as the right side of an override."""
    return Override._get_value_element_as_str(value)


def _label(value: Any) -> Any:
    """A choice as Optuna keeps it."""
    if isinstance(value, QuotedString):
        return value.text
    return value if value is None or isinstance(value, bool | int | float | str) else written(value)


def _low(parameter: Parameter) -> Any:
    return getattr(parameter.distribution, "low")  # noqa: B009 - every distribution but a choice has one
