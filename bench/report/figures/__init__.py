"""Figures, one file a question: TITLE, CAPTION, `draw(analysis, wide) -> Figure | None`, `alt(analysis)`."""
