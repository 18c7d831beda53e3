"""Tests of steps and evaluations on fake CUDA tensors, which have devices and types but no values.

Code that mixes devices, or waits for a value on the device, raises. Backward passes and PyTorch's errors about
nondeterministic kernels need a real GPU.
"""

from contextlib import nullcontext
from functools import partial
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
from random_modules import build_autoencoder
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import finetune_classifier
import finetune_segmentation
import pretrain_mae
from data.batches import ClassificationBatch, Normalization, PretrainingBatch
from data.segmentation import SegmentationBatch
from data.transforms import build_mixing
from modeling.classifier import Classifier
from modeling.sliding_window import predict
from modeling.teacher import Teacher
from modeling.upernet import HEADS, Segmenter
from modeling.vit import VisionTransformer
from training.metrics import reconstruction_metrics
from training.neighbours import knn_vote, nearest
from training.objectives import Classes, Labels
from training.optimizer import adamw, parameter_groups

CUDA = torch.device("cuda:0")
SIZE = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
MIXING = dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1)


@pytest.fixture(params=[False, True], ids=["default", "deterministic"])
def fake(request, monkeypatch):
    """Enable fake tensors, and autocast although there is no GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    torch.use_deterministic_algorithms(request.param)
    with FakeTensorMode():
        yield
    torch.use_deterministic_algorithms(False)


class Accelerator(SimpleNamespace):
    """Imitate the part of Accelerate that the scripts use, on the fake device."""

    device, gradient_accumulation_steps, sync_gradients = CUDA, 2, True

    def accumulate(self, model):
        return nullcontext()

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16)

    def unwrap_model(self, model):
        return model

    def backward(self, loss):
        """Give every trainable parameter a gradient; autograd itself needs a real device."""
        assert loss.requires_grad
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    def unscale_gradients(self):
        pass

    def clip_grad_norm_(self, parameters, max_norm):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def on_gpu(model):
    """Move parameters and buffers to the fake device, as `to` cannot with fake tensors, and return the model."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                copy = torch.empty(tensor.shape, device=CUDA)
                module._parameters[name] = torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
        for name, tensor in module._buffers.items():
            module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
    return model


def encoder(**extras):
    return VisionTransformer(**SIZE).add_extras(drop_path=0.2, **extras)


def pretraining(target="normalized"):
    sizes = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    model = build_autoencoder(encoder(), target=target, width=32, **sizes)
    valid = torch.empty(4, 1, 32, 32, dtype=torch.bool) if target == "pixels" else None
    batch = PretrainingBatch(torch.empty(4, 3, 32, 32, dtype=torch.uint8), torch.empty(4, 16), valid, [])
    return pretrain_mae, model, batch, {}


def distillation():
    larger = VisionTransformer(**SIZE | dict(img_size=64, patch_size=16))
    shape = dict(patch_size=16, grid=(4, 4), width=32)
    teacher = Teacher(larger, **shape, statistics=([0.5] * 3, [0.5] * 3), options={})
    return *pretraining("teacher")[:3], dict(teacher=on_gpu(teacher))


def classification():
    batch = ClassificationBatch(torch.empty(4, 3, 32, 32, dtype=torch.uint8), torch.empty(4, dtype=torch.long), [], [])
    mixing = build_mixing(0.25, device=CUDA, num_classes=5, **MIXING)
    return finetune_classifier, Classifier(encoder(), 5), batch, dict(mixing=mixing, loss_of=Classes("abcde").loss)


def labels():
    batch = ClassificationBatch(torch.empty(4, 3, 32, 32, dtype=torch.uint8), torch.empty(4, 5), [], [])
    mixing = build_mixing(0.25, device=CUDA, num_classes=5, multi_label=True, **MIXING | dict(label_smoothing=0.0))
    objective = Labels("abcde", positive_weights=torch.empty(5, device=CUDA))
    model = Classifier(encoder(), 5, problem="labels")
    return finetune_classifier, model, batch, dict(mixing=mixing, loss_of=objective.loss)


