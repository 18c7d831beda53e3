import pytest
import torch
from torch import nn

from modeling.mae import MaskedAutoencoder
from modeling.vit import SIZES, VisionTransformer
from training.optimizer import adamw, parameter_groups, set_learning_rate


def names(groups):
    return {group["weight_decay"]: set(group["names"]) for group in groups}


def base_mae():
    with torch.device("meta"):
        return MaskedAutoencoder(VisionTransformer(**SIZES["base"]))


def test_groups_of_vit_base_against_the_official_rule():
    """What decays has more than one dimension (the cls and mask tokens too); biases and norms have one."""
    model = base_mae()
    groups = names(parameter_groups(model, 0.05))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert groups[0.05] == {name for name, parameter in trained.items() if parameter.ndim > 1}
    assert groups[0.0] == {name for name, parameter in trained.items() if parameter.ndim == 1}
    assert {"encoder.cls_token", "mask_token", "encoder.patch_embed.proj.weight"} <= groups[0.05]
    assert not {"encoder.pos_embed", "decoder_pos_embed"} & (groups[0.05] | groups[0.0])


def test_biases_and_norms_decay_where_asked():
    biases = names(parameter_groups(base_mae(), 0.05, bias_weight_decay=True))
    assert "encoder.blocks.0.mlp.fc1.bias" in biases[0.05] and "encoder.norm.bias" in biases[0.0]
    norms = names(parameter_groups(base_mae(), 0.05, norm_weight_decay=True))
    assert "encoder.norm.bias" in norms[0.05] and "encoder.blocks.3.norm1.weight" in norms[0.05]
    assert "encoder.blocks.0.mlp.fc1.bias" in norms[0.0]


def test_the_model_is_asked():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.no_weight_decay = lambda: {"0.weight"}
    assert names(parameter_groups(model, 0.1)) == {0.0: {"0.weight", "0.bias", "1.weight", "1.bias"}}


def test_a_step_decays_only_what_should_and_is_adamw():
    model = nn.Sequential(nn.Linear(3, 2))
    model.no_weight_decay = set
    optimizer = adamw(parameter_groups(model, 0.5), betas=(0.9, 0.95))
    set_learning_rate(optimizer, 0.1)
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    gradient = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.1, -1.0]])
    model[0].weight.grad, model[0].bias.grad = gradient.clone(), torch.tensor([1.0, -1.0])
    optimizer.step()
    # The first step of Adam moves by the rate in the gradient's direction, whatever its size
    torch.testing.assert_close(model[0].weight.detach(), weight * (1 - 0.1 * 0.5) - 0.1 * gradient.sign())
    torch.testing.assert_close(model[0].bias.detach(), bias - 0.1 * torch.tensor([1.0, -1.0]))
    assert optimizer.defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_every_trained_parameter_is_in_exactly_one_group(decay):
    model = base_mae()
    listed = [name for group in parameter_groups(model, decay) for name in group["names"]]
    assert sorted(listed) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
