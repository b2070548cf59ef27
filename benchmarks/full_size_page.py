"""``results.md`` of the full-size run: the finished items, as tables for a reader."""

from collections.abc import Sequence
from typing import Any

from full_size_items import GRID, MAIN_SIGMA, PAPER_CLEAN, PAPER_ROBUST, SIGMAS
from shared import table

PUBLISHED_KNN = {"10": "83.2 (100 epochs)", "200": "84.8 (200 epochs)"}
PUBLISHED_GAUSSIAN = {"0": "80.4", "0.25": "66.8", "0.5": "50.5", "0.75": "32.7"}
BASES = {"noise": "trained under the noise", "linear": "linear head on the clean encoder"}


def page(conditions: dict[str, Any], items: dict[str, dict[str, Any]]) -> str:
    """Return the page of the items so far, as Markdown.

    Args:
        conditions: commit, versions, machine, device and plan.
        items: figures of each finished item, by name.
    """
    done = {name: item for name, item in items.items() if item["status"] == "done"}
    parts = [_head(conditions), _overview(items)]
    writers = {"a": _pretraining, "b": _encoder, "c": _trainings, "d": _scratch, "e": _grid, "f": _ladder, "g": _worst}
    writers |= {"h": _curves, "i": _sandwich, "j": _textbook, "k": _one_radius}
    parts += [writers[name](item) for name, item in done.items() if name in writers]
    return "\n\n".join([*parts, _probe(conditions["plan"])]) + "\n"


def _head(conditions: dict[str, Any]) -> str:
    device, versions = conditions["device"], conditions["versions"]
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    images = conditions["images"]
    return (
        f"# Full-size run: {conditions['network']}\n\n"
        f"{conditions['plan']['conditions']}{driver}; Python {versions['python']}; commit {conditions['commit']}. "
        f"{images['train']:,} training and {images['test']:,} test images. {conditions['minutes']:g} minutes. "
        "Noise of certificates and verdicts: gaussian. "
        "Accuracies in percent, with 95 % intervals over images; nothing was chosen on test images."
    )


def _overview(items: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            f"({name}) {item['title']}",
            item["status"] + (f": {item['reason']}" if "reason" in item else ""),
            f"{item['seconds']:.1f}",
            f"{item['allotted']:.0f}",
            f"{item['images']:,}" if "images" in item else "",
        )
        for name, item in items.items()
    ]
    return table(("item", "status", "seconds", "allotted", "images"), rows)


def _pretraining(item: dict[str, Any]) -> str:
    return (
        f"## (a) SimCLR\n\n{item['epochs']} epochs of {item['images']:,} images, batch {item['batch_size']}: "
        f"{item['views_per_second']:,.0f} views per second, loss {item['loss'][0]:.3f} to {item['loss'][-1]:.3f}, "
        f"{item['passes_per_image']:.1f} passes per image, peak memory {_megabytes(item['peak_memory'])}."
    )


def _encoder(item: dict[str, Any]) -> str:
    rows = [
        (f"{k} nearest neighbours", _percent(correct, item["images"]), PUBLISHED_KNN.get(k, ""))
        for k, correct in item["knn_correct"].items()
    ]
    rows.append(("linear probe", _percent(item["linear_correct"], item["images"]), ""))
    return "## (b) Encoder\n\n" + table(("measure", "accuracy", "published"), rows)


def _trainings(item: dict[str, Any]) -> str:
    rows = [(name, *_training_row(figures)) for name, figures in item["models"].items()]
    return "## (c) Fine-tuning under noise\n\n" + table(("model", *_TRAINING), rows)


def _scratch(item: dict[str, Any]) -> str:
    wanted = (
        f"{item['wanted_passes_per_image']:.1f} passes per image were due, {item['passes_per_image']:.1f} were made."
    )
    rows = [(f"scratch-{MAIN_SIGMA:g}", *_training_row(item))]
    return f"## (d) From scratch\n\n{wanted}\n\n" + table(("model", *_TRAINING), rows)


_TRAINING = ("images", "epochs", "passes per image", "images per second", "seconds", "loss")


def _training_row(figures: dict[str, Any]) -> tuple[str, ...]:
    fewer = f" of {figures['wanted_images']:,}" if figures["images"] < figures["wanted_images"] else ""
    return (
        f"{figures['images']:,}{fewer}",
        str(figures["epochs"]),
        f"{figures['passes_per_image']:.1f}",
        f"{figures['images_per_second']:,.0f}",
        f"{figures['training_seconds']:.1f}",
        f"{figures['loss'][-1]:.3f}",
    )


def _grid(item: dict[str, Any]) -> str:
    header = ("sigma", "base", "clean", "noise-free base, transferred", "one frozen draw", "one fresh draw per step")
    rows: list[tuple[str, ...]] = [("paper", "", f"{PAPER_CLEAN}", *(f"{PAPER_ROBUST}" for _ in GRID[1:]))]
    for sigma in SIGMAS:
        for base, text in BASES.items():
            cells = item["cells"][f"{base}-{sigma:g}"]
            rows.append((f"{sigma:g}", text, *(_accuracy(cells[rung]) for rung in GRID)))
    return f"## (e) Protocol grid\n\n{item['attacker']}; {item['images']} images per cell.\n\n" + table(header, rows)


