"""Data-free federated distillation of different Vision Transformers.

The library is usable with no federation at all: `smi_fed.models` builds a model,
`smi_fed.inversion` turns it into synthetic images, `smi_fed.distillation` teaches a
student with them. `smi_fed.strategies` plugs the same three into Flower.
"""

__version__ = "0.1.0"
