"""Keys, rates and what a server refuses to be."""

import pytest

from smalti.errors import UserError
from smalti.serving.access import RateLimits, digest, find_key, is_loopback, parse_keys, read_keys
from smalti.serving.server_settings import ServerSettings

KEYS = "sk-right-0123456789abcdef studio 2.5  # the studio's\n\n# none\nsk-other-0123456789abcdef other\n"


def test_keys_are_read_from_lines():
    keys = parse_keys(KEYS, "keys")
    assert [(key.tenant, key.weight) for key in keys] == [("studio", 2.5), ("other", 1.0)]
    assert find_key("sk-other-0123456789abcdef", keys) is keys[1]
    for wrong in ("", "sk-other-0123456789abcde", "sk-other-0123456789abcdef ", "SK-OTHER-0123456789ABCDEF", "\udcff"):
        assert find_key(wrong, keys) is None


def test_a_key_shows_nothing_of_itself():
    (key, _) = parse_keys(KEYS, "keys")
    assert "right" not in repr(key)
    assert digest("sk-right-0123456789abcdef").hex() not in repr(key)
    assert "digest" not in repr(ServerSettings(keys=(key,)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sk-right-0123456789abcdef", "1 words"),
        ("sk-right-0123456789abcdef a 1 2", "4 words"),
        ("sk-short a", "8 characters"),
        ("sk-right-0123456789abcdef a 0", "weight=0"),
        ("sk-right-0123456789abcdef a nan", "weight=nan"),
        ("sk-right-0123456789abcdef a heavy", "weight=heavy"),
        ("sk-right-0123456789abcdef a\nsk-right-0123456789abcdef b", "line 2: the key is there twice"),
    ],
)
def test_wrong_lines(line, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_keys(line, "keys file k")
    assert "keys file k, line" in str(caught.value)
    assert "sk-" not in str(caught.value)


def test_a_file_or_else_the_variable(tmp_path):
    path = tmp_path / "keys"
    path.write_text(KEYS)
    variable = {"SMALTI_API_KEYS": "sk-third-0123456789abcdef third; sk-right-0123456789abcdef studio"}
    assert [key.tenant for key in read_keys(path, variable)] == ["studio", "other"]
    assert [key.tenant for key in read_keys(None, variable)] == ["third", "studio"]
    assert read_keys(None, {}) == ()
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "none", {})
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no key"):
        read_keys(path, {})


def test_a_server_without_keys_is_for_this_machine():
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"):
        assert is_loopback(host)
        ServerSettings(host=host)
    for host in ("0.0.0.0", "::", "192.168.1.2", "studio.example", ""):
        with pytest.raises(UserError, match="keys file"):
            ServerSettings(host=host)
        assert ServerSettings(host=host, allow_open=True).hosts == ()
        ServerSettings(host=host, keys=parse_keys(KEYS, "keys"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"max_n": 0},
        {"max_n": 11},
        {"rate_limit": "often"},
        {"body_limit": 0},
        {"file_bytes": 3},
        {"deadline_seconds": 0},
        {"stream_stall_seconds": float("nan")},
    ],
)
def test_settings_that_make_no_sense(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=name):
        ServerSettings(**wrong)


def test_rates_are_a_keys_own():
    import asyncio

    async def waits():
        limits = RateLimits("2/minute")
        a, b = parse_keys(KEYS, "keys")
        return [await limits.seconds_to_wait(key) for key in (a, a, b, a, b, b)]

    first, second, third, over, fifth, also_over = asyncio.run(waits())
    assert (first, second, third, fifth) == (0, 0, 0, 0)
    assert 0 < over <= 60
    assert 0 < also_over <= 60
