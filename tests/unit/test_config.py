"""Settings: which layer wins, and what is said about values that can't be."""

from __future__ import annotations

from pathlib import Path

import pytest

from ndif_actor.config import ConfigError, read_settings


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('model = "from-file"\nport = 1\ntp = 2\n')
    environment = {"NDIF_ACTOR_PORT": "2", "NDIF_ACTOR_TP": "3"}

    settings = read_settings({"tp": 4, "host": None}, environment, file)

    config = settings.config
    assert (config.model, config.port, config.tp, config.host) == ("from-file", 2, 4, "127.0.0.1")
    assert settings.origins["model"] == "file"
    assert settings.origins["port"] == "environment"
    assert settings.origins["tp"] == "flag"
    assert settings.origins["host"] == "default"


def test_a_value_of_the_wrong_type_is_named_with_its_origin() -> None:
    with pytest.raises(ConfigError, match=r"port = 'http' \(environment\): Expected `int`"):
        read_settings({"model": "demo"}, {"NDIF_ACTOR_PORT": "http"})


def test_a_value_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tp = 0 \(flag\): Expected `int` >= 1"):
        read_settings({"model": "demo", "tp": 0}, {})


def test_an_unknown_name_in_the_file_suggests_the_right_one(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("max_pass_token = 5\n")

    with pytest.raises(ConfigError, match=r"max_pass_token \(file\); did you mean max_pass_tokens"):
        read_settings({"model": "demo"}, {}, file)


def test_an_unknown_environment_variable_is_reported_and_not_fatal() -> None:
    settings = read_settings({"model": "demo"}, {"NDIF_ACTOR_PROT": "1"})

    assert len(settings.warnings) == 1
    assert "did you mean NDIF_ACTOR_PORT?" in settings.warnings[0]


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match="missing required field `model`"):
        read_settings({}, {})


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("port = = 1")

    with pytest.raises(ConfigError, match=r"server\.toml is not valid TOML"):
        read_settings({"model": "demo"}, {}, file)
    with pytest.raises(ConfigError, match="No such file"):
        read_settings({"model": "demo"}, {}, tmp_path / "absent.toml")


def test_users_share_no_prefixes_unless_the_operator_says_so() -> None:
    assert not read_settings({"model": "demo"}, {}).config.share_prefixes

    shared = read_settings({"model": "demo"}, {"NDIF_ACTOR_SHARE_PREFIXES": "true"})

    assert shared.config.share_prefixes


def test_a_cache_of_no_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache_bytes = 0"):
        read_settings({"model": "demo", "cache_bytes": 0}, {})
