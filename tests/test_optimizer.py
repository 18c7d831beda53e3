import copy
import io
from functools import partial

import pytest
import timm
import torch
from accelerate import Accelerator
from random_modules import build_autoencoder
from torch import nn

import pretrain_mae
from modeling.classifier import Classifier
from modeling.vit import SIZES, VisionTransformer
from training.optimizer import adamw, check_muon, clip_gradients, lars, muon, parameter_groups, set_learning_rate

# 0.65 ** (13 - i) for layer i of ViT-B: the embeddings (0), the blocks (1 to 12) and the head (13)
SCALES = [
    *(0.003697205891, 0.005688009063, 0.008750783174, 0.01346274334, 0.02071191284, 0.03186448129, 0.04902227891),
    *(0.07541889063, 0.1160290625, 0.17850625, 0.274625, 0.4225, 0.65, 1.0),
]


def names_of(model, groups):
    """Return the names of the parameters of each group, by weight decay and scale of the learning rate."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {(group["weight_decay"], group["lr_scale"]): {names[id(p)] for p in group["params"]} for group in groups}


def base_mae():
    with torch.device("meta"):
        return build_autoencoder(VisionTransformer(**SIZES["base"]))


def base_classifier(pooling):
    with torch.device("meta"):
        return Classifier(VisionTransformer(**SIZES["base"]), 1000, pooling=pooling)


def test_groups_of_vit_base_against_the_official_rule():
    """Parameters with more than one dimension decay, the cls and mask tokens too."""
    model = base_mae()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = {name for name, parameter in trained.items() if parameter.ndim > 1}
    groups = names_of(model, parameter_groups(model, 0.05))
    assert groups == {(0.05, 1.0): decayed, (0.0, 1.0): trained.keys() - decayed}
    assert names_of(model, parameter_groups(model, 0.0)) == {(0.0, 1.0): trained.keys()}
    assert "encoder.pos_embed" not in trained and "mask_token" in trained


def test_biases_and_norms_decay_if_asked():
    model, on, off = base_mae(), (0.05, 1.0), (0.0, 1.0)
    bias, norm = "encoder.blocks.0.mlp.fc1.bias", {"encoder.norm.bias", "encoder.blocks.3.norm1.weight"}
    biases = names_of(model, parameter_groups(model, 0.05, bias_weight_decay=True))
    norms = names_of(model, parameter_groups(model, 0.05, norm_weight_decay=True))
    assert bias in biases[on] & norms[off] and norm <= biases[off] & norms[on]


@pytest.mark.parametrize(("pooling", "theirs"), [("mean", "avg"), ("cls", "token")])
def test_layer_decay_of_vit_base_against_the_official_rule(pooling, theirs):
    """Apply the rule of BEiT and of the official MAE to the names and shapes of timm's ViT-B."""
    with torch.device("meta"):
        reference = timm.create_model("vit_base_patch16_224", global_pool=theirs)
    table = {}
    for name, parameter in reference.named_parameters():
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = 13
        decays = len(parameter.shape) > 1 and not name.endswith(".bias") and name not in ("cls_token", "pos_embed")
        ours = name if name.startswith(("head", "fc_norm")) else f"encoder.{name}"
        table[ours] = (0.05 if decays else 0.0, SCALES[layer])
    model = base_classifier(pooling)
    groups = names_of(model, parameter_groups(model, 0.05, layer_decay=0.65))
    actual = {name: settings for settings, names in groups.items() for name in names}
    assert actual == {name: (decay, pytest.approx(scale, rel=1e-9)) for name, (decay, scale) in table.items()}
    assert len(table) == 152 and len(groups) == 28


