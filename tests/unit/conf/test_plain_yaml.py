"""The files of sites and servers: a text that YAML 1.1 would read as a number, a date or a boolean stays a text."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from client.site_file import read_site_file
from conf.plain_yaml import problems_of, read_yaml
from protocol.errors import ConfigError


class Sample(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    share: float = 0.0


@pytest.mark.parametrize(
    "text",
    ["no", "on", "Yes", "off", "2024_11_30", "1_000", "0x10", "010", "0o7", "18:00", "2024-11-30", "12e4567", ".", "é"],
)
def test_a_text_stays_a_text(text: str) -> None:
    assert read_yaml(f"key: {text}") == {"key": text}
    assert read_yaml(f"key: [{text}, x]") == {"key": [text, "x"]}


@pytest.mark.parametrize("text", ["3", "-3", "0", "1.5", ".5", "1.", "1.5e+3", "true", "False", "null", "~", "", "'1'"])
def test_plain_numbers_and_words_are_what_they_were(text: str) -> None:
    assert read_yaml(f"key: {text}") == yaml.safe_load(f"key: {text}")


def test_aliases_and_merges_work() -> None:
    text = "a: &x {b: 1}\nc: {<<: *x, d: 2}"
    assert read_yaml(text) == yaml.safe_load(text)


def test_no_object_is_made() -> None:
    with pytest.raises(yaml.YAMLError):
        read_yaml("key: !!python/object/apply:os.getcwd []")


def test_a_number_for_a_text_is_shown_with_the_fix_and_no_text_is() -> None:
    with pytest.raises(ValidationError) as caught:
        Sample.model_validate(read_yaml("name: 5\nshare: secret"))
    number, text = problems_of(caught.value)
    assert number.startswith("name: ")
    assert number.endswith("; 5 needs quotes to be one")
    assert text.startswith("share: ")
    assert "secret" not in text


def test_a_site_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("name: 2024\nbudget: {unit: no}\n")
    with pytest.raises(ConfigError, match=r"name: .*; 2024 needs quotes to be one"):
        read_site_file(path)
