"""Real pictures and really pretrained models, made from public packages: `python -m simulations.real`."""
