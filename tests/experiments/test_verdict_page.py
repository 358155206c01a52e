"""docs/verdict.md: its tables are those of the committed runs, and every number says how sure it is."""

import importlib
from pathlib import Path

import pytest

from smoot_hf.experiments.campaign_queue import read_campaign, settings_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write_verdict(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    return importlib.import_module("write_verdict")


def test_the_tables_of_the_page_are_those_of_the_committed_runs(write_verdict):
    """Catches a table that was edited by hand, and runs that came after it."""
    page = write_verdict.PAGE.read_text(encoding="utf-8")
    runs = {name: write_verdict.load(name) for name in write_verdict.SETS}
    for name, table in write_verdict.tables(runs).items():
        assert write_verdict.with_table(page, name, table) == page, name
    with pytest.raises(ValueError, match="must have one place for the table 'other', it has 0"):
        write_verdict.with_table(page, "other", "")


def test_the_committed_runs_are_those_of_the_campaign_files(write_verdict):
    """Catches results of settings that the campaign file no longer has, under a name that it does have."""
    for name in write_verdict.SETS:
        plans = {(plan.name, plan.seed): plan for plan in read_campaign(write_verdict.CAMPAIGNS / f"{name}.toml")}
        for setting, by_seed in write_verdict.load(name).items():
            for seed, result in by_seed.items():
                asked = settings_of(plans[setting, seed])
                assert {part: result["settings"][part] for part in asked} == asked, (name, setting, seed)


def test_a_difference_is_bold_beyond_the_correction_alone(write_verdict):
    """Catches marks that take no account of how many differences were looked at."""
    found = write_verdict.paired({0: 3.0, 1: 5.0, 2: 4.0, 3: 4.0}, dict.fromkeys(range(4), 0.0))
    # t = 4 / (0.8165 / 2) = 9.80, p = 0.00226, and 0.05 / p = 22.1.
    assert write_verdict.text(found, 1) == "**+4.0** (+2.7 to +5.3)"
    assert write_verdict.text(found, 22).startswith("**")
    assert write_verdict.text(found, 23) == "+4.0 (+2.7 to +5.3)"
    assert write_verdict.text(write_verdict.paired({0: 3.0}, {0: 1.0}), 1) == "+2.0"


def test_every_fork_is_one_of_the_campaign(write_verdict):
    """Catches a question whose answer is silently missing from the page."""
    names = {plan.name for plan in read_campaign(write_verdict.CAMPAIGNS / "forks.toml")}
    asked = {name for fork in write_verdict.FORKS for name in (fork.setting, fork.against)}
    tables = (write_verdict.CENTRAL, write_verdict.OUTSIDE, write_verdict.LONG, write_verdict.KNOWN_GOOD)
    listed = {*write_verdict.ADVERSARIAL, *(name for table in tables for name in table)}
    assert names == asked | listed
