"""Recipes: what is refused and how it is told, what an override may be, and what the shipped ones say of themselves."""

import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import rush
from rush.choices import parse_fraction
from rush.errors import ConfigError
from rush.recipe.load import build_recipe, load_recipe, recipe_headline, recipe_names, recipe_text
from rush.recipe.schema import CertifyConfig, PretrainConfig, Recipe
from tiny import TINY, tiny, write_tiny


def values() -> dict[str, Any]:
    return tomllib.loads(TINY)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("pretrain.epoch=3", r"pretrain\.epoch: unknown key, did you mean 'epochs'\?; allowed: adversary, batch_size,"),
        ("sede=3", r"sede: unknown key, did you mean 'seed'\?; allowed: attack, audit, certify, data,"),
        ("pretrain.views.jiter=0.1", r"pretrain\.views\.jiter: unknown key, did you mean 'jitter'\?"),
        ("certify.zzz=1", r"certify\.zzz: unknown key; allowed: alpha, bound, futility, images, level, method, num_"),
        ("certify.alpha=0.5", r"certify\.alpha: .*less than 0\.5 \(given: 0\.5\)"),
        ("certify.alpha=0", r"certify\.alpha: .*greater than 0"),
        ("certify.num_estimation=0", r"certify\.num_estimation: .*\(given: 0\)"),
        ("certify.num_estimation=9", r"certify: num_estimation must be at least 10 to certify .* alpha = 0\.001"),
        ("certify.method=wald", r"certify\.method: .*'clopper-pearson', 'sequential' or 'exact' \(given: 'wald'\)"),
        ("certify.level=run", r"certify\.level: .*'image' or 'family' \(given: 'run'\)"),
        ("certify.futility=0.5", r"certify\.futility: .*less than 0\.5 \(given: 0\.5\)"),
        ("certify.futility=0", r"certify\.futility: .*greater than 0"),
        ("certify.radii=0.25", r"certify\.radii"),
        ("certify.radii=[0.25, -0.5]", r"certify\.radii\.1: .*\(given: -0\.5\)"),
        ("certify.radii=[inf]", r"certify\.radii\.0"),
        ("certify.images=0", r"certify\.images"),
        ("smoothing.sigma=0", r"recipe: smoothing\.sigma = 0 .* finetune\.objective = gaussian trains under it; set"),
        ("smoothing.sigma=-0.25", r"smoothing\.sigma: .*greater than or equal to 0"),
        ("smoothing.sigma=inf", r"smoothing\.sigma"),
        ("smoothing.sigma=nan", r"smoothing\.sigma"),
        ("pretrain.learning_rate=inf", r"pretrain\.learning_rate"),
        ("pretrain.temperature=0", r"pretrain\.temperature"),
        ("pretrain.epochs=-1", r"pretrain\.epochs"),
        ("pretrain.epochs=ten", r"pretrain\.epochs: .*\(given: 'ten'\)"),
        ("pretrain.epochs=2.5", r"pretrain\.epochs: .*\(given: 2\.5\)"),
        ("pretrain.batch_size=1", r"pretrain\.batch_size"),
        ("pretrain.views.flip=1.5", r"pretrain\.views\.flip"),
        ("pretrain.views.hue=0.6", r"pretrain\.views\.hue"),
        ("pretrain.views.crop_scale=[0.5, 1.5]", r"pretrain\.views"),
        ("pretrain.views.crop_scale=[0.9, 0.5]", r"pretrain\.views"),
        ("pretrain.views.blur_sigma=[2.0, 1.0]", r"pretrain\.views"),
        ("pretrain.views.blur=true", r"pretrain\.views\.blur: must be a number \(given: True\)"),
        ("pretrain.views.crop_scale=0.5", r"pretrain\.views\.crop_scale"),
        ("pretrain.optimizer=adam", r"pretrain\.optimizer: .*'sgd', 'lars' or 'adamw' \(given: 'adam'\)"),
        ("model.encoder=resnet101", r"model\.encoder: .*'resnet18'"),
        ("model.width=0", r"model\.width"),
        ("execution.precision=float16", r"execution\.precision"),
        ("execution.tile=0", r"execution\.tile: must be \"auto\" or a whole number from 1 to 65536 \(given: 0\)"),
        ("execution.tile=true", r"execution\.tile: must be \"auto\" .* \(given: True\)"),
        ("execution.tile=large", r"execution\.tile: must be \"auto\" .* \(given: 'large'\)"),
        ("execution.compile=max", r"execution\.compile: .*'auto', 'none', 'default' or .* \(given: 'max'\)"),
        ("finetune.epochs=0", r"finetune\.epochs"),
        ("finetune.label_fraction=0", r"finetune\.label_fraction"),
        ("attack.epsilon=8", r"attack: epsilon = 8 exceeds the pixel range \[0, 1\]; did you mean 8/255\?"),
        ("attack.epsilon=8/0", r"attack\.epsilon: '8/0' is not a number or a fraction such as 8/255"),
        ("attack.epsilon=8/", r"attack\.epsilon: '8/' is not a number"),
        ("attack.epsilon=-8/255", r"attack\.epsilon: must be > 0, got -8/255"),
        ("attack.epsilon=true", r"attack\.epsilon"),
        ("attack.step_size=0", r"attack\.step_size: must be > 0"),
        ("attack.norm=l3", r"attack\.norm: .*'linf', 'l2' or 'l1' \(given: 'l3'\)"),
        ("attack.eot_samples=[4, 1]", r"attack: eot_samples must be ascending and distinct, got \[4, 1\]"),
        ("attack.eot_samples=[1, 1]", r"ascending and distinct"),
        ("attack.eot_samples=[]", r"eot_samples"),
        ("attack.eot_samples=[0]", r"attack\.eot_samples\.0"),
        ("attack.max_votes=99", r"attack\.max_votes"),
        ("name=../up", r"name: .*\(given: '\.\./up'\)"),
        ("seed=-1", r"seed: .*\(given: -1\)"),
        ("data=digits", r"data: .*\(given: 'digits'\)"),
    ],
)
def test_a_value_that_is_not_allowed_is_told_with_its_place_and_what_was_given(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        build_recipe(values(), [override])
    assert "pydantic" not in str(caught.value)


def test_every_wrong_value_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"model\.width: .*; smoothing\.sigma: .*; pretrain\.epoch: "):
        build_recipe(values(), ["pretrain.epoch=3", "smoothing.sigma=-1", "model.width=0"])


