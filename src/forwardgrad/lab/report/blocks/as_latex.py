"""A report's tables as LaTeX with booktabs, to be put into a paper by \\input."""

from __future__ import annotations

import re

from forwardgrad.lab.report.blocks.tables import Cell, Table

SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "\n": " ", "\r": " ", "\t": " ",
    "–": "--", "—": "---", "…": r"\ldots{}", "·": r"\(\cdot\)", "×": r"\(\times\)", "±": r"\(\pm\)", "−": r"\(-\)", "≤": r"\(\le\)",
    "≥": r"\(\ge\)", "→": r"\(\to\)", "‖": r"\(\|\)", "∇": r"\(\nabla\)", "√": r"\(\surd\)", "∞": r"\(\infty\)", "ĝ": r"\(\hat g\)",
    "α": r"\(\alpha\)", "β": r"\(\beta\)", "γ": r"\(\gamma\)", "η": r"\(\eta\)", "θ": r"\(\theta\)", "μ": r"\(\mu\)", "µ": r"\(\mu\)",
    "σ": r"\(\sigma\)", "ε": r"\(\varepsilon\)", "Δ": r"\(\Delta\)", "₀": r"\(_0\)", "₁": r"\(_1\)", "₂": r"\(_2\)", "²": r"\(^2\)",
    "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip
HEAD = "% needs \\usepackage{booktabs} and \\usepackage{textcomp}\n"
WIDE = 40  # letters of a cell above which its column breaks lines


def latex(table: Table) -> str:
    """The table as a tabular, its groups set apart by a title; what columns mean stands in comments below."""
    columns = len(table.columns)
    lines = [HEAD + f"% {_comment(table.caption)}", rf"\begin{{tabular}}{{@{{}}{_layout(table)}@{{}}}}", r"\toprule"]
    lines += [" & ".join(map(escape, table.columns)) + r" \\", r"\midrule"]
    for place, (title, rows) in enumerate(table.groups):
        lines += [r"\addlinespace"] if place else []
        lines.append(rf"\multicolumn{{{columns}}}{{@{{}}l}}{{\textit{{{escape(title)}}}}} \\")
        lines += [" & ".join(map(_cell, row)) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {_comment(column)}: {_comment(words)}" for column, words in table.meaning)]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    r"""Text that LaTeX prints as it stands.

    >>> print(escape("β₁ 0.9 · 50 % of a_b"))
    \(\beta\)\(_1\) 0.9 \(\cdot\) 50 \% of a\_b
    """
    return "".join(SIGNS.get(sign, sign) for sign in text)


def _comment(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _layout(table: Table) -> str:
    """Left-aligned columns, those with long texts as wide as may be given to each of them."""
    rows = [row for _, rows in table.groups for row in rows]
    long = [any(len(_words(row[i])) > WIDE for row in rows) for i in range(len(table.columns))]
    return "".join(rf"p{{{0.6 / sum(long):.2f}\linewidth}}" if wide else "l" for wide in long)


def _words(cell: Cell) -> str:
    return f"{cell.text} ({cell.sub})" if cell.sub else cell.text


def _cell(cell: Cell) -> str:
    return rf"\texttt{{{escape(cell.text)}}}" if cell.tone == "code" else escape(_words(cell))
