"""Points by name, each one trial: what they mean, what is refused, and that a sweep of them goes on after any kill."""

import pytest
from bench import Bench, sweep_settings
from inline import Inline, one_process
from lab_sweep import asked
from test_resume import kill_everywhere

from opd_lab.sweep import points
from opd_lab.sweep.study import changes

THREE = "sweep.points={plain:{},hot:{method:scope,method.tau:0.25},far:{rollout:{temperature:1.5}}}"


def test_a_point_is_a_set_of_overrides():
    space = points.parse({"plain": {}, "hot": {"method": {"tau": 1 / 3}, "x": [1, 2]}})
    assert list(space.by_label) == ["plain", "hot: tau=0.333 x=[1, 2]"]
    assert space.keys == ["method.tau", "x"]
    assert space.points() == list(space.samples()) == [{"point": "plain"}, {"point": "hot: tau=0.333 x=[1, 2]"}]
    assert [space.overrides(point) for point in space.points()] == [[], [f"method.tau={1 / 3!r}", "x=[1,2]"]]
    assert space.texts == {"points.plain": "{}", "points.hot": f"{{method.tau={1 / 3!r}, x=[1,2]}}"}


def test_every_point_is_a_run_of_its_own(tmp_path):
    question = asked(tmp_path, THREE, "sweep.seeds=[4,5]", "sweep.name=three")
    runs = [question.runs(point) for point in question.space.points()]
    assert [[order.seed for order, _ in one] for one in runs] == [[4, 5]] * 3
    assert [one[0][0].method for one in runs] == ["opd", "scope", "opd"]
    assert [one[0][1].method.get("tau") for one in runs] == [None, 0.25, None]
    assert [one[0][1].rollout.temperature for one in runs] == [1.0, 1.0, 1.5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep.points={a:{}}", "sweeps=smoke"], "sweep.points and sweep.space exclude one another, got a and method"),
        (["sweep.points={a:{},b:{optim.lr:1}}", "seed=1,2"], "seed must be one value with sweep.points, got several"),
        (["sweep.points={a:{},b:{optim.lr:1}}", "optim.lr=2"], "optim.lr is both in sweep.points and on the command"),
        (["sweep.points={a:{steps:1}}", "sweep.seeds=[1]"], "steps is both in sweep.points and on the command line"),
        (["sweep.points={a:{seed:1}}", "sweep.seeds=[1]"], "seed cannot be in the space of a sweep with sweep.seeds"),
        (
            ["sweep.points={a:{optim.lr:1},b:{optim.lr:1.0}}"],
            "must be different runs, got point=a: optim.lr=1 and point=b",
        ),
        (["sweep.points={a:{}}", "sweep.sampler=tpe"], "sweep.sampler must be null with sweep.points"),
        (["sweep.points={a:{method.tua:1,method:scope}}"], "did you mean tau"),
        (["sweep.points={a:{optim.lr:high}}"], "optim.lr must be float, got 'high'"),
        (["sweep.points={}"], "sweep.points must be {name: {key: value, ...}, ...}, at least one, got {}"),
        (["sweep.points={a:1}"], "sweep.points must be .*got {'a': 1}"),
        (
            ["sweep.points={a:{method:scope},b:{}}", "sweep.objective={loss/total_value: minimize}"],
            "must mean the same",
        ),
        (["sweep.points={a:{}}", "sweep.confirm.top=1"], "sweep.confirm.top must be null with sweep.points"),
    ],
)
def test_points_that_cannot_be_run(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        assert asked(tmp_path, *arguments).samples


POINTS = {
    "points": {"plain": {}, "bad": {"fate": "raises"}, "high": {"top": 0.75}, "low": {"top": 0.25}},
    "retries": 1,
}


def test_killed_at_any_write_it_goes_on(tmp_path, monkeypatch):
    kill_everywhere(tmp_path, monkeypatch, POINTS, every=17)


def test_changed_points_are_refused_with_the_difference_and_more_are_allowed(tmp_path, monkeypatch):
    def swept(given, **more):
        bench = Bench(tmp_path, sweep_settings(points=given, **more), launcher=Inline())
        with one_process(bench.trials, monkeypatch):
            return bench.run()

    before = swept({"plain": {}, "high": {"top": 0.75}})
    assert [row["values"] for row in before.table()] == [[0.5], [0.75]]
    with pytest.raises(ValueError, match=r"points.high: {top=0.75} -> {top=0.875}; take the change back"):
        swept({"plain": {}, "high": {"top": 0.875}})
    with pytest.raises(ValueError, match=r"points.high: {top=0.75} -> absent"):
        swept({"plain": {}}, extend=True)
    more = {"plain": {}, "high": {"top": 0.75}, "low": {"top": 0.25}}
    with pytest.raises(ValueError, match=r"points.low: absent -> {top=0.25}; sweep.trials: 2 -> 3; add --extend"):
        swept(more)
    after = swept(more, extend=True)
    assert after.table()[:2] == before.table()
    assert [row["values"] for row in after.table()[2:]] == [[0.25]]


def test_a_new_point_may_have_a_method_and_keys_of_its_own_but_the_rest_stays(tmp_path):
    def identity(*words):
        return asked(tmp_path, *words, "sweep.name=x").identity

    before = identity("sweep.points={plain:{},hot:{method:scope,method.tau:0.25}}")
    more = changes(before, identity(THREE.replace("}}}", "}},more:{method:kat_lab,optim.lr:0.01}}")))
    assert more and all(more.values()) and any(one.startswith("method=kat_lab.") for one in more)
    other = changes(before, identity("sweep.points={plain:{},hot:{method:scope,method.tau:0.25}}", "optim.lr=0.5"))
    assert other == {"optim.lr: 0.0003 -> 0.5": False}
