"""A pipeline of processes that sends activations forward and nothing back: each trains consecutive layers by the losses of their blocks.

In: a stage of a model for each process of a torch.distributed group, and batches at the first one. Out: trained stages, and at the last
process the loss of the model.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