def segmentation():
    model = Segmenter(encoder(relative_position_bias=True, layer_scale=1.0), 5, head_width=16)
    masks = torch.empty(4, 32, 32, dtype=torch.uint8)
    batch = SegmentationBatch(torch.empty(4, 3, 32, 32, dtype=torch.uint8), masks, [], [])
    return finetune_segmentation, model, batch, dict(weights=torch.empty(5, device=CUDA), auxiliary_weight=0.4)


PRETRAININGS = [pretraining, *(partial(pretraining, name) for name in ("pixels", "pca", "hog")), distillation]


@pytest.mark.parametrize("task", [*PRETRAININGS, classification, labels, segmentation])
def test_a_step_neither_waits_nor_mixes_devices(fake, task):
    script, model, batch, options = task()
    on_gpu(model).train()
    optimizer = adamw(parameter_groups(model, 0.05), betas=(0.9, 0.95))
    normalize = Normalization([0.5] * 3, [0.5] * 3, CUDA)
    batches = repeat((0, batch))
    options["max_grad_norm"] = 0 if torch.are_deterministic_algorithms_enabled() else 1.0  # without and with clipping
    loss, norm, _ = script.optimizer_step(Accelerator(model=model), model, optimizer, batches, normalize, **options)
    assert loss.device == norm.device == CUDA and loss.dtype == norm.dtype == torch.float32
    with pytest.raises(DataDependentOutputException):  # a wait in the step would have raised this
        loss.item()


def test_evaluations_neither_wait_nor_mix_devices(fake):
    model, images = on_gpu(build_autoencoder(encoder(), decoder_depth=1)).eval(), torch.empty(4, 3, 32, 32)
    batch = PretrainingBatch(images, torch.empty(4, 16), None, [])
    parts = pretrain_mae.reconstruct(Accelerator(), model, batch, Normalization([0.5] * 3, [0.5] * 3, CUDA))
    metrics = reconstruction_metrics(*parts[1:])
    assert {value.device for value in metrics.values()} == {CUDA}

    views = [torch.empty(2, 3, side, 56, device=CUDA) for side in (40, 32)]
    for head in HEADS:
        segmenter = on_gpu(Segmenter(encoder(), 5, head=head)).eval()
        for window, flip in ((32, True), (None, False)):
            with Accelerator().autocast():
                assert predict(segmenter.forward, views, (50, 70), window=window, flip=flip).device == CUDA

    features, labels = torch.empty(50, 8, device=CUDA), torch.empty(50, dtype=torch.long, device=CUDA)
    assert knn_vote(*nearest(features, labels, features[:7], 5), 10).device == CUDA


class Maps(TorchDispatchMode):
    """Collect the results of operations that are maps (2, C, h, w) of more than six rows."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and len(tensor) == 2 and tensor.shape[2] > 6:
                self.found.append((operation, tensor))
        return result


def select_cudnn(*args, transposed, **kwargs):
    """Return the convolution backend of a GPU, which gives fake tensors its memory layout."""
    return torch._C._ConvBackend.CudnnTranspose if transposed else torch._C._ConvBackend.Cudnn


def test_the_maps_of_upernet_are_half_as_wide_and_never_rearranged(fake, monkeypatch):
    """All maps of the FPN and the heads are bfloat16 in NHWC; the loss gets its logits in float32 and NCHW."""
    monkeypatch.setattr(torch._C, "_select_conv_backend", select_cudnn)
    model, images = on_gpu(Segmenter(encoder(), 5, head_width=16)).train(), torch.empty(2, 3, 64, 64, device=CUDA)
    with Accelerator().autocast():
        features = model.encoder.forward_layers(images, model.layers)
        with Maps() as maps:
            pyramid = model.fpn(features)
            logits = model.decode_head(pyramid), model.auxiliary_head(pyramid)
        outputs = model(images)
    rearranging = ("view", "permute", "transpose", "expand")  # these make views, not copies
    kept = [(op, m) for op, m in maps.found if not any(word in str(op) for word in rearranging)]
    assert len(kept) > 20 and {m.dtype for _, m in kept} == {torch.bfloat16}
    assert all(m.is_contiguous(memory_format=torch.channels_last) for _, m in kept), kept
    assert logits[0].dtype == torch.bfloat16
    assert all(output.dtype == torch.float32 and output.is_contiguous() for output in outputs)
