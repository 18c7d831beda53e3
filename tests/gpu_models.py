"""Checks of gpu.py that compute in their own process: numbers, determinism, speed, memory."""

import copy
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from gpu_lab import GIGABYTE, SCRIPTS, Lab
from random_modules import build_autoencoder
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pretrain_mae
from benchmarks import step as step_benchmark
from data.batches import Normalization
from data.decode import PixelFormat
from modeling.classifier import Classifier
from modeling.upernet import Segmenter, segmentation_loss
from modeling.vit import SIZES, VisionTransformer
from training.launch import prepare_compiler, set_speed
from training.memory import fit_micro_batch
from training.optimizer import adamw, parameter_groups, set_learning_rate

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
TINY_DECODER = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
SHALLOW = SIZES["small"] | dict(depth=4)  # has all kernels of ViT-S, and compiles in a third of the time
GOALS = {  # images/s of compiled pre-training steps of 256 images in bfloat16
    "H100": {"base": 4900, "large": 2700, "huge": 1300},
    "H200": {"base": 5500, "large": 3050, "huge": 1440},
}
MEMORY = {"base": (45.6, 2.0), "large": (73.3, 5.9), "huge": (133.7, 11.8)}  # eager: MB per image, GB of all else


def new_task(task: str, size: str, batch_size: int, device: str) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Return a model, and a function that computes its loss on images that are the same on every device."""
    torch.manual_seed(0)
    encoder = VisionTransformer(**{"tiny": TINY, "shallow": SHALLOW}.get(size) or SIZES[size]).initialize()
    height, width = encoder.img_size
    images, noise = torch.randn(batch_size, 3, height, width), torch.rand(batch_size, encoder.grid[0] * encoder.grid[1])
    labels, masks = torch.arange(batch_size) % 10, torch.randint(0, 10, (batch_size, height, width), dtype=torch.uint8)
    if task == "mae":
        model = build_autoencoder(encoder, **{"tiny": TINY_DECODER, "shallow": dict(decoder_depth=2)}.get(size, {}))
    elif task == "classifier":
        model = Classifier(encoder, 10)
        nn.init.normal_(model.head.weight, std=0.02)  # the small initial head makes gradients mere rounding errors
    else:
        extras = dict(relative_position_bias=True, layer_scale=1.0)
        model = Segmenter(encoder.add_extras(**extras), 10, head_width=16 if size == "tiny" else None)
    model = model.to(device).train()
    images, noise, labels, masks = (part.to(device) for part in (images, noise, labels, masks))

    def segmenter_loss() -> torch.Tensor:
        logits, auxiliary = model(images)
        return segmentation_loss(logits, masks) + 0.4 * segmentation_loss(auxiliary, masks)

    losses = {
        "mae": lambda: model(images, noise, loss_only=True),
        "classifier": lambda: F.cross_entropy(model(images).float(), labels),
        "segmenter": segmenter_loss,
    }
    return model, losses[task]


def loss_and_gradients(lab: Lab, task: str, precision: str, kernel: str | None = None, device: str | None = None):
    """Return the loss and all gradients as a float64 vector on the CPU; None if the kernel does not apply."""
    device = device or lab.device
    model, loss_of = new_task(task, "tiny" if lab.tiny else "shallow", 4 if lab.tiny else 8, device)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0  # devices draw different numbers
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scale = 2.0**10 if precision == "fp16" else 1.0
    try:
        with torch.autocast(device, dtype, enabled=dtype is not None), only_kernel(kernel):
            loss = loss_of()
            (loss * scale).backward()
    except RuntimeError as error:
        if kernel and "kernel" in str(error):
            return None
        raise
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat([gradient.flatten().double().cpu() / scale for gradient in gradients])


def only_kernel(name: str | None):
    """Return a context in which attention uses one kernel; None: PyTorch's choice."""
    return sdpa_kernel(KERNELS[name]) if name else nullcontext()


