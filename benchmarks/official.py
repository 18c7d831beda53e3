"""A masked autoencoder that works as the official code does, written from the paper (He et al. 2021, section 3).

It computes the same loss as our model in another way. All patches are embedded before the visible ones are selected,
and attention is a softmax of explicit scores (timm's blocks). The decoder sees the tokens in the order of the image and
predicts every patch; a mask restricts the loss to the masked patches. Images arrive normalized, in float32.
"""

import timm
import torch
from torch import nn
from torch.nn import functional as F

from modeling.mae import MaskedAutoencoder
from modeling.vit import VisionTransformer, patchify, take


def timm_encoder(encoder: VisionTransformer, **head) -> timm.models.VisionTransformer:
    """Return a timm model with the sizes of our encoder and its own weights; `head` are further arguments of timm."""
    names = ("img_size", "patch_size", "in_channels", "embed_dim", "depth", "num_heads", "mlp_ratio")
    sizes = {name.replace("in_channels", "in_chans"): getattr(encoder, name) for name in names}
    return timm.models.VisionTransformer(**sizes, **head)


class OfficialManner(nn.Module):
    """Compute the loss of normalized images (B, C, H, W) and noise (B, L), with the weights of `model`."""

    def __init__(self, model: MaskedAutoencoder):
        super().__init__()
        self.num_kept, self.norm_pix_loss = model.num_kept, model.target.name == "normalized"
        self.encoder = timm_encoder(model.encoder, num_classes=0)
        # timm has no decoder: take the blocks of an encoder of the decoder's size
        sizes = {name: getattr(model.decoder, name) for name in ("embed_dim", "depth", "num_heads")}
        self.decoder = timm.models.VisionTransformer(num_classes=0, **sizes)
        del self.decoder.patch_embed, self.decoder.cls_token
        self.decoder.embed = nn.Linear(model.encoder.embed_dim, model.decoder.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros_like(model.mask_token))
        self.decoder.pos_embed = nn.Parameter(torch.zeros_like(model.decoder.pos_embed), requires_grad=False)
        self.decoder.pred = nn.Linear(model.decoder.embed_dim, model.decoder.pred.out_features)
        self.load_state_dict(model.state_dict())
        self.encoder.pos_embed.requires_grad_(False)
        for block in (*self.encoder.blocks, *self.decoder.blocks):
            block.attn.fused_attn = False

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        encoder, decoder = self.encoder, self.decoder
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        x = take(encoder.patch_embed(images) + encoder.pos_embed[:, 1:], order[:, : self.num_kept])
        cls_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = decoder.embed(encoder.norm(encoder.blocks(torch.cat([cls_token, x], dim=1))))
        masks = self.mask_token.expand(len(x), noise.shape[1] - self.num_kept, -1)
        tokens = take(torch.cat([x[:, 1:], masks.to(x.dtype)], dim=1), restore)
        x = decoder.blocks(torch.cat([x[:, :1], tokens], dim=1) + decoder.pos_embed)
        prediction = decoder.pred(decoder.norm(x))[:, 1:]
        target = patchify(images, encoder.patch_embed.patch_size[0])
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        mask = (restore >= self.num_kept).float()
        return (F.mse_loss(prediction.float(), target, reduction="none").mean(-1) * mask).sum() / mask.sum()