def test_a_missing_field_is_named() -> None:
    given = values()
    del given["smoothing"], given["model"]["encoder"]
    with pytest.raises(ConfigError, match=r"model\.encoder: Field required; smoothing: Field required"):
        build_recipe(given)


def test_two_ways_to_choose_labels_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="give label_fraction or labels_per_class, not both"):
        build_recipe(values(), ["finetune.label_fraction=0.5", "finetune.labels_per_class=3"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain.epochs=7", 7),
        ("pretrain.learning_rate=2e-3", 0.002),
        ("pretrain.epochs = 7", 7),
        ("pretrain.views.crop_scale=[0.3, 0.9]", (0.3, 0.9)),
        ("attack.eot_samples=[1, 8]", (1, 8)),
        ("finetune.mode=linear", "linear"),
        ('finetune.mode="linear"', "linear"),
        ("attack.epsilon=16/255", "16/255"),
        ("attack.epsilon=0.125", "0.125"),
        ("data.name=some/folder=with.signs", "some/folder=with.signs"),
        ("certify.images=5", 5),
        ("certify.method=sequential", "sequential"),
        ("certify.radii=[0.25, 0.5]", (0.25, 0.5)),
        ("execution.compile=reduce-overhead", "reduce-overhead"),
        ("seed=9", 9),
    ],
)
def test_an_override_sets_its_field_and_no_other(override: str, expected: object) -> None:
    path = override.split("=")[0].strip().split(".")
    changed, plain = build_recipe(values(), [override]), build_recipe(values())
    found: Any = changed
    for part in path:
        found = getattr(found, part)
    assert found == expected
    given, usual = changed.model_dump(), plain.model_dump()
    for tree in (given, usual):
        section = tree
        for part in path[:-1]:
            section = section[part]
        del section[path[-1]]
    assert given == usual


