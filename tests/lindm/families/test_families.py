"""Every family of problems: valid tables, names, seeds, splits, options, values, texts."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lindm as ld
from lindm.cli.main import main
from lindm.cli.problems import FAMILY_OPTIONS
from lindm.datasets import Dataset, documents, text_format
from lindm.families import registry
from lindm.families.limits import check_labels
from lindm.families.suites import Suite, TabularSuite, levels, rounded
from lindm.problems.apomdp import as_apomdp
from lindm.text import FAMILY_TEMPLATES, parse, text
from lindm.types import APOMDP, MDP

# the smallest and the default sizes of each family
SMALLEST = {
    "maintenance": {"states": 2, "horizon": 3},
    "maintenance hidden": {"hidden": True, "states": 2, "horizon": 3},
    "inventory": {"capacity": 1, "actions": 2, "lead_time": 2, "horizon": 3},
    "screening": {"states": 3, "horizon": 3},
    "dosing": {"states": 2, "actions": 2, "observations": 2, "horizon": 3},
    "gridworld": {"size": 2, "horizon": 3},
    "gridworld dark": {"dark": True, "size": 2, "horizon": 2},
    "rocksample": {"size": 2, "rocks": 1, "horizon": 3},
}
DEFAULT = {name: {word: True for word in name.split()[1:]} for name in SMALLEST}
SIZES = [*SMALLEST.items(), *DEFAULT.items()]
every_size = pytest.mark.parametrize("name, options", SIZES, ids=[f"{n} {k}" for k in ("smallest", "default") for n in SMALLEST])
every_family = pytest.mark.parametrize("name, options", SMALLEST.items(), ids=list(SMALLEST))


def suite(name, **options) -> TabularSuite:
    made = registry.build(name.split()[0], **{"split": "id", **options})
    assert isinstance(made, TabularSuite)
    return made


def drawn(name, seed=0, **options):
    return suite(name, **options).draw(jax.random.key(seed))


@every_size
@pytest.mark.parametrize("split", ["id", "ood"])
def test_tables_are_distributions_of_the_sizes_that_the_suite_tells(name, options, split):
    made = suite(name, split=split, **options)
    for seed in range(3):
        problem = made.draw(jax.random.key(seed))
        assert isinstance(problem, made.kind)
        shapes = jax.tree.map(jnp.shape, problem)
        assert shapes == jax.tree.map(jnp.shape, made.example)
        model = problem.models if isinstance(problem, APOMDP) else problem
        for x in (model.P, model.rho) if isinstance(model, MDP) else (model.P, model.O, model.rho):
            assert (np.asarray(x) >= 0).all()
            np.testing.assert_allclose(np.asarray(x).sum(-1), 1, rtol=1e-12)
        r = np.asarray(model.r)
        np.testing.assert_array_equal(r, np.round(r, 4))  # short in text
    for part, words in made.names.items():
        size = getattr(made.sizes, part)
        assert len(set(words)) == len(words) == size and not any(" " in word for word in words)
    assert len(made.names) == {MDP: 2, APOMDP: 4}.get(made.kind, 3)


@every_family
def test_a_seed_is_a_problem_and_another_seed_is_another(name, options):
    one, same, other = (jax.tree.leaves(drawn(name, seed, **options)) for seed in (3, 3, 4))
    for x, y in zip(one, same, strict=True):
        np.testing.assert_array_equal(x, y)
    assert any((np.asarray(x) != y).any() for x, y in zip(one, other, strict=True))


@every_family
def test_the_splits_have_other_laws_and_one_size(name, options):
    made = {split: suite(name, split=split, **options) for split in ("id", "ood")}
    assert made["id"].sizes == made["ood"].sizes and made["id"].names == made["ood"].names
    one, other = (jax.tree.leaves(made[split].draw(jax.random.key(0))) for split in ("id", "ood"))
    assert any((np.asarray(x) != y).any() for x, y in zip(one, other, strict=True))


def best_value(problem, t=0, state=None):
    """The optimal value of an MDP by plain recursion over its states."""
    P, r, rho = (np.asarray(x) for x in (problem.P, problem.r, problem.rho))
    if state is None:
        return sum(p * best_value(problem, 0, s) for s, p in enumerate(rho) if p)
    if t == problem.horizon:
        return 0.0
    moves = [[(p, s) for s, p in enumerate(P[0, state, a]) if p] for a in range(problem.num_actions)]
    return max(r[t, state, a] + sum(p * best_value(problem, t + 1, s) for p, s in move) for a, move in enumerate(moves))


@every_family
def test_the_value_of_the_smallest_problem_is_that_of_plain_recursion(name, options, brute):
    for seed in range(2):
        problem = drawn(name, seed, **options)
        if isinstance(problem, MDP):
            wanted = best_value(problem)
        else:
            one = as_apomdp(problem)
            reference = brute(one.models.P, one.models.O, one.models.r, one.models.rho, one.alpha)
            wanted = reference.V(list(reference.rho), 0)
        np.testing.assert_allclose(ld.solve(problem).value, wanted, rtol=1e-10, atol=1e-12)


@every_family
def test_discounts_are_folded_into_the_rewards_and_told(name, options):
    plain, discounted = drawn(name, **options), drawn(name, discount=0.5, **options)
    for x, y in (((p.models if isinstance(p, APOMDP) else p).r for p in (plain, discounted)),):
        np.testing.assert_allclose(y, np.asarray(x) * 0.5 ** np.arange(plain.horizon)[:, None, None], rtol=1e-12)
    assert float(discounted.discount) == 0.5 and float(plain.discount) == 1


@pytest.mark.parametrize(
    "name, options, rule",
    [
        ("maintenance", {"states": 1}, "states must be a whole number of at least 2; got 1"),
        ("maintenance", {"observations": 3}, "observations must be left out unless hidden is given; got 3"),
        ("maintenance", {"lead_time": 2}, "an option of maintenance must be one of horizon, .*; got 'lead_time'"),
        ("maintenance", {"hidden": "yes"}, "hidden must be True or False; got 'yes'"),
        ("maintenance", {"horizon": 0}, "horizon must be a whole number of at least 1; got 0"),
        ("maintenance", {"split": "test"}, "split must be one of id, ood; got 'test'"),
        ("inventory", {"capacity": 0}, "capacity must be"),
        ("inventory", {"lead_time": 9}, "the number of states, must be at most 5000; got 393,216"),
        ("inventory", {"discount": 1.5}, "discount must be a number in"),
        ("screening", {"states": 2}, "states must be a whole number of at least 3; got 2"),
        ("dosing", {"models": 1}, "models must be a whole number of at least 2; got 1"),
        ("dosing", {"alpha": 2}, "alpha must be a number in"),
        ("gridworld", {"slip": -0.1}, "slip must be a number in"),
        ("gridworld", {"size": 1}, "size must be a whole number of at least 2; got 1"),
        ("gridworld", {"size": 6, "dark": True}, "size must be at most 5 in the dark"),
    ],
)
def test_options_out_of_range_raise_an_error_that_names_them(name, options, rule):
    with pytest.raises(ValueError, match=rule):
        registry.build(name, **options)


def test_the_page_of_a_family_shows_the_flags_of_the_commands(capsys):
    assert main(["families", "prostate"]) == 0
    of_commands, _, of_python = capsys.readouterr().out.partition("Options in Python alone")
    assert "  --alpha " in of_commands and "biopsy" not in of_commands.partition("Options:")[2] and "  biopsy_loss " in of_python
    assert main(["families", "inventory"]) == 0
    out = capsys.readouterr().out
    assert "  --lead-time " in out and "lead_time" not in out and "in Python alone" not in out


def test_every_option_of_a_tabular_family_has_a_flag_and_a_sentence():
    flags = {*FAMILY_OPTIONS, "horizon", "discount", "alpha"}
    for facts in ld.list_families():
        built = registry.build(facts["name"])
        if isinstance(built, TabularSuite):
            assert set(facts["options"]) <= flags
            assert facts["template"] in FAMILY_TEMPLATES and facts["source"]
        assert facts["summary"] and facts["description"] and facts["kind"] in ("mdp", "pomdp", "apomdp")
        assert all(option["help"] for option in facts["options"].values())
        for name, option in facts["options"].items():
            assert option["flag"] == (f"--{name.replace('_', '-')}" if name in flags else None)
        assert (facts["sizes"]["horizon"] is None) == registry.FAMILIES[facts["name"]].endless or facts["sizes"]["horizon"] >= 1
    everywhere = {option for family in registry.FAMILIES.values() for option in family.options}
    assert set(FAMILY_OPTIONS) - {"perturb"} <= everywhere  # of files


@pytest.mark.parametrize(
    "name, options",
    [pytest.param(*item, marks=[] if item[0] == "maintenance" else pytest.mark.slow, id=item[0]) for item in SMALLEST.items()],
)
def test_data_of_the_smallest_suite_become_sentences_with_its_names(name, options, tmp_path):
    made = suite(name, **options)
    first = ld.make_dataset(made, tmp_path / "data", tasks=3, demos=2)
    assert first.made == 1 and ld.make_dataset(made, tmp_path / "data", tasks=3, demos=2).kept == 1  # nothing is left to do
    ld.make_dataset(made, tmp_path / "again", tasks=3, demos=2)
    names = sorted(path.name for path in (tmp_path / "data").iterdir() if path.name != "provenance.json")
    for file in names:
        assert (tmp_path / "data" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    shutil.rmtree(tmp_path / "again")
    dataset = Dataset(tmp_path / "data")
    assert dataset.names == {part: list(words) for part, words in made.names.items()}
    format = text_format(dataset, made.name)
    for task, number, pieces in documents(dataset, format):
        sentence = text(pieces)
        assert parse(sentence, format.template) == format.document(task, task.queries[number])
        seen = {"mdp": "states", "pomdp": "observations", "apomdp": "models"}[dataset.kind]
        assert all(any(f" {word}" in sentence for word in made.names[part]) for part in ("actions", seen))
    problem = next(iter(dataset)).problem()
    np.testing.assert_array_equal(problem.rho if isinstance(problem, MDP) else as_apomdp(problem).models.rho[0], task_law(made))


def task_law(made: Suite):
    """The law of the first state of task 0 of a dataset of seed 0."""
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))[0]
    problem = made.draw(key)
    return problem.rho if isinstance(problem, MDP) else as_apomdp(problem).models.rho[0]


@pytest.mark.parametrize(
    "name, options, rule",
    [
        ("maintenance", {"states": 3000}, "horizon must be less than 1 .*: choose smaller sizes, since a task may have"),
        (
            "dosing",
            {"states": 4, "horizon": 9},
            "horizon must be at most 6 for 4 states, 3 actions, 3 observations, 2 models, since",
        ),
        ("gridworld", {"dark": True, "size": 5, "horizon": 40}, "horizon must be at most 6 for .* bounds of a task may take"),
        ("pomdp", {"states": 600, "observations": 20, "horizon": 60}, "horizon must be at most 10 for 600 states, .*; got 60"),
        ("apomdp", {"states": 4, "horizon": 20}, "horizon must be at most 6 for 4 states, .* have at most 3 states; got 20"),
    ],
)
def test_sizes_that_the_oracle_cannot_label_are_refused_with_what_is_possible(name, options, rule):
    made = registry.build(name, **options)
    with pytest.raises(ValueError, match=rule) as refused:
        check_labels(made)
    if "at most" in str(refused.value).split(" for ")[0]:
        possible = int(str(refused.value).split("at most ")[1].split(" for ")[0])
        check_labels(replace(made, horizon=possible))
        with pytest.raises(ValueError, match="horizon must be"):
            check_labels(replace(made, horizon=possible + 1))


def test_levels_are_marks_of_a_scale_and_rewards_are_round():
    np.testing.assert_allclose(levels(4, 2, 1.0), [[1, 0], [1, 0], [0, 1], [0, 1]])
    np.testing.assert_allclose(levels(2, 3, 0.4), [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2]])
    assert rounded([0.123, 0.3000001, -0.026]).tolist() == [0.1, 0.3, -0.05]


def test_a_suite_with_an_option_changed_is_checked_again():
    with pytest.raises(ValueError, match="states must be"):
        replace(suite("screening"), states=1)
