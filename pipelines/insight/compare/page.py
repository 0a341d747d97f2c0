"""Renders a comparison as one self-contained HTML page."""

import zlib
from base64 import b64encode

import msgspec

from pipelines.insight.compare.data import Comparison
from pipelines.insight.report.page import DOM, PLOT, STYLES, UPLOT, environment, read_asset, script_hash

HIDDEN = ("ci95", "unscored", "prompts", "samples")
"""Suffixes of metrics that are not drawn."""


def render_comparison(found: Comparison) -> str:
    """The page as HTML."""
    drawn = {name: series for name, series in found.metrics.items() if not name.endswith(HIDDEN)}
    scripts = [read_asset(name) for name in (UPLOT, DOM, PLOT, "compare/assets/compare.js")]
    template = environment().get_template("compare/assets/compare.html.j2")
    return template.render(
        found=found,
        data=b64encode(zlib.compress(msgspec.json.encode(drawn), 6)).decode(),
        scripts=scripts,
        styles=[read_asset(name) for name in (*STYLES, "compare/assets/compare.css")],
        hashes=" ".join(f"'sha256-{script_hash(script)}'" for script in scripts),
    )
