"""Hydra's grammar means the same to Optuna, and what is drawn goes back as the override that was meant."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from opd_lab.sweep.space import Space, parse


@pytest.mark.parametrize(
    ("value", "distribution"),
    [
        ("choice(a,b)", CategoricalDistribution(("a", "b"))),
        ("1,2.5,null,false,x", CategoricalDistribution((1, 2.5, None, False, "x"))),
        ([1, 2], CategoricalDistribution((1, 2))),
        ("range(1,9,2)", IntDistribution(1, 7, step=2)),
        ("range(0,1,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("interval(0,1)", FloatDistribution(0.0, 1.0)),
        ("tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("int(interval(1,9))", IntDistribution(1, 9)),
        ("tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
    ],
)
def test_the_grammar(value, distribution):
    (parameter,) = parse({"optim.lr": value})
    assert parameter.distribution == distribution


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"optim.lr": 0.1}, "sweep.space.optim.lr must be several values.*got 0.1.*sweep.fixed"),
        ({"optim.lr": []}, "several values"),
        ({"a": "shuffle(choice(1,2))"}, "sweep.sampler=random"),
        ({"a": "tag(log,interval(0,1))"}, "low > 0 with log"),
        ({"a": "choice(1,1)"}, "different values, got 1 twice"),
        ({"a": "tag(log,range(1,9,2))"}, "step 1"),
    ],
)
def test_what_cannot_be_drawn(space, words):
    with pytest.raises(ValueError, match=words):
        parse(space)


def test_values_go_back_as_they_were_written():
    space = Space(parse({"a": "'x y',[1,2],{k:1},null", "optim.lr": "interval(0,1)", "n": "range(1,4)"}))
    a, lr, n = space.parameters
    assert [a.override(v) for v in a.finite or ()] == ["a='x y'", "a=[1,2]", "a={k:1}", "a=null"]
    assert (lr.override(1e-5), n.override(3)) == ("optim.lr=1e-05", "n=3")


def test_a_key_that_only_some_methods_have():
    def condition(key, chosen):
        return key != "method.alpha" or chosen["method"] == "fire"

    space = Space(parse({"method.alpha": [1, 2], "seed": [0, 1], "method": ["opd", "fire"]}), condition)
    assert space.points() == [
        {"method": "opd", "seed": 0},
        {"method": "opd", "seed": 1},
        {"method": "fire", "method.alpha": 1, "seed": 0},
        {"method": "fire", "method.alpha": 1, "seed": 1},
        {"method": "fire", "method.alpha": 2, "seed": 0},
        {"method": "fire", "method.alpha": 2, "seed": 1},
    ]
    assert list(space.samples()) == [{"method": "opd", "seed": 0}, {"method": "fire", "method.alpha": 1, "seed": 0}]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask()) for _ in range(20)]
    assert {p["method"] for p in drawn} == {"opd", "fire"}
    assert all(("method.alpha" in p) == (p["method"] == "fire") for p in drawn)


def test_a_grid_of_an_interval_is_refused():
    with pytest.raises(ValueError, match=r"finite space, got b=interval\(0.0,1.0\); give sweep.sampler"):
        Space(parse({"a": [1, 2], "b": "interval(0,1)"})).points()
