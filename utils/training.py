"""The old place of `utils.networks.training`: names only."""

from utils.networks.training import Training, accuracy, stopping_rule, train

__all__ = ["Training", "accuracy", "stopping_rule", "train"]
