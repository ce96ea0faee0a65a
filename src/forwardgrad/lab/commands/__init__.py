"""The commands, a file for each kind; `cli` puts them together.

In: the words of a command line. Out: calls of the other rooms, sentences on the terminal, and an exit status.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
