"""slimdiff: pretrained Stable Diffusion UNets made smaller and faster after training, without gradients."""

__version__ = "0.1.0"