def _ladder(item: dict[str, Any]) -> str:
    models = item["models"]
    rungs = next(iter(models.values()))
    rows = [(rung["label"], *(_accuracy(models[name][key]) for name in models)) for key, rung in rungs.items()]
    return f"## (f) Ladder\n\n{item['images']} images.\n\n" + table(("attacker", *models), rows)


def _worst(item: dict[str, Any]) -> str:
    rows = [(name, _accuracy(rung), f"{rung['passes_per_image']:,.0f}") for name, rung in item["models"].items()]
    head = f"## (g) Worst case\n\n{item['suite']}, {item['images']} images.\n\n"
    return head + table(("model", "accuracy", "passes per image"), rows)


def _curves(item: dict[str, Any]) -> str:
    radii = list(dict.fromkeys(radius for model in item["models"].values() for radius in model["accuracy"]))
    rows = [("published Gaussian, ResNet-110, N = 100,000", *(PUBLISHED_GAUSSIAN.get(r, "") for r in radii), "", "")]
    rows += [(name, *_curve(model, radii), *_certifying(model)) for name, model in item["models"].items()]
    rule = item["rule"]
    head = f"## (h) Certified accuracy\n\n{item['images']} images, at most {rule['num_estimation']:,} samples, alpha "
    return head + f"{rule['alpha']:g}.\n\n" + table(("model", *radii, "samples per image", "seconds per image"), rows)


def _one_radius(item: dict[str, Any]) -> str:
    ((name, model),) = item["models"].items()
    radii = list(model["accuracy"])
    rows = [(name, *_curve(model, radii), *_certifying(model))]
    head = f"## (k) One radius\n\n{item['images']:,} images.\n\n"
    return head + table(("model", *radii, "samples per image", "seconds per image"), rows)


def _textbook(item: dict[str, Any]) -> str:
    rows = [
        (
            row["id"],
            *(f"class {side[0]}, radius {side[1]:.3f}, {side[2]:.2f} s" for side in (row["textbook"], row["ours"])),
        )
        for row in item["rows"]
    ]
    return f"## (j) Textbook, N = {item['num_estimation']:,}\n\n" + table(("image", "textbook", "ours"), rows)


def _sandwich(item: dict[str, Any]) -> str:
    return (
        f"## (i) Sandwich\n\n{item['images']} certified images attacked inside their balls; {item['checked']} images "
        f"checked, {len(item['violations'])} violations, {item['allowed']} would be allowed."
    )


def _probe(plan: dict[str, Any]) -> str:
    measured = plan["measured"]
    rows = [
        (f"SimCLR step, {name}", f"{entry['views_per_second']:,.0f} views/s", f"{1000 * entry['step_seconds']:.1f} ms")
        for name, entry in measured.get("simclr", {}).items()
    ]
    rows += [
        (
            f"judged forward, tile {name}",
            f"{entry['samples_per_second']:,.0f} samples/s",
            f"{entry['compile_seconds']:.0f} s to compile",
        )
        for name, entry in measured["forward"].items()
    ]
    rows.append(("attack pass", f"{measured['attack']['passes_per_second']:,.0f} passes/s", "16 draws of 16 images"))
    if "engine" in measured:
        engine = measured["engine"]
        share = f"{engine['of_bare_forward']:.2f} of the bare forward"
        rows.append(("certification engine", f"{engine['samples_per_second']:,.0f} samples/s", share))
    rows += [
        (
            f"step of {name}",
            f"{entry['images_per_second']:,.0f} images/s",
            f"{1000 * entry['step_seconds']:.1f} ms at {entry['batch_size']}",
        )
        for name, entry in measured.get("rivals", {}).items()
    ]
    skipped = "".join(f"\n- {name}: {reason}" for name, reason in plan["skipped"].items())
    text = f"## Probe\n\n{plan['seconds']:.0f} s. Chosen: {plan['choices']}.\n\n" + table(("what", "rate", ""), rows)
    return text + (f"\n\nNot measured:\n{skipped}" if skipped else "")


# --- cells ------------------------------------------------------------------------------------------------------------


def _accuracy(rung: dict[str, Any]) -> str:
    low, high = (100 * end for end in rung["interval"])
    undecided = f", {rung['undecided']} undecided" if rung["undecided"] else ""
    return f"{100 * rung['accuracy']:.1f} [{low:.1f}, {high:.1f}]{undecided}"


def _curve(model: dict[str, Any], radii: Sequence[str]) -> list[str]:
    return [
        f"{100 * model['accuracy'][r]:.1f} [{100 * model['interval'][r][0]:.1f}, {100 * model['interval'][r][1]:.1f}]"
        if r in model["accuracy"]
        else ""
        for r in radii
    ]


def _certifying(model: dict[str, Any]) -> tuple[str, str]:
    return f"{model['samples_per_image']:,.0f}", f"{model['seconds_per_image']:.3f}"


def _percent(correct: int, total: int) -> str:
    return f"{100 * correct / total:.1f}"


def _megabytes(value: int | None) -> str:
    return "not known" if value is None else f"{value / 2**20:,.0f} MiB"
