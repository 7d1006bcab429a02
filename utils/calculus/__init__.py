"""The second-order calculus: a network's chain of nodes, read off it, and walks over the chain."""

from utils.calculus.chain import Chain, read_chain
from utils.calculus.hand import *  # noqa: F403
from utils.calculus.hand import _like  # noqa: F401
from utils.calculus.lowering import Step as ChainStep
from utils.calculus.tape import Tape as ChainTape
from utils.calculus.trace import Untraceable
