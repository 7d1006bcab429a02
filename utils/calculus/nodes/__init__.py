"""The kinds of nodes, one class each.

base         what a kind has to know
linear maps  shape
bilinear     what linear layers and products share; linear, products: matrix products, gains, gates
attention    scores, softmax and mixing as one map, for the bounds
rows         softmax, normalisations
elementwise  activations and any other function entry by entry
loss         cross-entropy, squared error
general      whatever else torch can differentiate
known        what is known of a value on a set of weights, for the bounds
"""

from utils.calculus.nodes.base import Node, Unknown

__all__ = ["Node", "Unknown"]
