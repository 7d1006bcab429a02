"""Networks of transformers and peft, tiny and random: exact Hessians where the library is
installed."""

import os

import pytest
import torch
from exact import assert_exact
from networks import randomised
from torch.overrides import TorchFunctionMode

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(3, 1, 8, 8, generator=GENERATOR, dtype=torch.float64)
TOKENS = torch.randint(1, 11, (3, 5), generator=GENERATOR)
NEXT = torch.randint(0, 11, (3, 5), generator=GENERATOR)
LABELS = torch.tensor([0, 2, 1])


class InDouble(TorchFunctionMode):
    """float32 named in a call is float64: what the chain makes of casts inside a network."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def raised(value):
            return torch.float64 if value is torch.float32 else value

        kwargs = {key: raised(value) for key, value in (kwargs or {}).items()}
        return function(*map(raised, args), **kwargs)


def vit(attention):
    sizes = dict(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, num_labels=3
    )
    sizes |= dict(image_size=8, patch_size=4, num_channels=1, attn_implementation=attention)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def bert(attention):
    sizes = dict(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, num_labels=3
    )
    sizes |= dict(vocab_size=11, max_position_embeddings=8, attn_implementation=attention)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def gpt2(attention, kind="GPT2ForSequenceClassification"):
    sizes = dict(vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=8, num_labels=3)
    sizes |= dict(pad_token_id=0, bos_token_id=0, eos_token_id=0, attn_implementation=attention)
    return getattr(transformers, kind)(transformers.GPT2Config(**sizes))


def llama(attention):
    sizes = dict(
        vocab_size=11,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    sizes |= dict(intermediate_size=6, max_position_embeddings=8, pad_token_id=None)
    config = transformers.LlamaConfig(**sizes, attn_implementation=attention)
    return transformers.LlamaForCausalLM(config)


NETWORKS = {
    "vit": (vit, IMAGES, LABELS),
    "bert": (bert, TOKENS, LABELS),
    "gpt2": (gpt2, TOKENS, LABELS),
    "gpt2-language": (lambda a: gpt2(a, "GPT2LMHeadModel"), TOKENS, NEXT),
    "llama": (llama, TOKENS, NEXT),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NETWORKS)
def test_hessians_are_those_of_double_backward(name, attention):
    build, x, y = NETWORKS[name]
    torch.manual_seed(0)
    model = randomised(build(attention))
    with InDouble():
        assert_exact(model, x, y)


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_adapters(name):
    """LoRA on the queries and values, or on GPT-2's joint projection: only the adapters move."""
    peft = pytest.importorskip("peft")
    build, x, y = NETWORKS[name]
    torch.manual_seed(0)
    base = build("sdpa")
    linear = [n.split(".")[-1] for n, m in base.named_modules() if n.split(".")[-1] in TARGETS]
    config = peft.LoraConfig(r=2, target_modules=sorted(set(linear)), lora_dropout=0.1)
    model = randomised(peft.get_peft_model(base, config))
    names = [n for n, p in model.named_parameters() if "lora_" in n]
    assert names
    assert_exact(model, x, y, names)


TARGETS = {"query", "value", "q_proj", "v_proj", "c_attn"}