def test_the_last_of_several_overrides_wins() -> None:
    assert build_recipe(values(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("pretrain.epochs", "must read section.field=value, e.g. pretrain.epochs=10"),
        ("=3", "must read section.field=value"),
        ("pretrain..epochs=3", "must read section.field=value"),
        ("seed.value=3", "seed is a single value, it has no fields"),
        ("pretrain.epochs.first=3", "epochs is a single value, it has no fields"),
    ],
)
def test_an_override_that_names_no_field_is_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        build_recipe({**values(), "seed": 0}, [override])


def test_data_folders_become_absolute_and_only_several_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = build_recipe(values(), data=["a", "b"])
    stored = json.loads(recipe.to_json())
    assert stored["data"]["root"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert build_recipe(stored) == recipe == Recipe.model_validate_json(recipe.to_json())
    assert build_recipe(values(), ['data.root=["a", "b"]']).data.root == ("a", "b")
    assert json.loads(build_recipe(values(), data="a").to_json())["data"]["root"] == str(tmp_path / "a")


@pytest.mark.parametrize("root", [[], 5, ["a", 5], {"a": "b"}])
def test_a_data_folder_of_another_type_is_refused(root: object) -> None:
    given = values()
    given["data"] = {**given["data"], "root": root}
    with pytest.raises(ConfigError, match=r"data\.root: must be a folder, or a list of at least one folder"):
        build_recipe(given)


def test_a_data_section_that_is_none_is_told_even_with_a_data_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data: "):
        build_recipe({**values(), "data": "digits"}, data=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "number"), [("8/255", 8 / 255), ("0.5", 0.5), (0.5, 0.5), ("1e-2", 0.01), (" 16/255 ", 16 / 255)]
)
def test_fractions_are_the_numbers_they_say(text: str | float, number: float) -> None:
    assert parse_fraction(text) == number


@pytest.mark.parametrize("text", ["8/0", "", "x", "8/255/2", "nan", "inf"])
def test_text_that_is_no_fraction_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number or a fraction such as 8/255"):
        parse_fraction(text)


def test_a_recipe_that_is_no_toml_is_told_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine\n')
    with pytest.raises(ConfigError, match=r"mine\.toml is not valid TOML: .*line 1"):
        load_recipe(str(tmp_path / "mine.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfename")
    with pytest.raises(ConfigError, match=r"binary\.toml"):
        load_recipe(str(tmp_path / "binary.toml"))


def test_an_unknown_recipe_is_told_with_the_closest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'digit', did you mean 'digits'\?; shipped: .*or give the path"):
        load_recipe("digit")
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="no recipe"):
            load_recipe(str(path))


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.pretrain.epochs = 100  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.pretrain.views.flip = 0.1  # type: ignore[misc]


def test_the_json_of_a_recipe_is_the_recipe_with_every_default_written_out(tmp_path: Path) -> None:
    recipe = load_recipe(str(write_tiny(tmp_path)), ["attack.epsilon=0.1", "certify.images=7"])
    written = json.loads(recipe.to_json())
    assert build_recipe(written) == recipe
    assert written["certify"] == {
        "images": 7,
        "method": "clopper-pearson",
        "num_selection": 100,
        "num_estimation": 200,
        "alpha": 0.001,
        "radii": None,
        "level": "image",
        "futility": 0.01,
        "stopping": "power",
        "bound": None,
    }
    assert written["execution"]["compile"] == "auto"
    assert written["pretrain"]["views"]["blur_sigma"] == [0.1, 2.0]


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_valid_and_opens_with_what_to_expect_of_it(name: str) -> None:
    assert load_recipe(name).name == name
    lines = recipe_text(name).splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    told = "\n".join(head).lower()
    assert recipe_headline(name) == head[0]
    assert len(head[0]) > 20
    for word in ("source:", "literature:", "command:"):
        assert word in told, f"{name}.toml does not say its {word.removesuffix(':')}"
    assert "measured:" in told or "not run" in told
    assert f"rush run {name}" in told


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_writes_down_no_number_that_cannot_run(name: str) -> None:
    """Every field in the file survives the round trip: nothing is silently clipped or renamed."""
    resolved = json.loads(load_recipe(name).to_json())

    def check(given: dict[str, Any], found: dict[str, Any], where: str) -> None:
        for key, value in given.items():
            if isinstance(value, dict):
                check(value, found[key], f"{where}{key}.")
            else:
                assert found[key] == value, f"{where}{key}"

    written = tomllib.loads(recipe_text(name))
    written.pop("base", None)
    check(written, resolved, "")


