"""Recipes and overrides: what is right loads, what is wrong is named with the nearest right
word.
"""

from pathlib import Path

import pytest
import yaml

from deepspec.config.benchmarks import find_benchmark
from deepspec.config.recipes import load_run, merge, parse_override, recipe_names, to_yaml
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError


def test_every_recipe_validates():
    for name in recipe_names():
        assert load_run(name).draft.algorithm == name.split("-")[0]


def test_demo_alone_means_dspark_on_the_demo_target():
    assert load_run("demo") == load_run("dspark-demo")


def test_a_shown_config_loads_again_as_the_same_run(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(load_run("demo")))
    assert load_run(str(path)) == load_run("demo")


def test_a_run_file_starts_from_its_recipe(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: dflash-demo\ntrain: {lr: 0.5}\n")
    run = load_run(str(path), ["train.seed=7"], store="elsewhere")
    assert (run.draft.algorithm, run.train.lr, run.train.seed, run.store) == (
        "dflash",
        0.5,
        7,
        "elsewhere",
    )


def test_a_run_is_named_in_commands_as_it_was_typed(tmp_path: Path):
    """Errors said `python -m deepspec answers NAME`, with the run's name, which is no recipe
    where the run is a file.
    """
    path = tmp_path / "my run.yaml"
    path.write_text("recipe: demo\nname: mine\n")
    assert (
        load_run(str(path), ["train.seed=7"], store="s").typed
        == f"'{path}' --set train.seed=7 --store s"
    )
    assert (
        load_run("demo").typed == "demo"
        and RunConfig.model_validate(load_run("demo").model_dump()).typed == "RUN"
    )


def test_merge_goes_mapping_by_mapping_and_null_replaces():
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": None}}) == {
        "a": {"b": 1, "c": None},
        "d": 3,
    }


def test_a_source_of_another_kind_replaces_the_whole_of_it():
    run = load_run("dspark-qwen3-4b", ["prompts.source={kind: files, paths: [p.jsonl]}"])
    assert run.prompts.source.model_dump(exclude_unset=True) == {
        "kind": "files",
        "paths": ("p.jsonl",),
    }


def test_another_kind_of_head_keeps_its_rank():
    run = load_run("demo", ["draft.markov={kind: gated}"])
    assert (run.draft.markov.kind, run.draft.markov.rank) == ("gated", 32)


@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_recipes_of_released_targets_carry_the_published_settings(algorithm: str):
    run = load_run(f"{algorithm}-qwen3-14b")
    assert (run.target.layer_ids, run.target.mask_token_id, run.draft.block_size) == (
        (1, 10, 19, 28, 37),
        151669,
        7,
    )
    assert (run.train.lr, run.train.global_batch, run.train.epochs, run.hidden.max_length) == (
        6e-4,
        512,
        10,
        4096,
    )
    assert (
        run.answers.sampling.temperature,
        run.answers.sampling.top_p,
        run.answers.sampling.top_k,
    ) == (0.7, 0.8, 20)
    known = [find_benchmark(benchmark.name) for benchmark in run.evaluate.benchmarks]
    assert [benchmark and benchmark.num_prompts for benchmark in known] == [
        500,
        500,
        30,
        164,
        256,
        500,
        80,
        500,
        500,
    ]
    assert all(benchmark.limit is None for benchmark in run.evaluate.benchmarks)


def test_an_override_reads_its_value_as_yaml():
    assert parse_override("target.layer_ids=[1, 2]") == {"target": {"layer_ids": [1, 2]}}


@pytest.mark.parametrize(
    ("source", "overrides", "said"),
    [
        ("demmo", [], ["'demmo'", "did you mean 'demo'"]),
        ("no-such.yaml", [], ["cannot be read"]),
        ("demo", ["train.lrr=1"], ["train.lrr", "did you mean 'lr'", "warmup"]),
        (
            "demo",
            ["train.epochs=10", "train.window_epochs=4"],
            ["no multiple of train.window_epochs 4: choose 8 or 12 epochs"],
        ),
        ("demo", ["train.lr=fast"], ["train.lr", "'fast'"]),
        ("demo", ["draft.markov.kind=gatd"], ["draft.markov.kind", "'gated'"]),
        ("demo", ["draft.layout=anchor"], ["draft.layout", "'anchor_is_context'", "'anchor'"]),
        ("eagle3-demo", ["draft.layout=anchor_is_context"], ["draft.layout: there is no such"]),
        ("demo", ["target.layer_ids=[3, 1]"], ["layer_ids must be ascending"]),
        ("demo", ["train.lr"], ["not of the form"]),
        ("demo", ["train.lr=[1"], ["not valid YAML"]),
        ("demo", ["prompts.source={kind: file}"], ["prompts.source", "'files'"]),
        ("dflash-demo", ["draft.markov={rank: 4}"], ["dflash has no heads"]),
        ("demo", ["target.model=Qwen/Qwen3-4B"], ["belong together"]),
        ("demo", ["hidden.last_hidden=none"], ["serves only"]),
        (
            "eagle3-demo",
            ["draft.num_anchors=4"],
            [
                "draft.num_anchors",
                "allowed here: algorithm, block_size, num_layers, step_loss_decay",
            ],
        ),
        ("demo", ["draft.markov.rnk=4"], ["did you mean 'rank'", "allowed here: kind, rank"]),
        ("demo", ["evaluate.benchmarks=[{nam: x}]"], ["did you mean 'name'"]),
        ("demo", ["train.lr=-1", "loss.cee=2"], ["train.lr", "loss.cee"]),
    ],
)
def test_bad_input_is_named_with_what_is_allowed(
    source: str, overrides: list[str], said: list[str]
):
    with pytest.raises(ConfigError) as caught:
        load_run(source, overrides)
    for words in said:
        assert words in str(caught.value)


def test_every_field_has_a_description():
    from deepspec.config.run import RunConfig

    schema = RunConfig.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    bare = [
        f"{section['title']}.{name}"
        for section in sections
        for name, entry in section.get("properties", {}).items()
        if "description" not in entry and "$ref" not in entry and "default" not in entry
    ]
    structural = {"RunConfig.prompts", "RunConfig.draft", "RunConfig.evaluate", "RunConfig.target"}
    assert set(bare) <= structural


def test_the_recipe_files_are_plain_yaml_rows():
    folder = Path(__file__).parents[2] / "deepspec" / "recipes"
    assert all(
        isinstance(yaml.safe_load(path.read_text()), dict) for path in folder.rglob("*.yaml")
    )


@pytest.mark.parametrize(
    ("recipe", "weights"), [("dspark-demo", (0, 0, 0)), ("dflash-demo", (0, 0, 1))]
)
def test_a_loss_without_terms_is_refused(recipe: str, weights: tuple[int, int, int]):
    """The weight of a confidence head that the draft does not have teaches nothing either."""
    zeros = [
        f"loss.{name}={weight}"
        for name, weight in zip(("ce", "tv", "confidence"), weights, strict=True)
    ]
    with pytest.raises(ConfigError, match="nothing to learn from"):
        load_run(recipe, zeros)
