import json
import os

import pytest

from megatron_elastic.errors import ElasticError
from megatron_elastic.wandb_run import RUN_FILE, join, offline_without_account

FLAGS = {"wandb-project": "project", "wandb-exp-name": "name"}


@pytest.fixture(autouse=True)
def without_variables(monkeypatch):
    for name in ("RUN_ID", "RESUME", "RUN_GROUP", "JOB_TYPE", "MODE", "API_KEY"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that what `join` sets is put back
        monkeypatch.delenv(f"WANDB_{name}")


def test_a_folder_has_one_run(tmp_path, monkeypatch):
    join(FLAGS, tmp_path / "family", "elastic")
    first = os.environ["WANDB_RUN_ID"]
    assert json.loads((tmp_path / "family" / RUN_FILE).read_text())["id"] == first
    names = ("WANDB_RESUME", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE")
    assert [os.environ[name] for name in names] == ["allow", "name", "elastic"]
    for folder, same in (("family", True), ("other", False)):
        monkeypatch.delenv("WANDB_RUN_ID")
        join(FLAGS, tmp_path / folder, "elastic")
        assert (os.environ["WANDB_RUN_ID"] == first) is same


def test_what_the_user_has_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    join(FLAGS, tmp_path, "elastic")
    assert os.environ["WANDB_RUN_ID"] == "mine"
    assert os.environ["WANDB_RUN_GROUP"] == "ours"
    assert json.loads((tmp_path / RUN_FILE).read_text())["id"] == "mine"


def test_without_a_project_nothing_is_written(tmp_path):
    join({}, tmp_path / "family", "elastic")
    assert not (tmp_path / "family").exists()


def test_a_damaged_record_is_told(tmp_path):
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(ElasticError, match=r"wandb_run\.json is damaged .* remove it"):
        join(FLAGS, tmp_path, "elastic")


def test_offline_only_where_there_is_neither_account_nor_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert offline_without_account() == {"WANDB_MODE": "offline"}
    monkeypatch.setenv("WANDB_MODE", "online")
    assert offline_without_account() == {}
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / ".netrc").write_text("")
    assert offline_without_account() == {}
