"""Draws a plan's timeline as a self-contained SVG."""

from html import escape

from pipelines.insight.plan import PlannedStage, PlanView, lanes_of

WIDTH, MARGIN, LANE, GAP = 960, 150, 26, 4
COLOURS = {"generation": "#4878a8", "scoring": "#6aa56a", "training": "#c8743c", "light": "#999999"}
"""Colours of the bars by workload."""
TICKS = 6


def picture(view: PlanView) -> str:
    """The SVG: a lane for each device, or for devices with the same stages, and a bar for each stage."""
    lanes = lanes_of(view)
    height = len(lanes) * (LANE + GAP) + 60
    scale = (WIDTH - MARGIN - 10) / view.total if view.total else 0.0
    step, unit = (3600.0, "h") if view.total > 2 * 3600 else (60.0, "min") if view.total > 120 else (1.0, "s")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number in range(TICKS + 1):
        at = view.total * number / TICKS
        x = MARGIN + at * scale
        parts.append(f'<line x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="{height - 36}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x:.1f}" y="14" text-anchor="middle" fill="#555555">{at / step:.3g} {unit}</text>')
    for row, (label, stages) in enumerate(lanes.items()):
        y = 24 + row * (LANE + GAP)
        parts.append(f'<text x="{MARGIN - 8}" y="{y + 17}" text-anchor="end">{escape(label)}</text>')
        parts += [_bar(stage, y, scale) for stage in stages]
    for number, (kind, colour) in enumerate(COLOURS.items()):
        x = MARGIN + 130 * number
        parts.append(f'<rect x="{x}" y="{height - 24}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{height - 14}">{kind}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _bar(stage: PlannedStage, y: int, scale: float) -> str:
    x, width = MARGIN + stage.start * scale, max(1.0, (stage.end - stage.start) * scale)
    label = stage.role.rpartition("/")[2] if stage.iteration is None else f"{stage.iteration} {stage.role}"
    shown = label[: int(width / 6.5)] if width > 20 else ""
    took = f"{stage.stage}: {stage.end - stage.start:.4g} s"
    return (
        f'<g><title>{escape(took)}</title><rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE}" '
        f'fill="{COLOURS[stage.workload]}" stroke="white"/>'
        f'<text x="{x + 4:.1f}" y="{y + 17}" fill="white">{escape(shown)}</text></g>'
    )
