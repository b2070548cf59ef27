"""Write the tables of README.md, docs/ and results/ from the committed records.

    make results    # or PYTHONPATH=benchmarks python tools/results.py

A table stands between ``<!-- table: SOURCE PART -->`` and ``<!-- end -->``. SOURCE is a folder or the name of a record
in results/, PART one of ``PARTS``. Equal records give equal bytes. Weights are not needed. Nothing else in a page is
changed.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from rush.certification.certificates import Certificates
from rush.records.ladder import Ladder
from rush.records.public_logs import read_log
from rush.records.read_run import RunResults, read_run
from rush.reporting.compare import Table, compare, comparison_tables, noise_text, training_tables
from rush.reporting.costs import training_cost
from rush.reporting.wording import (
    NORM_SIGNS,
    count_or_dash,
    lower_text,
    model_text,
    passes_text,
    points,
    radius_text,
    share,
    threat_text,
)
from rush.runtime.files import write_text
from rush.statistics import share_interval
from shared import cell_text, table

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/*.md", "results/**/README.md")
WIDTH = 100
NOT_KNOWN = "not recorded"
INTERVALS = {"intervals": "95 %, exact; paired where they are of differences"}
PAIRS = {
    "cifar10-small-trainings": (
        ("gaussian-0", "simclr-0"),
        ("gaussian-1", "simclr-1"),
        ("simclr-0", "noise-view-0"),
        ("noise-view-0", "consistency-0"),
        ("simclr-tenth", "gaussian-tenth"),
        ("simclr-tenth", "noise-view-tenth"),
        ("simclr-hundredth", "gaussian-hundredth"),
        ("simclr-hundredth", "noise-view-hundredth"),
        ("simclr-0", "simclr-tenth"),
    ),
    "cifar10-small-few-labels": (
        ("taught-hundredth-0", "hundredth-0"),
        ("taught-hundredth-1", "hundredth-1"),
        ("taught-tenth-0", "tenth-0"),
        ("taught-tenth-1", "tenth-1"),
        ("long-taught-hundredth-0", "taught-hundredth-0"),
        ("long-taught-hundredth-0", "../cifar10-small-trainings/gaussian-tenth"),
    ),
}
RIVALS = ("cifar10-small-trainings/simclr-1", "cifar10-small-trainings/gaussian-1")
_MARKED = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
run_of, log_of = cache(read_run), cache(read_log)
Columns = dict[str, list[str]]
"""Cells by name of the column, with one cell per run."""


# --- runs -------------------------------------------------------------------------------------------------------------


def certified(folder: Path) -> str:
    """Certified accuracy at every radius of the run's own table."""
    (log,), run = [log_of(folder)], run_of(folder)
    certificates = log.certificates
    rows = [
        (radius_text(radius), share(certificates.accuracy_interval(radius)), lower_text(certificates, radius))
        for radius in certificates.table_radii
    ]
    conditions = {name: cells[0] for name, cells in by_run(comparison_tables(compare([log]))[0]).items()}
    header = (f"{NORM_SIGNS[log.rule.norm]} radius", "certified accuracy", "true accuracy ≥, with 95 % confidence")
    return f"{sentence({**facts(run), **conditions, **INTERVALS})}\n\n{table(header, rows)}"


def ladder(folder: Path) -> str:
    """Every attacker of a run, and the certificate as the floor."""
    run = run_of(folder)
    found, proved = run.ladder, run.threat_certificates
    assert found is not None
    exact = proved is not None and proved.rule.exact
    last = found.last_eot
    rows: list[tuple[str, ...]] = [
        (
            rung.label,
            passes_text(rung.spent("passes_per_image"), rung.spent("forward_passes_per_image")),
            share(rung.accuracy),
            share(rung.accuracy_lower),
            count_or_dash(rung.undecided),
            *(() if last is None else ("–" if rung is last else points(rung.above(last)),)),
        )
        for rung in found.rungs
    ]
    rows.append(("any of these", "", share(found.combined)))
    if proved is not None:
        label, floor = certificate_cells(found, proved)
        rows.append((label, "", floor))
    header = ["attacker", "passes per image", "accuracy", "held", "undecided"]
    header += [] if last is None else [f"minus that of {last.label}"]
    conditions = {
        "threat": threat_text(found),
        "images": f"{len(found.clean):,}",
        "verdicts": "exact, by all draws" if exact else f"alpha = {found.alpha:g}, at most {found.max_votes:,} votes",
    }
    return f"{sentence({**facts(run), **conditions, **INTERVALS})}\n\n{table(header, rows)}"


