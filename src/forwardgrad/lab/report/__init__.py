"""The report, made from what is stored: a page, the same in Markdown, figures and tables for a paper.

In: a store. Out: report.html, report.md, figures and tables beside it. Loads without torch.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
