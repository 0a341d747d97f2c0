"""Reports of runs: `gather` collects the data, from which a page, Markdown or JSON is rendered."""
