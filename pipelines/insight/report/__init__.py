"""The report of a run: gathered once as data (`gather`), then written as a page, as Markdown or as JSON."""
