"""The tensors of models and of directories, and whether they are equal."""

import numpy as np
from flax import nnx
from safetensors.numpy import load_file


def arrays(model):
    """Every array of a model, by its path."""
    return {".".join(map(str, keys)): np.asarray(leaf[...]) for keys, leaf in nnx.to_flat_state(nnx.state(model))}


def equal(ours, theirs):
    a, b = arrays(ours), arrays(theirs)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def everything(directory):
    """The tensors of a directory, read by safetensors."""
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)
