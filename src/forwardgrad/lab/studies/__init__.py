"""What is to be trained: runs, lengths, search spaces and studies as plain data.

In: a Python file, or text of the command line. Out: frozen descriptions that go to JSON and back. Loads without torch.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