def brief(folder: Path) -> str:
    """Accuracy under every attacker of a run, and certified at sigma and at the threat, without costs."""
    run = run_of(folder)
    found, proved = run.ladder, run.threat_certificates
    assert found is not None
    assert proved is not None
    sign, radius = NORM_SIGNS[proved.rule.norm], proved.rule.sigma
    rows = [(rung.label, share(rung.accuracy)) for rung in found.rungs]
    rows.append((f"certificate, {sign} {radius:g}", share(proved.accuracy_interval(radius))))
    rows.append(certificate_cells(found, proved))
    conditions = {
        "data": str(run.setting("data", "name")),
        **{name: facts(run)[name] for name in ("network", "sigma, noise")},
        "threat": threat_text(found),
        "images": f"{len(found.clean):,} of the test split",
        "intervals": "95 %, exact",
    }
    return f"{sentence(conditions)}\n\n{table(('attacker', 'accuracy'), rows)}"


def certificate_cells(found: Ladder, proved: Certificates) -> tuple[str, str]:
    """Return what covers the threat, and certified accuracy there."""
    radius = found.covering_radius(proved.rule.norm)
    sign = NORM_SIGNS[proved.rule.norm]
    return f"certificate, {sign} {radius:.3g} covers {threat_text(found)}", share(proved.accuracy_interval(radius))


def compared(folder: Path) -> str:
    """All runs in ``folder`` side by side, those with most labels first."""
    runs = [run_of(file.parent) for file in folder.glob("*/recipe.json")]
    runs.sort(key=lambda run: (-run.stages["finetune"].fields["labelled_images"], run.folder.name))
    folders = [run.folder for run in runs]
    logs = [log_of(path) for path in folders]
    conditions, accuracies, *_ = comparison_tables(compare(logs))
    sign = NORM_SIGNS[logs[0].rule.norm]
    costs = by_run(training_tables(runs)[0])
    columns = {
        "objectives": costs["objectives"],
        "noisy views": [str(run.setting("pretrain", "noise", "views")) for run in runs],
        "labelled images": [f"{run.stages['finetune'].fields['labelled_images']:,}" for run in runs],
        **{f"certified at {sign} {radius}": cells for radius, cells in by_run(accuracies).items()},
        "passes per image": costs["passes per image"],
        "hours": costs["hours"],
        **columns_of([facts(run) for run in runs]),
        **by_run(conditions),
        **columns_of([INTERVALS] * len(runs)),
    }
    return side_by_side([path.name for path in folders], columns)


def pairs(folder: Path) -> str:
    """Paired differences of certified accuracy between the runs of ``PAIRS``."""
    chosen = PAIRS[folder.name]
    names = list(dict.fromkeys(name for pair in chosen for name in pair))
    logs = {name: log_of(folder / name) for name in names}
    found = [compare([logs[first], logs[second]]).pairs[0] for first, second in chosen]
    rows = [
        (f"`{pair.first}` minus `{pair.second}`", f"{pair.images:,}", *(points(row.difference) for row in pair.rows))
        for pair in found
    ]
    radii = [f"at {NORM_SIGNS[logs[names[0]].rule.norm]} {row.radius:g}" for row in found[0].rows]
    all_facts = columns_of([facts(run_of(folder / name)) for name in names])
    common = {name: cells[0] for name, cells in all_facts.items() if len(set(cells)) == 1}
    common["sigma, noise"] = " and ".join(dict.fromkeys(all_facts["sigma, noise"]))
    common["commit"] = ", ".join(dict.fromkeys(part for cell in all_facts["commit"] for part in cell.split(", ")))
    return f"{sentence({**common, **INTERVALS})}\n\n{table(('difference, points', 'images', *radii), rows)}"


def costs(folder: Path) -> str:
    """The training cost of a run beside ``RIVALS``."""
    runs = [run_of(path) for path in (folder, *(folder.parent / name for name in RIVALS))]
    columns = {
        **by_run(training_tables(runs)[0]),
        "passes per second": [passes_per_second(run) for run in runs],
        **columns_of([facts(run) for run in runs]),
    }
    return side_by_side([run.folder.name for run in runs], columns)


def passes_per_second(run: RunResults) -> str:
    cost, images = training_cost(run), run.stages["finetune"].fields["images"]
    assert cost is not None
    assert cost.passes_per_image is not None
    return f"{cost.passes_per_image * images / cost.seconds:,.0f}"


def facts(run: RunResults) -> dict[str, str]:
    """Return the conditions of a run, as far as its records know them."""
    provenance, held_out = run.provenance, run.setting("data", "held_out")
    commits = dict.fromkeys(str(stage.fields.get("commit") or NOT_KNOWN)[:7] for stage in run.stages.values())
    return {
        "network": model_text(run),
        "sigma, noise": noise_text(run),
        "held-out labels for design choices": NOT_KNOWN if held_out is None else f"{held_out:,}",
        "seed": str(provenance["seed"]),
        "commit": ", ".join(commits),
        "processor": f"{provenance['machine']['processor']}, threads: {provenance['threads']}",
        "torch": str(provenance["torch"]),
    }


