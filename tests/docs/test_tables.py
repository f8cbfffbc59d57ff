"""Tables of the documentation: options, defaults, drafters and numbers are those of the code and of RESULTS.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import msgspec

from tests.support.documents import DOCS, README, ROOT, named, table, tables

RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()


def test_the_drafters_listed_are_the_built_in_ones_and_those_of_plugins() -> None:
    from specgen.plugins import builtin

    built_in = set(named(table(DOCS["drafters.md"], "drafter", "drafts from", "options", "on by default"), "drafter"))
    assert built_in == set(builtin.drafters())
    plugins = set(named(table(DOCS["drafters.md"], "drafter", "plugin", ""), "drafter"))
    assert set(named(table(README, "drafter", "drafts from", "on by default"), "drafter")) == built_in | plugins
    installed = {point.name for point in entry_points(group="specgen")}
    assert plugins <= installed


def shown(value: Any) -> str:
    """A default as the tables write it."""
    if isinstance(value, Mapping | tuple) and value:
        return ", ".join(f"`{name}`" for name in value)
    if isinstance(value, int) and value >= 1 << 30:
        return f"{value >> 30} GiB"
    return f"`{json.dumps(value) if isinstance(value, str) else value}`"


def test_the_options_listed_are_those_there_are_with_their_defaults() -> None:
    from specgen.config import EngineConfig
    from specgen.lora.adapter import AdapterOptions
    from specgen.sampling.params import SamplingParams
    from specgen.types import Speculation

    places: list[tuple[str, str, type[msgspec.Struct], dict[str, str]]] = [
        ("sampling.md", "field", SamplingParams, {}),
        ("engine.md", "option", EngineConfig, {"speculation": '`"auto"`', "adapters": ""}),
        ("adapters.md", "field", AdapterOptions, {}),
        ("drafters.md", "field of `speculation`", Speculation, {}),
    ]
    for page, column, struct, otherwise in places:
        rows = table(DOCS[page], column, "default", "meaning")
        listed = {row[column].strip("`"): row["default"] for row in rows}
        assert listed == {name: shown(getattr(struct(), name)) for name in struct.__struct_fields__} | otherwise


def test_the_options_of_drafters_listed_are_those_there_are_with_their_defaults_and_ranges() -> None:
    from specgen.draft.drafters.prompt_lookup import LookupOptions
    from specgen.draft.drafters.recycling import RecyclingOptions
    from specgen.draft.drafters.translation import DraftModelOptions

    structs = {
        "grammar": None,
        "prediction": LookupOptions,
        "prompt-lookup": LookupOptions,
        "recycling": RecyclingOptions,
        "draft-model": DraftModelOptions,
    }
    for row in table(DOCS["drafters.md"], "drafter", "drafts from", "options", "on by default"):
        struct = structs[row["drafter"].strip("`")]
        assert row["options"] == (", ".join(f"`{name}`" for name in struct.__struct_fields__) if struct else "none")
    listed = {tuple(row.values())[:3] for row in table(DOCS["drafters.md"], "option", "default", "range", "meaning")}
    fields = {f for struct in structs.values() if struct for f in map(_field, msgspec.structs.fields(struct))}
    assert listed == fields


def _field(field: msgspec.structs.FieldInfo) -> tuple[str, str, str]:
    checked = msgspec.inspect.type_info(field.type)
    if not isinstance(checked, msgspec.inspect.IntType):
        return f"`{field.name}`", "", ""
    bound = f"{checked.ge} to {checked.le}" if checked.le is not None else f"from {checked.ge}"
    return f"`{field.name}`", str(field.default), bound


def test_the_main_options_of_the_readme_are_options() -> None:
    from specgen.config import EngineConfig

    rows = table(README, "engine option", "what it does")
    names = {name for row in rows for name in re.findall(r"`([a-z_]+)[`=]", row["engine option"])}
    assert len(names) > 8
    assert names <= {*EngineConfig.__struct_fields__, "draft_model"}


def test_the_kv_formats_listed_are_those_there_are() -> None:
    from specgen.kv.formats import FORMATS

    assert set(named(table(DOCS["kv.md"], "`kv_format`", "bytes, over bfloat16"), "`kv_format`")) == set(FORMATS)


def test_the_environment_variables_listed_are_those_that_are_read() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "specgen").rglob("*.py"))
    read = set(re.findall(r"SPECGEN_[A-Z_]+", sources))
    listed = set(named(table(DOCS["engine.md"], "variable", ""), "variable"))
    assert listed == {"SPECGEN_SERVER_..."} | {name for name in read if not name.startswith("SPECGEN_SERVER_")}


def test_the_numbers_of_the_readme_are_among_the_results() -> None:
    (mine,) = (rows for rows in tables(README) if "chat" in rows[0])
    (all_of_them,) = (rows for rows in tables(RESULTS) if "32 at once" in rows[0])
    results = {row[""]: row for row in all_of_them}
    assert len(mine) == len(results)
    for row in mine:
        assert row.items() <= results[row[""]].items()


def test_every_result_names_machine_command_and_date() -> None:
    _, *sections = re.split(r"^## ", RESULTS, flags=re.MULTILINE)
    for section in sections:
        assert re.search(r"\b[ABC], 2026-\d\d-\d\d|None has run", section), section.splitlines()[0]
        assert re.search(r"`python -m benchmarks\.|no command was kept|`make ", section), section.splitlines()[0]
