"""The policy file: what is in it holds, and what is wrong in it is refused as a whole and never repeated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import BadConfiguration
from engine.server.identity.example import EXAMPLE
from engine.server.identity.policy import parse_policy, read_policy
from engine.server.identity.principal import Role
from tests.unit.cli.calls import call


def test_example() -> None:
    """What `policy init` writes is valid and explains every key that there is."""
    policy = parse_policy(EXAMPLE.encode())
    assert policy.tenants["operations"].roles == {Role.ADMIN}
    keys: set[str] = set()

    def collect(schema: Any) -> None:
        for name, one in schema.get("properties", {}).items():
            keys.add(name)
            collect(one)
        for one in schema.get("$defs", {}).values():
            collect(one)

    collect(type(policy).model_json_schema())
    assert not [key for key in keys if f"{key}:" not in EXAMPLE]
    uncommented = re.sub(
        r"(?m)^( *)# (?= *(?:- )?\w+:)", r"\1", EXAMPLE.replace("    keys: []\n    # keys:", "    # keys:")
    )
    uncommented = uncommented.replace("9f86d0818...", "9a" * 32)
    full = parse_policy(uncommented.encode())
    assert full.tenants["acme"].cache_group == "acme"
    assert full.issuers[0].tenants == {"acme-production": "acme"}
    assert full.keys["k3v9xq0m2a7c"][0] == "acme"


SECRET = "lpx_aaaaaaaaaaaa_Sup3rS3cret"
BROKEN = {
    "no YAML": "tenants: [",
    "not a mapping": "- a",
    "nothing": "",
    "no version": "tenants: {}",
    "a later version": "version: 2\ntenants: {}",
    "an unknown key": "version: 1\ntenants: {a: {role: [admin]}}",
    "an unknown role": "version: 1\ntenants: {a: {roles: [root]}}",
    "a bad tenant name": 'version: 1\ntenants: {"a b": {}}',
    "a bad pattern": 'version: 1\ntenants: {a: {adapters: ["../*"]}}',
    "a pattern with a version": 'version: 1\ntenants: {a: {adapters: ["a@v1"]}}',
    "a key in the place of its digest": f"version: 1\ntenants: {{a: {{keys: [{{id: abcdefgh, sha256: {SECRET}}}]}}}}",
    "a key in the place of its id": f"version: 1\ntenants: {{a: {{keys: [{SECRET}]}}}}",
    "a key id twice": "version: 1\ntenants:\n"
    + "".join(f"  {name}: {{keys: [{{id: abcdefgh, sha256: {'0' * 64}}}]}}\n" for name in "ab"),
    "a tenant twice": "version: 1\ntenants: {a: {roles: [admin]}, a: {}}",
    "limits twice": "version: 1\ntenants:\n  a:\n    limits: {concurrent: 1}\n    limits: {}",
    "no limit at all": "version: 1\ntenants: {a: {limits: {requests_per_s: 0}}}",
    "a limit that is no number": "version: 1\ntenants: {a: {limits: {requests_per_s: .nan}}}",
    "aliases": "version: 1\nx: &a [b]\ntenants: {a: {adapters: *a}}",
    "a bomb": "a: &a [x]\nb: &b [*a,*a]\nversion: 1\ntenants: {}",
    "a Python object": "version: 1\ntenants: !!python/object/apply:os.system ['true']",
    "a weak algorithm": "version: 1\ntenants: {}\nissuers: [{issuer: i, audience: a, jwks: k.json, algorithms: [HS256]}]",
    "algorithm none": "version: 1\ntenants: {}\nissuers: [{issuer: i, audience: a, jwks: k.json, algorithms: [none]}]",
    "keys over plain HTTP": "version: 1\ntenants: {}\nissuers: [{issuer: i, audience: a, jwks: 'http://login.test/k'}]",
    "a tenant that is not there": "version: 1\ntenants: {}\n"
    "issuers: [{issuer: i, audience: a, jwks: k.json, tenants: {x: nobody}}]",
    "too deep": "version: 1\ntenants: " + "[" * 1500,
    "too large": "version: 1\ntenants: {}\n#" + "x" * (4 * 1024 * 1024),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_policy(name: str) -> None:
    """Each of these makes the file invalid, with a sentence that does not repeat a secret."""
    with pytest.raises(BadConfiguration) as caught:
        parse_policy(BROKEN[name].encode())
    assert "policy" in caught.value.message
    assert "Sup3r" not in str(caught.value)
    assert caught.value.fix


WORDS = st.sampled_from(["version", "tenants", "keys", "roles", "limits", "issuers", "open", "acme"])
CONTENT = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=20,
)


@given(CONTENT)
@settings(max_examples=100, deadline=None)
def test_any_content(content: Any) -> None:
    """Whatever is in the file, it is a policy or refused as none."""
    try:
        parse_policy(yaml.safe_dump(content).encode())
    except BadConfiguration:
        return


TAGS = (
    "bool",
    "int",
    "float",
    "timestamp",
    "binary",
    "set",
    "omap",
    "pairs",
    "map",
    "seq",
    "null",
    "str",
    "merge",
    "value",
)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("value", ["maybe", "''", "[a]", "{a: b}", "0x", "2026-99-99", "[[a]]", "."])
def test_any_tag(tag: str, value: str) -> None:
    """A value that is not of the type that it claims is refused like anything else."""
    for text in (f"version: !!{tag} {value}", f"!!{tag} {value}: 1", f"version: 1\ntenants: !!{tag} {value}"):
        with pytest.raises(BadConfiguration):
            parse_policy(text.encode())


@given(st.binary(max_size=100))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data: bytes) -> None:
    """Also bytes that are no text."""
    try:
        parse_policy(data)
    except BadConfiguration:
        return


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is named, but not where it would be."""
    with pytest.raises(BadConfiguration) as caught:
        read_policy(tmp_path / "policy.yaml")
    assert str(tmp_path) not in caught.value.message


def test_commands(tmp_path: Path) -> None:
    """`keys create`, `policy init` and `policy check` work together, and a broken file fails the check."""
    made = json.loads(call("keys", "create", "--note", "for acme", "--expires", "90", "--json").out)
    file = tmp_path / "policy.yaml"
    assert call("policy", "init", str(file)).code == 0
    assert call("policy", "init", str(file)).code == 1  # it is there
    content = yaml.safe_load(file.read_text())
    content["tenants"]["acme"]["keys"] = [made["policy"]]
    file.write_text(yaml.safe_dump(content))
    found = json.loads(call("policy", "check", str(file), "--json").out)
    assert {one["name"]: one["keys"] for one in found["tenants"]}["acme"] == [made["policy"]["id"]]
    assert "acme" in call("policy", "check", str(file)).out
    file.write_text(file.read_text().replace("requests_per_s", "requests_per_sec"))
    said = call("policy", "check", str(file))
    assert said.code == 1
    assert "tenants.acme.limits.requests_per_sec" in said.err
