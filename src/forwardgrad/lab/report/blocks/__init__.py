"""What a report is made of, paragraphs, tables, figures and claims, and how these are written as HTML, Markdown and LaTeX.

In: stored results. Out: text. Loads without torch.
"""

from forwardgrad._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
