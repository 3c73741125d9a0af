"""A UNet's forward and its interpolations written out, with the changes that Deep Shrink and RAU-Net describe."""

import math

import torch

A = -0.75  # of the cubic kernel


def cubic(d):
    d = abs(d)
    if d <= 1:
        return (A + 2) * d**3 - (A + 3) * d**2 + 1
    return A * d**3 - 5 * A * d**2 + 8 * A * d - 4 * A if d < 2 else 0.0


def bicubic_along(x, length, axis):
    """The middles of the cells stay where they are; beyond the border lies its own cell."""
    total = x.shape[axis]
    parts = []
    for i in range(length):
        place = (i + 0.5) * total / length - 0.5
        first = math.floor(place) - 1
        part = 0
        for tap in range(first, first + 4):
            part = part + cubic(place - tap) * x.select(axis, min(max(tap, 0), total - 1))
        parts.append(part)
    return torch.stack(parts, axis)


def bicubic(x, size):
    return bicubic_along(bicubic_along(x, size[0], 2), size[1], 3)


def nearest(x, size):
    x = torch.stack([x[:, :, int(i * x.shape[2] / size[0])] for i in range(size[0])], 2)
    return torch.stack([x[:, :, :, int(i * x.shape[3] / size[1])] for i in range(size[1])], 3)


def means(x):
    rows, columns = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
    x = torch.stack([x[:, :, 2 * r : 2 * r + 2].mean(2) for r in range(rows)], 2)
    return torch.stack([x[:, :, :, 2 * c : 2 * c + 2].mean(3) for c in range(columns)], 3)


def convolved(x, convolution, stride, spread):
    """3x3, `stride` cells from one place to the next, the taps `spread` cells apart, zeros beyond the border."""
    (height, width), weight = x.shape[2:], convolution.weight
    padded = torch.nn.functional.pad(x, (spread,) * 4)
    y = convolution.bias[:, None, None]
    for ky in range(3):
        for kx in range(3):
            part = padded[:, :, ky * spread : ky * spread + height : stride, kx * spread : kx * spread + width : stride]
            y = y + torch.einsum("oi,bihw->bohw", weight[:, :, ky, kx], part)
    return y


def embedded(network, x, timestep, added):
    emb = network.time_embedding(network.time_proj(timestep.expand(len(x))).to(x))
    if added:
        ids = network.add_time_proj(added["time_ids"].flatten()).reshape(len(x), -1)
        emb = emb + network.add_embedding(torch.cat([added["text_embeds"], ids.to(x)], -1))
    return emb


def mixed(block, j, h, emb, text):
    h = block.resnets[j](h, emb)
    attentions = getattr(block, "attentions", None)
    return attentions[j](h, encoder_hidden_states=text).sample if attentions else h


def down(network, h, emb, text, shrink=None, sampled=None, pooled=None):
    """The lower half: shrink = (block, factor, after_skip); sampled, pooled = the level of RAU-Net's changes."""
    skips, number = [h], 0

    def store(h):
        nonlocal number
        number += 1
        smaller = h
        if shrink and shrink[0] == number:
            smaller = bicubic(h, [max(round(side / shrink[1]), 1) for side in h.shape[2:]])
        skips.append(h if shrink and shrink[2] else smaller)
        return smaller

    for level, block in enumerate(network.down_blocks):
        for j in range(len(block.resnets)):
            h = mixed(block, j, h, emb, text)
            h = store(means(h) if pooled == level and j == 0 else h)
        if block.downsamplers:
            step = (4, 2) if sampled == level else (2, 1)
            h = store(convolved(h, block.downsamplers[0].conv, *step))
    h = network.mid_block.resnets[0](h, emb)
    h = network.mid_block.attentions[0](h, encoder_hidden_states=text).sample
    return skips, network.mid_block.resnets[1](h, emb)


def unet_by_hand(unet, x, timestep, text, added=None, residuals=None, **changes):
    """The prediction; residuals are a ControlNet's."""
    emb = embedded(unet, x, torch.tensor(timestep), added)
    skips, h = down(unet, unet.conv_in(x), emb, text, **changes)
    if residuals:
        skips = [skip + residual for skip, residual in zip(skips, residuals[0], strict=True)]
        h = h + residuals[1]
    levels = len(unet.up_blocks)
    for number, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            skip = skips.pop()
            if h.shape != skip.shape:
                h = bicubic(h, skip.shape[2:])
            h = mixed(block, j, torch.cat([h, skip], 1), emb, text)
        if block.upsamplers:
            size = list(skips[-1].shape[2:])
            if changes.get("sampled") == levels - 2 - number:
                h = bicubic(nearest(h, [-(-side // 2) for side in size]), size)
            else:
                h = nearest(h, size)
            h = convolved(h, block.upsamplers[0].conv, 1, 1)
    return unet.conv_out(torch.nn.functional.silu(unet.conv_norm_out(h)))


def controlnet_by_hand(controlnet, x, timestep, text, hint, **changes):
    emb = embedded(controlnet, x, torch.tensor(timestep), None)
    h = controlnet.conv_in(x) + controlnet.controlnet_cond_embedding(hint)
    skips, h = down(controlnet, h, emb, text, **changes)
    return [out(skip) for out, skip in zip(controlnet.controlnet_down_blocks, skips, strict=True)], (
        controlnet.controlnet_mid_block(h)
    )
