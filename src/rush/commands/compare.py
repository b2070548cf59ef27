"""``rush compare``: certificates of runs and public logs side by side."""

from __future__ import annotations

from pathlib import Path

from rush.commands.terminal import Json, print_json, print_table


def compare(
    runs_or_logs: list[Path],
    *,
    sigma: list[float] | None = None,
    radii: list[float] | None = None,
    class_radius: float | None = None,
    assume_same_images: bool = False,
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
    """
    from rush.reporting.compare import compare_command, read_comparison
    from rush.reporting.values import comparison_value

    if json:
        runs, comparison = read_comparison(runs_or_logs, sigma, radii, class_radius, assume_same_images)
        print_json(comparison_value(comparison, runs))
        return
    for title, header, rows in compare_command(runs_or_logs, sigma, radii, class_radius, assume_same_images):
        print_table(header, rows, title)