def test_a_recipe_gives_what_it_changes_in_its_base(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    text = 'base = "tiny.toml"\nname = "mine"\n[pretrain]\nepochs = 7\n[pretrain.views]\nflip = 0.25\n'
    text += "[audit]\nimages = 3\n"
    (tmp_path / "mine.toml").write_text(text)
    base, mine = tiny(tmp_path), load_recipe(str(tmp_path / "mine.toml"), ["pretrain.batch_size=64"])
    views = base.pretrain.views.model_copy(update={"flip": 0.25})
    pretrain = base.pretrain.model_copy(update={"epochs": 7, "batch_size": 64, "views": views})
    audit = base.audit.model_copy(update={"images": 3})
    assert mine == base.model_copy(update={"name": "mine", "pretrain": pretrain, "audit": audit})
    assert "base" not in mine.to_json()


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ('"a.toml"', "base must name another recipe"),
        ("3", r"base must name another recipe \(given: 3\)"),
        ('"digit"', "no recipe 'digit', did you mean 'digits'"),
    ],
)
def test_a_base_that_is_no_other_recipe_is_refused(base: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('base = "b.toml"\nname = "a"\n')
    (tmp_path / "b.toml").write_text(f'base = {base}\nname = "b"\n')
    with pytest.raises(ConfigError, match=told):
        load_recipe(str(tmp_path / "a.toml"))


def test_the_temperature_is_by_default_that_of_the_objective() -> None:
    """0.2 is that of MoCo's source; a recipe that gives one keeps it, and so do runs, whose recipes are resolved."""
    moco = "pretrain.objective=moco", "pretrain.queue=512"
    assert build_recipe(values()).pretrain.temperature == 0.5
    recipe = build_recipe(values(), moco)
    assert recipe.pretrain.temperature == 0.2
    assert build_recipe(values(), [*moco, "pretrain.temperature=0.5"]).pretrain.temperature == 0.5
    assert build_recipe(json.loads(recipe.to_json()), ["pretrain.objective=acl"]).pretrain.temperature == 0.2
    config = PretrainConfig(epochs=1, batch_size=256, learning_rate=0.1)
    assert (config.temperature, config.replace(objective="moco").temperature) == (0.5, 0.2)
    with pytest.raises(ConfigError, match=r"^recipe: pretrain\.objective: Input should be [^;]*\(given: 'mcoo'\)$"):
        build_recipe(values(), ["pretrain.objective=mcoo"])


def test_a_certification_has_the_defaults_of_a_recipe() -> None:
    """As they are documented, and in either of the two ways to ask for one."""
    signature = inspect.signature(rush.certify).parameters
    defaults = {name: parameter.default for name, parameter in signature.items()}
    assert (defaults["num_selection"], defaults["num_estimation"], defaults["alpha"]) == (100, 100_000, 0.001)
    assert CertifyConfig().model_dump(exclude={"images", "method"}).items() <= defaults.items()
    assert defaults["method"] is None  # that of a recipe, but for splitting noise


def test_a_section_that_is_built_in_code_is_refused_like_one_of_a_recipe() -> None:
    config = PretrainConfig(epochs=1, batch_size=256, learning_rate=0.1)
    for build in (
        lambda: config.replace(views={"flip": 2.0}),
        lambda: PretrainConfig(epochs=1, batch_size=256, learning_rate=0.1, views={"flip": 2.0}),
    ):
        with pytest.raises(ConfigError, match=r"^PretrainConfig: views\.flip: .* or equal to 1 \(given: 2\.0\)$"):
            build()
    with pytest.raises(ConfigError, match=r"^PretrainConfig: learning_rate: Field required$"):
        PretrainConfig(epochs=1, batch_size=256)  # type: ignore[call-arg]
