"""JSON that commands print is strict; a number that is not finite is an error that names the argument or the file."""

import math
from pathlib import Path

import pytest

import lindm as ld
from lindm.cli.main import main
from lindm.llm.sft.options import SFTConfig

CLI = Path(ld.__file__).parent / "cli"
HUGE = """discount: 1.0
values: reward
states: s
actions: a
observations: o
T: a
1
O: a
1
R: a : s : s : o 1e308
"""


@pytest.mark.fault("F34")
@pytest.mark.parametrize(
    "words",
    [
        ["solve", "--horizon", "3", "--json"],
        ["eval", "--horizon", "3", "--json", "--tasks", "1"],
        ["data", "make", "--horizon", "3", "--tasks", "1", "--demos", "1", "--out", "data"],
    ],
    ids=lambda words: words[0],
)
def test_rewards_whose_values_are_not_finite_are_refused_with_the_file(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    Path("huge.pomdp").write_text(HUGE)
    n = 2 if words[0] == "data" else 1
    assert main([*words[:n], "huge.pomdp", *words[n:]]) == 3
    printed = capsys.readouterr()
    assert printed.out == "" and "huge.pomdp: the absolute values of the rewards must sum to less than" in printed.err
    assert [p.name for p in tmp_path.iterdir()] == ["huge.pomdp"]


@pytest.mark.fault("F34")
def test_rewards_from_python_are_refused_by_name_and_large_ones_that_fit_are_solved():
    stay = [[[[1.0]]]]
    with pytest.raises(ValueError, match=r"absolute values of r must sum to less than .* got 2e\+200"):
        ld.mdp(stay, [[[1e200]]] * 2, [1.0])
    with pytest.raises(ValueError, match="absolute values of r must sum to less than"):
        ld.pomdp([[[1.0]]], [[[1.0]]], [[1e308]], [1.0], horizon=3)
    assert math.isclose(ld.solve(ld.mdp(stay, [[[1e150]]] * 2, [1.0])).value, 2e150)


@pytest.mark.fault("F34")
@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e999"])
def test_a_number_of_an_option_is_finite(capsys, word):
    assert main(["solve", "tiger.pomdp", "--horizon", "3", f"--discount={word}"]) == 2
    assert f"--discount must be a finite number; got '{word}'" in capsys.readouterr().err


@pytest.mark.fault("F34")
@pytest.mark.parametrize("option", ["learning_rate", "lora_alpha", "clip", "weight_decay", "warmup"])
def test_a_number_of_a_training_run_is_finite(option):
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{option} must be a finite number; got {value}"):
            SFTConfig(data=Path("d"), out=Path("o"), preset="tiny", **{option: value})


@pytest.mark.fault("F34")
def test_commands_print_json_in_no_other_way():
    for path in (*CLI.glob("*.py"), CLI.parent / "bench" / "timing.py"):
        source = path.read_text(encoding="utf-8")
        assert "json.dumps" not in source and "json_module.dumps" not in source, path
