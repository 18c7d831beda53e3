"""BatchNorm (Ioffe and Szegedy 2015) with the statistics of one process or of all processes.

Legend: B batch, C channels, h w positions.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class BatchNorm(nn.BatchNorm2d):
    """Normalize maps (B, C, h, w); with `synchronized`, training uses the statistics of all processes.

    Their maps must have the same shape. Unlike torch.nn.SyncBatchNorm, the layer does not wait for the device, and
    torch.compile captures it in one graph.
    """

    synchronized = False

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if not (self.synchronized and self.training):
            return super().forward(maps)
        normalized, mean, var = SynchronizedNorm.apply(maps, self.weight, self.bias, self.eps)
        count = dist.get_world_size() * maps.numel() / maps.shape[1]
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return normalized


class SynchronizedNorm(torch.autograd.Function):
    """Normalize maps (B, C, h, w) over all processes; also return their means and biased variances (C,)."""

    @staticmethod
    def forward(ctx, maps, weight, bias, eps):
        # In float32, the type of the weights. The mean of the squares minus the squared mean would lose digits.
        var, mean = torch.var_mean(maps.to(weight.dtype), (0, 2, 3), correction=0)
        variances, means = gather(torch.stack([var, mean])).unbind(1)  # (processes, C) each
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(maps, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(maps, mean, var, weight, bias, eps=eps), mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        maps, weight, mean, var = ctx.saved_tensors
        # First the gradients for a constant mean and variance, by the kernel of evaluation mode
        constants = (mean, var, None, None, False, ctx.eps, (True, True, True))
        grad_maps, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(grad, maps, weight, *constants)
        # Then the part through mean and variance: the means of grad and of grad times the normalized maps
        slope, offset = gather(torch.stack([grad_weight, grad_bias])).mean(0) / (maps.numel() / maps.shape[1])
        inverse_std = (var + ctx.eps).rsqrt()
        scale, slope = weight * inverse_std, slope * inverse_std
        slope, offset, mean = ((scale * slope)[:, None, None], (scale * offset)[:, None, None], mean[:, None, None])
        return (grad_maps - (slope * (maps - mean) + offset)).to(maps.dtype), grad_weight, grad_bias, None


def gather(values: torch.Tensor) -> torch.Tensor:
    """Gather the values of all processes: (processes, *values.shape)."""
    gathered = values.new_zeros(dist.get_world_size(), *values.shape)
    gathered[dist.get_rank()] = values
    dist.all_reduce(gathered)  # torch's function that gathers tensors has another name from 2.14 on
    return gathered