def by_run(compared_table: Table) -> Columns:
    """Return the rows of a table that has a column per run, by their names."""
    return {name: list(cells) for name, *cells in compared_table[2] if name not in ("sigma", "noise")}


def columns_of(rows: Sequence[Mapping[str, str]]) -> Columns:
    return {name: [row[name] for row in rows] for name in rows[0]}


def side_by_side(names: Sequence[str], columns: Columns) -> str:
    """Return a table with a row per run. What is equal in all of them is said once, above it."""
    common = {name: cells[0] for name, cells in columns.items() if len(set(cells)) == 1}
    varying = {name: cells for name, cells in columns.items() if name not in common}
    rows = zip([f"`{name}`" for name in names], *varying.values(), strict=True)
    return f"{sentence(common)}\n\n{table(('run', *varying), rows)}"


# --- other records ----------------------------------------------------------------------------------------------------


def accuracy(folder: Path) -> str:
    """The network of benchmarks/reference_models.py."""
    found = json.loads((folder / "accuracy.json").read_text())
    rows = [
        (text, share(share_interval(round(found[key] * found["images"]), found["images"])))
        for key, text in (("clean", "clean"), ("pgd20", "PGD-20, step 2/255, one random start, best iterate"))
    ]
    conditions = {"images": f"{found['images']:,}", "noise": "none, not smoothed", **INTERVALS}
    return f"{sentence(conditions)}\n\n{table(('attack', 'accuracy'), rows)}"


def section(folder: Path, name: str) -> str:
    """A section of the page of a full-size run, after the conditions of that run."""
    head, *sections = (folder / "results.md").read_text().split("\n## ")
    conditions, overview = head.split("\n\n", 2)[1:]
    bodies = {"items": overview}
    for text in sections:
        title, body = text.split("\n\n", 1)
        bodies[title.split()[0].strip("()").lower()] = body
    # Pages from before that sentence: the noise was always Gaussian.
    noise = "" if "Noise" in conditions else " Noise of certificates and verdicts: gaussian."
    return "\n\n".join(map(wrapped, [conditions + noise, *bodies[name].strip().split("\n\n")]))


def record(file: Path) -> str:
    """The record that a benchmark wrote with --record."""
    found: dict[str, Any] = json.loads(file.with_name(f"{file.name}.json").read_text())
    names = list(dict.fromkeys(name for row in found["rows"] for name in row))
    rows = [[cell_text(row.get(name)) for name in names] for row in found["rows"]]
    machine = {
        "command": f"`{found['command']}`",
        "date": found["date"],
        "commit": found["commit"],
        "processor": f"{found['processor']}, threads: {found['threads']}",
        "torch": found["versions"]["torch"],
    }
    conditions = {name: cell_text(value) for name, value in found["conditions"].items()}
    return f"{sentence({**conditions, **machine})}\n\n{table(names, rows)}"


# --- pages ------------------------------------------------------------------------------------------------------------


def sentence(conditions: Mapping[str, str]) -> str:
    """Return the known conditions as a paragraph."""
    text = "; ".join(f"{name}: {value}" for name, value in conditions.items() if value != "–")
    return wrapped(text[0].upper() + text[1:] + ".")


def wrapped(text: str) -> str:
    """Return a paragraph in lines of the pages' width, or a table as it is."""
    if text.startswith("|"):
        return text
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


PARTS: dict[str, Callable[[Path], str]] = {
    "certified": certified,
    "ladder": ladder,
    "brief": brief,
    "compared": compared,
    "pairs": pairs,
    "costs": costs,
    "accuracy": accuracy,
    "record": record,
    **{name: partial(section, name=name) for name in ("items", *"abcdefghijk", "probe")},
}


def filled(page: str, results: Path) -> str:
    """Return ``page`` with its tables made from the records in the folder ``results``.

    Raises: SystemExit if a marker is not closed or names no table.
    """
    if page.count("<!-- table: ") != len(_MARKED.findall(page)):
        raise SystemExit("a marker must be `<!-- table: SOURCE PART -->`, followed by `<!-- end -->`")

    def made(match: re.Match[str]) -> str:
        opening, source, part = match.groups()
        if part not in PARTS:
            raise SystemExit(f"there is no table {source} {part}; PART must be one of {', '.join(PARTS)}")
        return f"{opening}\n{PARTS[part](results / source)}\n\n"

    return _MARKED.sub(made, page)


def pages(root: Path) -> Iterable[Path]:
    return sorted(path for pattern in PAGES for path in root.glob(pattern))


def main() -> None:
    for path in pages(ROOT):
        before = path.read_text(encoding="utf-8")
        after = filled(before, ROOT / "results")
        if after != before:
            write_text(path, after)
            print(f"{path.relative_to(ROOT)} changed")


if __name__ == "__main__":
    main()
