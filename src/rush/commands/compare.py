"""``rush compare``: certificates of runs and public logs side by side."""

from __future__ import annotations

from pathlib import Path

from rush.commands.terminal import Json, print_json, print_lines, print_table


def compare(
    runs_or_logs: list[Path],
    *,
    sigma: list[float] | None = None,
    radii: list[float] | None = None,
    class_radius: float | None = None,
    assume_same_images: bool = False,
    html: Path | None = None,
    json: Json = False,
) -> None:
    """Compare the certificates of runs and public certification logs side by side.

    Args:
        runs_or_logs: Run folders, certificates.tsv files, or logs (columns idx, label, predict, radius, correct, time).
        sigma: Noise levels of the logs, in their order, for logs whose names do not contain them.
        radii: Radii at which to compare; multiples of 0.25 by default.
        class_radius: Radius of the figures per class.
            By default half the smallest sigma, or the next radius in the grids of the logs.
        assume_same_images: Test pairs even if nothing but index and label shows that the images are the same.
        html: Write the same tables, with curves, to this .html file, a page that works offline.
    """
    from rush.reporting.compare import all_tables, read_comparison
    from rush.reporting.comparison_page import check_name, write_comparison
    from rush.reporting.values import comparison_value

    if html is not None:
        check_name(html)
    runs, comparison = read_comparison(runs_or_logs, sigma, radii, class_radius, assume_same_images)
    if html is not None:
        write_comparison(html, runs, comparison)
    if json:
        print_json(comparison_value(comparison, runs))
        return
    for title, header, rows in all_tables(runs, comparison):
        print_table(header, rows, title)
    if html is not None:
        print_lines([f"comparison: {html}"])