@pytest.mark.parametrize("build", [partial(adamw, betas=(0.9, 0.95)), lars])
def test_scales_survive_accelerate_and_a_checkpoint(build):
    model = Classifier(VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2), 3)
    accelerator, file = Accelerator(cpu=True), io.BytesIO()
    optimizer, loaded = (accelerator.prepare(build(parameter_groups(model, 0.05, layer_decay=0.5))) for _ in range(2))
    model(torch.rand(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    set_learning_rate(loaded, 7.0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    expected = {"encoder.cls_token": 0.25, "encoder.blocks.0.norm1.bias": 0.5, "encoder.blocks.1.attn.qkv.weight": 1}
    expected |= {"fc_norm.weight": 2, "head.weight": 2, "head.bias": 2}
    for prepared in (optimizer, loaded):
        set_learning_rate(prepared, 2.0)
        rates = {id(p): group["lr"] for group in prepared.param_groups for p in group["params"]}
        assert {name: rates[id(model.get_parameter(name))] for name in expected} == expected
        assert [group["weight_decay"] for group in prepared.param_groups][-2:] == [0.05, 0.0]
    assert loaded.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys() != set()


def test_lars_excludes_what_has_one_dimension():
    """1-D parameters get neither weight decay nor trust ratio, even if biases and norms are to decay."""
    model = base_classifier("cls")
    groups = parameter_groups(model, 0.1, bias_weight_decay=True, norm_weight_decay=True)
    by_id = {id(p): group for group in lars(groups).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group, vector = by_id.pop(id(parameter)), len(parameter.shape) == 1
        assert group["always_adapt"] is not vector, name
        assert group["weight_decay"] == (0.0 if vector or name in ("encoder.pos_embed", "encoder.cls_token") else 0.1)
        assert (group["momentum"], group["trust_coeff"], group["nesterov"]) == (0.9, 0.001, False)
    assert not by_id


def lars_of_the_paper(weight, gradients, *, rate, decay, adapted):
    """Return the weight after one step per gradient, by algorithm 1 of You et al. 2017."""
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        norm = (weight**2).sum().sqrt()
        local_rate = 0.001 * norm / ((gradient**2).sum().sqrt() + decay * norm) if adapted else 1.0
        velocity = 0.9 * velocity + rate * local_rate * (gradient + decay * weight)
        weight = weight - velocity
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_of_lars_against_the_equations_of_the_paper(decay):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 4).double()
    model.no_weight_decay = set
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    gradients = [torch.randn(4, 6, generator=generator, dtype=torch.float64) * 3**i for i in range(5)]
    optimizer = lars(parameter_groups(model, decay, bias_weight_decay=True))
    set_learning_rate(optimizer, 6.4)
    for gradient in gradients:
        model.weight.grad, model.bias.grad = gradient[:, :5].clone(), gradient[:, 5].clone()
        optimizer.step()
    expected = lars_of_the_paper(weight, [g[:, :5] for g in gradients], rate=6.4, decay=decay, adapted=True)
    # timm's LARS adds 1e-8 to the denominator
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-8, atol=1e-9)
    assert (expected - weight).abs().max() > 1e-3
    expected = lars_of_the_paper(bias, [g[:, 5] for g in gradients], rate=6.4, decay=0.0, adapted=False)
    torch.testing.assert_close(model.bias.detach(), expected)


def test_gradients_are_clipped_or_left_as_they_are():
    accelerator, model = Accelerator(cpu=True), nn.Linear(3, 2)
    model(torch.ones(4, 3)).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    for max_norm, factor in ((0, 1.0), (norm / 2, 0.5)):
        torch.testing.assert_close(clip_gradients(accelerator, model, max_norm), norm)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, factor * gradient)


def orthogonalized(matrix):
    """Return a matrix after five Newton-Schulz steps in bfloat16, as in the post of Jordan et al."""
    x = matrix.bfloat16()
    x = x.T if len(x) > len(x.T) else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return (x.T if len(matrix) > len(matrix.T) else x).float()


def muon_of_the_post(weight, gradients, *, rate, decay, parts):
    """Return the weight after one step per gradient, with the learning rates of Liu et al. 2025, equation 4."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        updates = [orthogonalized(part) for part in (0.05 * gradient + 0.95 * momentum).chunk(parts)]
        scale = 0.2 * max(updates[0].shape) ** 0.5
        weight = weight - rate * (scale * torch.cat(updates) + decay * weight)
    return weight


def small_mae():
    torch.manual_seed(0)
    encoder = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2).initialize()
    return build_autoencoder(encoder, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)


def test_muon_takes_the_matrices_of_the_blocks():
    model = base_mae()
    optimizer = muon(parameter_groups(model, 0.05), model, betas=(0.9, 0.95))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = {names[id(p)]: group["muon_parts"] for group in optimizer.param_groups for p in group["params"]}
    blocks = [f"encoder.blocks.{i}" for i in range(12)] + [f"decoder.blocks.{i}" for i in range(8)]
    expected = {f"{block}.attn.qkv.weight": 3 for block in blocks}
    expected |= {f"{block}.{name}.weight": 1 for block in blocks for name in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert parts == dict.fromkeys(trained, 0) | expected
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name in trained if decays[name] == 0.05} == {n for n in trained if model.get_parameter(n).ndim > 1}


def test_muon_splits_keys_from_values_and_leaves_what_is_no_block():
    model = nn.ModuleDict({"embed": nn.Linear(6, 4), "blocks": nn.ModuleList([nn.ModuleDict()])})
    model["blocks"][0].update({"q": nn.Linear(4, 4), "kv": nn.Linear(6, 8), "norm": nn.LayerNorm(4)})
    model.no_weight_decay = set
    groups = muon(parameter_groups(model, 0.05), model, betas=(0.9, 0.95)).param_groups
    parts = {id(p): group["muon_parts"] for group in groups for p in group["params"]}
    taken = {name: parts[id(p)] for name, p in model.named_parameters() if parts[id(p)]}
    assert taken == {"blocks.0.q.weight": 1, "blocks.0.kv.weight": 2} and len(parts) == 8


def test_steps_of_muon_against_newton_schulz_and_of_adamw():
    model = small_mae()
    groups = parameter_groups(model, 0.3)
    optimizer = muon(groups, model, betas=(0.9, 0.95))
    set_learning_rate(optimizer, 0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rest = [name for name in before if "blocks." not in name or before[name].ndim == 1]
    reference = copy.deepcopy(model)
    adam = adamw(parameter_groups(reference, 0.3), betas=(0.9, 0.95))
    set_learning_rate(adam, 0.01)
    gradients = {name: [torch.randn_like(value) for _ in range(3)] for name, value in before.items()}
    for i in range(3):
        for one in (model, reference):
            for name, parameter in one.named_parameters():
                parameter.grad = gradients[name][i].clone() if parameter.requires_grad else None
        optimizer.step()
        adam.step()
    after = dict(model.named_parameters())
    for name, value in before.items():
        if name in rest:
            assert torch.equal(after[name], reference.get_parameter(name)), name
            continue
        parts = 3 if "qkv" in name else 1
        expected = muon_of_the_post(value, gradients[name], rate=0.01, decay=0.3, parts=parts)
        torch.testing.assert_close(after[name].detach(), expected, rtol=0, atol=1e-3)  # bfloat16 rounding
        other = muon_of_the_post(
            value, gradients[name], rate=0.01, decay=0.3, parts=4 - parts if len(value) == 24 else 2
        )
        assert (expected - other).abs().max() > 2e-3 and (expected - value).abs().max() > 0.01, name


def test_muon_survives_copies_accelerate_and_a_checkpoint():
    model, file = small_mae(), io.BytesIO()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(muon(parameter_groups(model, 0.05), model, betas=(0.9, 0.95)))
    noise, batches = torch.rand(5, 4), torch.rand(4, 5, 3, 8, 8)

    def take_step(model, optimizer, images):
        model(images, noise, loss_only=True).backward()
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        optimizer.zero_grad()

    take_step(model, optimizer, batches[0])
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    plain = copy.deepcopy((model, optimizer.optimizer))  # as trials of micro-batch sizes do
    loaded = small_mae()
    resumed = accelerator.prepare(muon(parameter_groups(loaded, 0.05), loaded, betas=(0.9, 0.95)))
    take_step(loaded, resumed, batches[3])
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    loaded.load_state_dict(weights)
    resumed.load_state_dict(state)
    for images in batches[1:3]:
        for pair in ((model, optimizer), plain, (loaded, resumed)):
            take_step(*pair, images)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain[0].get_parameter(name)), name
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert not torch.equal(model.decoder.pred.weight, weights["decoder.pred.weight"])


def test_muon_is_refused_by_an_older_torch(monkeypatch):
    assert check_muon("muon") == []
    monkeypatch.delattr(torch.optim, "Muon")
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    assert check_muon("adamw") == []
    expected = "--optimizer muon needs torch 2.9, this is torch 2.8.0; upgrade it, or leave the flag out"
    assert check_muon("muon") == [expected]
    assert pretrain_mae.parse_args(["--path_to_data", "x", "--optimizer", "muon"])[1] == [expected]
