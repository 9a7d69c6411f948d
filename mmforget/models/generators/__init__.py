"""Generator networks of GANs, one file each, and what they share."""

from __future__ import annotations

from mmforget._lazy import lazy_attributes

_EXPORTS = {
    "mmforget.models.generators.base": ("StyleBased",),
    "mmforget.models.generators.biggan_deep": ("BigGANDeep",),
    "mmforget.models.generators.checkpoints": ("export_like", "read_checkpoint"),
    "mmforget.models.generators.dcgan": ("DCGAN",),
    "mmforget.models.generators.discriminator": ("ProjectionDiscriminator",),
    "mmforget.models.generators.stylegan2": ("StyleGAN2",),
    "mmforget.models.generators.stylegan3": ("StyleGAN3",),
}

NETWORKS = {
    "dcgan": "mmforget.models.generators.dcgan.DCGAN",
    "stylegan2": "mmforget.models.generators.stylegan2.StyleGAN2",
    "stylegan3": "mmforget.models.generators.stylegan3.StyleGAN3",
    "biggan_deep": "mmforget.models.generators.biggan_deep.BigGANDeep",
}
"""Short name of a network: import path of its class."""

__getattr__, __dir__, __all__ = lazy_attributes(__name__, _EXPORTS)
