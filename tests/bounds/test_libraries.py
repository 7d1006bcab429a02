"""Networks of other libraries, small and random: every rung above the exact norm."""

from __future__ import annotations

import os

import pytest
import torch
from exact import exact_norms
from networks import randomised, uneven_examples
from torch import nn

from utils.bounds import RUNGS, hessian_bounds
from utils.calculus.nodes.base import Unknown

os.environ["TRANSFORMERS_OFFLINE"] = "1"
SIZES = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6)
SIZES |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-3)
OPTIONS = {"majorant": {"confidence": 1 - 1e-9, "max_steps": 400}}


def vit(transformers) -> nn.Module:
    config = transformers.ViTConfig(
        image_size=4, patch_size=2, num_channels=1, num_labels=3, **SIZES
    )
    return transformers.ViTForImageClassification(config)


def bert(transformers) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=7, max_position_embeddings=5, num_labels=3, classifier_dropout=0.0, **SIZES
    )
    return transformers.BertForSequenceClassification(config)


def gpt2(transformers) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=5, n_embd=4, n_layer=1, n_head=2, n_inner=6,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=1e-3, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def adapted(transformers) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=1, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    return peft.get_peft_model(vit(transformers), config)


@pytest.mark.slow
@pytest.mark.parametrize("make", [vit, bert, gpt2, adapted])
def test_every_rung_above_the_exact_norm(make):
    """Values of all rungs that answer; those that do not name an operator."""
    transformers = pytest.importorskip("transformers")
    model = randomised(make(transformers), 1, 0.7)
    x, y = uneven_examples(1, 1)
    if make in (bert, gpt2):
        x = torch.tensor([[3, 1, 4, 1, 5]])
        y = torch.tensor([[1, 4, 1, 5, 2]]) if make is gpt2 else y
    exact = exact_norms(model, x, y)
    answered = []
    for rung in RUNGS[1:]:
        try:
            bound = hessian_bounds(model, x, y, rung=rung, **OPTIONS.get(rung, {})).values
        except Unknown as refusal:
            assert rung == "prior" and " of the " in str(refusal)
            continue
        assert (bound >= exact * (1 - 1e-9)).all() and bound.isfinite().all(), rung
        answered.append(rung)
    assert set(RUNGS[2:]) <= set(answered)
