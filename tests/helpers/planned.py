"""Networks that tests plan for, with a batch and a loss."""

import torch
from cases import cross_entropy, token_loss

from lightning_spectral.demo.networks import CharacterGPT, DigitsResNet

K = 3
"""Directions that every gradient of the cases has above its noise floor."""


def resnet():
    return DigitsResNet(width=4), (torch.randn(48, 1, 8, 8), torch.randint(0, 10, (48,))), cross_entropy


def gpt():
    model = CharacterGPT(11, 8, width=16, heads=2, depth=1)
    return model, (torch.randint(0, 11, (48, 8)), torch.randint(0, 11, (48, 8))), token_loss
