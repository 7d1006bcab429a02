"""Small networks with a sample each, for the tests of sample sizes."""

import torch
from torch import nn

from utils.networks import build_model


class Linear(nn.Module):
    def __init__(self, n_classes=3):
        super().__init__()
        self.head = nn.Linear(5, n_classes)

    def forward(self, x):
        return self.head(x)


class Summed(Linear):
    """With an operator that no bound knows."""

    def forward(self, x):
        return self.head(x).exp().cumsum(-1).cumprod(-1)


def linear_pilot(n=60, seed=0):
    torch.manual_seed(seed)
    return Linear(), torch.randn(n, 5), torch.randint(0, 3, (n,))


def tiny_vit(n=12, seed=0, **sizes):
    torch.manual_seed(seed)
    small = {"image_size": 4, "channels": 1, "patch_size": 2, "n_classes": 3, "eps": 0.1}
    small |= {"depth": 1, "n_heads": 2, "d_model": 4, "d_ff": 4}
    network = build_model("vit", **(small | sizes))
    return network, torch.randn(n, 1, 4, 4), torch.randint(0, 3, (n,))
