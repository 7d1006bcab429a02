"""The second-order calculus: a network's chain of nodes, read off it, and walks over the chain.

nodes     every kind of node with all its mathematics
trace     a module's operators, by torch.export
rewrite   what is one function becomes one operator; only the rows that are read are computed
lowering  which nodes an operator becomes
chain     read_chain: the steps of any module
tape      Tape: values, adjoints, products of a batch over a chain
checks    whether a chain is the network
"""

from utils.calculus.chain import Chain, read_chain
from utils.calculus.lowering import Step
from utils.calculus.nodes.base import Node, Unknown
from utils.calculus.tape import Tape
from utils.calculus.trace import Untraceable

__all__ = ["Chain", "Node", "Step", "Tape", "Unknown", "Untraceable", "read_chain"]
