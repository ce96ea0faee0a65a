"""Fine-tunes a transformers model without a backward pass: a folder and a table of texts in, a folder that `from_pretrained` reads out.

In: what was asked for (`FineTuning`), which names the folder and the files. Out: an output folder with the model, the log and the result.
It says what memory a run takes before it begins, and refuses what the machine does not have. A killed run goes on to the same bits.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