def matrix_rate(lab: Lab) -> float:
    """Measure the TFLOP/s of a large matrix product in bfloat16."""
    size = 256 if lab.tiny else 8192
    a, b = (torch.randn(size, size, device=lab.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / lab.seconds_of(lambda: a @ b, repeats=20) / 1e12


def check_environment(lab: Lab) -> None:
    """Report versions, cores, shared memory, attention kernels, and the rates that the card reaches."""
    card = torch.cuda.get_device_name() if lab.on_gpu else "CPU"
    lab.report("card", card)
    cudnn = torch.backends.cudnn.version()
    lab.report("versions", f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}")
    lab.report("CPU cores", len(os.sched_getaffinity(0)))
    lab.report("/dev/shm", shutil.disk_usage("/dev/shm").total / GIGABYTE, unit="GB")
    order = getattr(torch._C, "_get_sdp_priority_order", list)()
    lab.report("attention kernels, by priority", ", ".join(str(SDPBackend(number).name) for number in order))

    rate = matrix_rate(lab)
    lab.report("bf16 matrix rate", rate, "about 790 on an H100", ok=None if lab.tiny else rate > 500, unit="TFLOP/s")
    source = torch.empty(2**16 if lab.tiny else 2**30, dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / lab.seconds_of(lambda: target.copy_(source), repeats=20) / 1e12
    lab.report("copy, read + written", rate, "about 3.0 on an H100", ok=None if lab.tiny else rate > 2, unit="TB/s")
    for pinned in (False, True):
        host = torch.empty(2**16 if lab.tiny else 2**28, dtype=torch.uint8, pin_memory=pinned and lab.on_gpu)
        rate = len(host) / lab.seconds_of(lambda: host.to(lab.device, non_blocking=True), repeats=5) / GIGABYTE  # noqa: B023
        lab.report(f"copy to the device, {'pinned' if pinned else 'pageable'}", rate, unit="GB/s")


def check_numerics(lab: Lab) -> None:
    """Compare losses and gradients with those of a CPU in float32, and of transformers and timm."""
    device = torch.device(lab.device)
    for task in SCRIPTS:
        set_speed(device, tf32=False)
        loss, gradients = loss_and_gradients(lab, task, "no", device="cpu")
        cases = [("no", False, None), ("no", True, None), ("bf16", False, None), ("fp16", False, None)]
        cases += [("no", False, kernel) for kernel in ("efficient", "math")]
        cases += [("bf16", False, kernel) for kernel in ("flash", "efficient", "cuDNN", "math")]
        for precision, tf32, kernel in cases:
            set_speed(device, tf32=tf32)
            name = precision.replace("no", "float32") + (" TF32" if tf32 else "") + (f", {kernel}" if kernel else "")
            result = loss_and_gradients(lab, task, precision, kernel)
            if result is None:
                lab.report(f"{task} {name}", "the kernel does not apply")
                continue
            errors = abs(result[0] / loss - 1), ((result[1] - gradients).norm() / gradients.norm()).item()
            cosine = F.cosine_similarity(result[1], gradients, dim=0).item()
            value = f"loss {errors[0]:.1e}, gradients {errors[1]:.1e}, cosine {cosine:.5f}"
            if precision == "no":
                limits = (3e-3, 3e-2) if tf32 else (1e-6, 1e-5)
                limits = (
                    limits[0],
                    1e-3 if task == "segmenter" and not tf32 else limits[1],
                )  # BatchNorm over few values is less exact
                expected = f"loss {limits[0]:g}, gradients {limits[1]:g}"
                ok = errors[0] <= limits[0] and errors[1] <= limits[1]
            else:
                ok, expected = errors[0] <= 2e-3 and cosine > 0.999, "loss 2e-3, cosine of gradients above 0.999"
            lab.report(f"{task} {name}", value, expected, ok)

    set_speed(device, tf32=False)
    size = TINY if lab.tiny else SIZES["small"]
    for task in ("mae", "classifier"):
        sides = step_benchmark.new_sides(task, size, batch_size=4, precision="no")
        (ours, norm), (theirs, their_norm) = (torch.stack(side.backward()).tolist() for side in sides.values())
        error = max(abs(ours / theirs - 1), abs(norm / their_norm - 1))
        lab.report(f"{task} against {step_benchmark.PEERS[task].__name__}, float32", error, "1e-5", error < 1e-5)


def digest(lab: Lab, task: str, kernel: str | None, deterministic: bool = False, cache: str = "") -> str:
    """Return a hash of loss and gradients in bf16, "different" if a second step differs; compile if given a `cache`."""
    set_speed(torch.device(lab.device), tf32=True, deterministic=deterministic)
    model, loss_of = new_task(task, "tiny" if lab.tiny else "shallow", 4 if lab.tiny else 16, lab.device)
    if cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(lab.folder / cache)
        if not lab.tiny:
            prepare_compiler(torch.device(lab.device))
        model.compile(fullgraph=True, dynamic=False, backend="aot_eager" if lab.tiny else "inductor")
    hashes = set()
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)  # for UperNet's dropout
        with torch.autocast(lab.device, torch.bfloat16), only_kernel(kernel):
            loss = loss_of()
            loss.backward()
        parts = [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
        hashes.add(hashlib.sha256(b"".join(part.float().cpu().numpy().tobytes() for part in parts)).hexdigest())
    return hashes.pop() if len(hashes) == 1 else "different"


def check_determinism(lab: Lab) -> None:
    """Take the same step twice; with --deterministic, two processes and two compilations must give equal bits."""
    works = {}
    for task in SCRIPTS:
        for attempt in "AB":
            if task == "mae" or not lab.tiny:
                cache = f"cache {task} {attempt}"
                works[f"{task}, deterministic, compiled {attempt}"] = (digest, lab, task, None, True, cache)
            works[f"{task}, deterministic {attempt}"] = (digest, lab, task, None, True)
    for task in SCRIPTS:
        for kernel in ("flash",) if lab.tiny else ("cuDNN", "flash", "efficient"):
            if task != "segmenter" or kernel == "efficient":  # its attention bias needs that kernel
                works[f"{task}, {kernel}"] = (digest, lab, task, kernel)
    results = lab.collect(works, limit=len(works))
    for name, result in results.items():
        if "deterministic" not in name:
            lab.report(name, "failed" if result is None else "different" if result == "different" else "equal")
        elif name.endswith("A"):
            other = results[name[:-1] + "B"]
            equal = result == other and result not in (None, "different")
            text = "failed" if None in (result, other) else "equal" if equal else "different"
            lab.report(name[:-2], text, "equal", equal)


EAGER_RIVALS = ["theirs eager", "official manner eager"]
PRETRAINING = [  # size, batch size, implementations that ours is compared with
    ("base", 256, [*EAGER_RIVALS, "theirs compiled"]),
    ("large", 256, EAGER_RIVALS),
    ("huge", 256, []),
    ("base", 512, []),
]
FINETUNING = {"classifier": 3200, "segmenter": None}  # images/s expected of ViT-B; None: only reported


def pretraining_sides(lab: Lab, size: str, batch_size: int, rivals: list[str]) -> dict:
    """Return training steps by (implementation, mode), see `new_sides` in benchmarks/step.py."""
    sizes = TINY if lab.tiny else SIZES[size]
    set_speed(torch.device(lab.device), tf32=True)
    options = dict(batch_size=batch_size, precision="bf16", compiled=not lab.tiny)
    return step_benchmark.new_sides("mae", sizes, **options, peer=bool(rivals), official_manner=bool(rivals))


def first_step(lab: Lab, task: str, *options) -> float:
    """Return the seconds until the first compiled steps of a task are done."""
    start = time.monotonic()
    if task == "mae":
        sides = pretraining_sides(lab, *options)
        steps = [side.step for (_, mode), side in sides.items() if lab.tiny or mode == "compiled"]
    else:
        steps = [finetuning_step(lab, task)[0]]
    for step in steps:
        step()
    lab.synchronize()
    return time.monotonic() - start


def check_compilation(lab: Lab) -> None:
    """Take the first step of all that check_throughput times, in parallel, to fill the compiler's cache."""
    works = {f"ViT-base {task}": (first_step, lab, task) for task in FINETUNING}
    for size, batch_size, rivals in [("base", 4, [])] if lab.tiny else PRETRAINING:
        compiled = [rival for rival in rivals if "compiled" in rival]
        works[f"ViT-{size}, batch {batch_size}"] = (first_step, lab, "mae", size, batch_size, compiled)
    for name, seconds in lab.collect(works).items():
        lab.report(f"{name}: first steps", seconds, ok=None if seconds else False, unit="s")


def time_pretraining(lab: Lab, size: str, batch_size: int, rivals: list[str]) -> dict[str, float]:
    """Report speed and memory of our pre-training step; return the images/s of ours and of `rivals` by name."""
    sides = pretraining_sides(lab, size, batch_size, rivals)
    card = next((card for card in GOALS if lab.on_gpu and card in torch.cuda.get_device_name()), None)
    speeds, peak_rate = {}, matrix_rate(lab)
    for (side, mode), step in sides.items():
        if side != "ours" and f"{side} {mode}" not in rivals:
            continue
        speed = speeds[f"{side} {mode}"] = batch_size / lab.seconds_of(step.step, repeats=20)
        if side != "ours":
            continue
        name = f"ViT-{size}, batch {batch_size}, {mode}"
        memory = step.peak_memory() / GIGABYTE if lab.on_gpu else 0.0
        tflops = speed * step.model.training_flops() / 1e12
        more = dict(tflops=tflops, gigabytes=memory, share=tflops / peak_rate)
        goal = GOALS[card][size] if card and mode == "compiled" and batch_size == 256 else None
        expected = f"{goal} on an {card}, at least {0.8 * goal:.0f}" if goal else ""
        lab.report(name, speed, expected, speed >= 0.8 * goal if goal else None, "images/s", **more)
        if lab.on_gpu:
            planned = MEMORY[size][1] + MEMORY[size][0] * batch_size / 1000
            low = 0.9 if mode == "eager" else 0.0  # the compiler saves memory by recomputing cheap values
            expected, ok = f"{low:g} to 1.2 of {planned:.1f}", low <= memory / planned <= 1.2
            lab.report(f"{name}: peak memory", memory, expected, ok, "GB")
    return speeds


def time_kernels(lab: Lab) -> dict[str, float]:
    """Return images/s of an eager pre-training step of ViT-B by attention kernel."""
    size, batch_size = ("tiny", 4) if lab.tiny else ("base", 256)
    model, loss_of = new_task("mae", size, batch_size, lab.device)
    speeds = {}
    for kernel in ("flash",) if lab.tiny else ("cuDNN", "flash", "efficient"):

        def step() -> None:
            with torch.autocast(lab.device, torch.bfloat16), only_kernel(kernel):  # noqa: B023
                loss_of().backward()
            model.zero_grad()

        speeds[kernel] = batch_size / lab.seconds_of(step, repeats=10)
    return speeds


def finetuning_step(lab: Lab, task: str) -> tuple[Callable[[], None], int]:
    """Return a compiled step of fine-tuning ViT-B, and its batch size."""
    set_speed(torch.device(lab.device), tf32=True)
    size, batch_size = ("tiny" if lab.tiny else "base"), 4 if lab.tiny else 256 if task == "classifier" else 16
    model, loss_of = new_task(task, size, batch_size, lab.device)
    optimizer = adamw(parameter_groups(model, 0.05), betas=(0.9, 0.999))
    if not lab.tiny:
        model.compile(fullgraph=True, dynamic=False)

    def step() -> None:
        with torch.autocast(lab.device, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, batch_size


def time_finetuning(lab: Lab, task: str) -> float:
    """Return images/s of a compiled step of fine-tuning ViT-B."""
    step, batch_size = finetuning_step(lab, task)
    return batch_size / lab.seconds_of(step, repeats=20)


def check_throughput(lab: Lab) -> None:
    """Time training steps, and compare pre-training with transformers and with the official code's manner."""
    for kernel, speed in (lab.collect({"kernels": (time_kernels, lab)})["kernels"] or {}).items():
        lab.report(f"ViT-base, forward and backward, {kernel} attention", speed, unit="images/s")
    for size, batch_size, rivals in [("base", 4, EAGER_RIVALS)] if lab.tiny else PRETRAINING:
        name = f"ViT-{size}, batch {batch_size}"
        speeds = lab.collect({name: (time_pretraining, lab, size, batch_size, rivals)})[name]
        if speeds is None:
            lab.report(name, "failed", "a figure", ok=False)
            continue
        best = speeds.get("ours compiled", speeds["ours eager"])
        for rival, goal in {"theirs eager": 1.5, "theirs compiled": None, "official manner eager": 1.3}.items():
            if rival in speeds:
                ratio = best / speeds[rival]
                expected = f"at least {goal}" if goal else ""
                lab.report(f"{name}: ours / {rival}", ratio, expected, None if lab.tiny or not goal else ratio >= goal)
    for task, expected in FINETUNING.items():
        speed = lab.collect({task: (time_finetuning, lab, task)})[task]
        ok = False if speed is None else None if lab.tiny or not expected else speed >= 0.8 * expected
        expected = f"about {expected} on an H100" if expected else ""
        lab.report(f"ViT-base {task}, compiled", speed, expected, ok, "images/s")


def fit_one(lab: Lab, size: str) -> int:
    """Return the micro-batch size that --micro_batch_size auto finds for pre-training."""
    set_speed(torch.device(lab.device), tf32=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=not lab.on_gpu)
    sizes = TINY if lab.tiny else SIZES[size]
    decoder = TINY_DECODER if lab.tiny else {}
    model = build_autoencoder(VisionTransformer(**sizes), **decoder).to(accelerator.device)
    optimizer = adamw(parameter_groups(model, 0.05), betas=(0.9, 0.95))
    set_learning_rate(optimizer, 1e-4)
    fixed = dict(normalize=Normalization([0.5] * 3, [0.5] * 3, accelerator.device), pixels=PixelFormat(3))
    return fit_micro_batch(
        [2**power for power in range(3 if lab.tiny else 13)],
        lambda batch: pretrain_mae.empty_step(accelerator, *copy.deepcopy((model, optimizer)), batch, **fixed),
        device=accelerator.device,
        any_process=lambda value: value,
    )


def check_memory(lab: Lab) -> None:
    """Find the largest micro-batch that fits, from 4096 down."""
    works = {size: (fit_one, lab, size) for size in (["base"] if lab.tiny else ["base", "large", "huge"])}
    for size, found in lab.collect(works, limit=1).items():
        expected = {"base": 1024, "large": 512, "huge": 256}[size]
        ok = found is not None and (lab.tiny or found >= expected)
        lab.report(f"micro-batch of ViT-{size}", found, f"at least {expected} on 80 GB", ok, unit="images")
