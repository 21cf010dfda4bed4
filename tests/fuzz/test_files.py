"""Random damage to every file that the program reads: each is read, or refused with an error of ours."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.client.testing import write_adapter, write_base
from engine.cluster.fleet.sources import FileSource
from engine.config import load_settings
from engine.errors import LoraplexError
from engine.registry.checks import Limits, check_adapter
from engine.registry.fingerprint import read_base
from engine.registry.manifest import decode_change, decode_manifest
from engine.registry.registry import Registry
from engine.registry.store import Store
from engine.server.identity.example import EXAMPLE
from engine.server.identity.policy import read_policy
from engine.tuning.data import read_rows
from engine.tuning.recipe import load_recipe
from engine.tuning.suite import read_suite
from tests.fuzz.conftest import Dice
from tests.fuzz.messages import spoilt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1e308,
    10**30,
    "",
    "x",
    "..",
    "/etc/passwd",
    "a\x00b",
    [],
    [[]],
    {},
    {"x": {}},
    "9" * 400,
)


def damaged(text: bytes, dice: random.Random, load: Callable[[bytes], Any], dump: Callable[[Any], str]) -> bytes:
    """Half the time other bytes, half the time a document of the same shape with something odd in one place."""
    if dice.random() < 0.5:
        return spoilt(text, dice)
    value = load(text)
    return dump(_changed(value, dice)).encode("utf-8", "surrogatepass")


def _changed(value: Any, dice: random.Random) -> Any:
    """The document with one value replaced, left out, or added."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        if dice.random() < 0.1:
            return {other: each for other, each in value.items() if other != key}
        if dice.random() < 0.1:
            return value | {dice.choice(("x", "", "__class__", key + "x")): dice.choice(ODD)}
        return value | {key: _changed(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        at = dice.randrange(len(value))
        return [*value[:at], _changed(value[at], dice), *value[at + 1 :]]
    return dice.choice(ODD)


async def test_registry_records(tmp_path: Path, dice: Dice) -> None:
    """Manifests and alias changes."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    base = read_base(tmp_path / "base", tmp_path / "fingerprints")
    checked = check_adapter(tmp_path / "adapter", base, LIMITS)
    registry = Registry(Store.open(tmp_path / "registry"))
    await registry.publish(tmp_path / "adapter", checked, name="support")
    manifest = next((tmp_path / "registry").rglob("manifest.json")).read_bytes()
    change = next((tmp_path / "registry").rglob("aliases/*.json")).read_bytes()
    readers = (
        (manifest, lambda data: decode_manifest(data, "support", "v1")),
        (change, lambda data: decode_change(data, "support", 1)),
    )
    for each in dice("registry"):
        text, read = each.choice(readers)
        _read_or_refuse(damaged(text, each, json.loads, json.dumps), read)


def test_adapter_folders(tmp_path: Path, dice: Dice) -> None:
    """Configurations and safetensors files, headers above all."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    base = read_base(tmp_path / "base", tmp_path / "fingerprints")
    config, tensors = (tmp_path / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    was = {config: config.read_bytes(), tensors: tensors.read_bytes()}
    header = int.from_bytes(was[tensors][:8], "little")

    def check(_: bytes) -> None:
        check_adapter(tmp_path / "adapter", base, LIMITS)

    for each in dice("adapters"):
        path = each.choice((config, tensors))
        if path is config:
            data = damaged(was[config], each, json.loads, json.dumps)
        else:
            head = damaged(was[tensors][8 : 8 + header], each, json.loads, json.dumps)
            size = len(head) if each.random() < 0.9 else each.choice((0, 1, 2**31, 2**63, 2**64 - 1))
            data = size.to_bytes(8, "little") + head + was[tensors][8 + header :]
        path.write_bytes(data)
        _read_or_refuse(data, check)
        path.write_bytes(was[path])


def test_settings_recipes_and_rows(tmp_path: Path, dice: Dice) -> None:
    """The files that an operator or a trainer writes."""
    examples = Path(__file__).parents[2] / "examples"
    path = tmp_path / "file"
    settings = {"port": 50051, "max_rank": 16, "host": "127.0.0.1", "tenant_weights": "gold=4", "model": "base"}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    case = {"messages": turns, "max_tokens": 4, "metrics": ["exact", "regex"], "regex": "^b", "json_schema": {}}
    yaml_readers: tuple[tuple[bytes, Callable[[bytes], Any]], ...] = (
        (yaml.safe_dump(settings).encode(), lambda _: load_settings(path)),
        ((examples / "support" / "v1.yaml").read_bytes(), lambda _: load_recipe(path)),
        (EXAMPLE.encode(), lambda _: read_policy(path)),
        (b"replicas: [127.0.0.1:50051, 127.0.0.1:50052]", lambda _: FileSource(path)),
    )
    row_readers = ((case, lambda _: read_suite(path)), ({"messages": turns}, lambda _: read_rows(str(path))))
    for each in dice("files"):
        if each.random() < 0.5:
            text, read = each.choice(yaml_readers)
            data = damaged(text, each, yaml.safe_load, yaml.safe_dump)
        else:
            row, read = each.choice(row_readers)
            data = damaged(json.dumps(row).encode(), each, json.loads, json.dumps)
        path.write_bytes(data)
        _read_or_refuse(data, read)


LIMITS = Limits(max_rank=16, max_bytes=1_000_000)


def _read_or_refuse(data: bytes, read: Callable[[bytes], Any]) -> None:
    try:
        read(data)
    except LoraplexError as error:
        if re.search(r"Traceback|File \"", error.message):
            raise AssertionError(f"{error.message}\nof {data[:2000]!r}") from error
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\nof {data[:2000]!r}") from error
