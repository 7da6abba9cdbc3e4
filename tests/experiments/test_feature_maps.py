"""Where a claim speaks of a law of features, every seed draws features of its own."""

import re
from pathlib import Path

import numpy as np
import pytest

import lindm_experiments
from lindm_experiments import against_statistics, dependence, depth, isotropy, shift
from lindm_experiments.lib import feature_laws

HOME = Path(lindm_experiments.__file__).parent
SOURCES = sorted((*HOME.glob("*.py"), *HOME.glob("lib/*.py")))
FEATURES = {
    "against_statistics": lambda seed: against_statistics.family(seed).phi,
    "dependence": lambda seed: dependence.chains(dependence.SMOKE, seed).phi,
    "depth": lambda seed: depth.feature_family(depth.SMOKE, seed).phi,
    "isotropy": lambda seed: isotropy.families(seed)[isotropy.SIMPLEX].phi,
    "risk": lambda seed: feature_laws.simplex_mdps(seed).phi,
    "shift": lambda seed: shift.families(shift.SMOKE, seed)[0].phi,
}


@pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])
def test_no_experiment_draws_from_a_fixed_key(path):
    assert not re.search(r"random\.key\(\d", path.read_text()), "a feature map, a kernel or a task that all seeds share"


@pytest.mark.parametrize("name", FEATURES)
def test_two_seeds_have_two_feature_maps_and_one_seed_has_one(name):
    first, again, other = (np.asarray(FEATURES[name](seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
