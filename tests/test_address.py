"""URLs of a Redis: what they mean, and what they never show."""
from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurea_orchestrator.address import Address, read_address
from aurea_orchestrator.errors import ConfigError

LOCAL = (("localhost", 6379),)


@pytest.mark.parametrize("url, kind, hosts, db, path, tls", [
    ("redis://localhost:6379/0", "redis", LOCAL, 0, "0", False),
    ("redis://", "redis", LOCAL, 0, "", False),
    ("redis://h", "redis", (("h", 6379),), 0, "", False),
    ("redis://h:1/", "redis", (("h", 1),), 0, "", False),
    ("redis://h:1/15", "redis", (("h", 1),), 15, "15", False),
    ("redis://h:1?db=3", "redis", (("h", 1),), 3, "", False),
    ("redis://[::1]:6380/2", "redis", (("::1", 6380),), 2, "2", False),
    ("redis://[fe80::1]", "redis", (("fe80::1", 6379),), 0, "", False),
    ("rediss://h:1/0?ssl_cert_reqs=none", "redis", (("h", 1),), 0, "0", True),
    ("unix:///run/my%20redis.sock", "unix", (), 0, "/run/my redis.sock", False),
    ("unix://me:pw@/run/r.sock?db=4", "unix", (), 4, "/run/r.sock", False),
    ("redis+sentinel://a:1,b:2/main", "sentinel", (("a", 1), ("b", 2)), 0, "main", False),
    ("redis+sentinel://a,b/main?db=7", "sentinel", (("a", 26379), ("b", 26379)), 7, "main", False),
    ("redis+sentinel://[::1]:5,b:2/main", "sentinel", (("::1", 5), ("b", 2)), 0, "main", False),
    ("rediss+sentinel://a/main", "sentinel", (("a", 26379),), 0, "main", True),
    ("redis+cluster://a:1,[::2]:2", "cluster", (("a", 1), ("::2", 2)), 0, "", False),
    ("redis+cluster://a/", "cluster", (("a", 6379),), 0, "", False),
])
def test_every_form(url: str, kind: str, hosts: tuple[tuple[str, int], ...], db: int, path: str, tls: bool) -> None:
    at = read_address(url)
    assert (at.kind, at.hosts, at.db, at.path, at.tls) == (kind, hosts, db, path, tls)


@pytest.mark.parametrize("url, says", [
    ("", "begins with"),
    ("localhost:6379", "begins with"),
    ("http://h", "begins with"),
    ("redis:/h", "begins with"),
    ("redis+ring://h", "begins with"),
    ("unix+cluster:///a", "begins with"),
    ("redis+unix:///a", "begins with"),
    ("redisx://h", "begins with"),
    ("redis://:s3cret@h:port/0", "a port is"),
    ("redis://:s3cret@h:0", "a port is"),
    ("redis://:s3cret@h:65536", "a port is"),
    ("redis://:s3cret@h:", "a port is"),
    ("redis://:s3cret@h/none", "a database is"),
    ("redis://:s3cret@h/-1", "a database is"),
    ("redis://:s3cret@h?db=x", "a database is"),
    ("redis://:s3cret@h/1/2", "a database is"),
    ("redis://:s3cret@::1:6379", "IPv6"),
    ("redis://:s3cret@[::1", "IPv6"),
    ("redis://:s3cret@[::1]6379", "IPv6"),
    ("redis://:s3/cret@h:1/0", "percent-encode"),
    ("redis://:s3#cret@h:1/0", "percent-encode"),
    ("redis://:s3?cret=1@h:1/0", "percent-encode"),
    ("redis://:s3?cret=1%40h:1/0", "a port is"),
    ("redis://:33?cret%40h:1/0", "percent-encode"),
    ("redis://:33?cret=1%40h:1/0", "percent-encode"),
    ("redis://:s3cret@h:1/0#x", "percent-encode"),
    ("redis://:s3cret@a:1,b:2/0", "several hosts"),
    ("redis://:s3cret@h?socket_timeout=1", "no option socket_timeout"),
    ("redis://h?ssl_cert_reqs=none", "no option"),
    ("redis+sentinel://:s3cret@a:1", "the name"),
    ("redis+sentinel://:s3cret@a:1/x/y", "the name"),
    ("redis+cluster://:s3cret@a:1/1", "database 0"),
    ("redis+cluster://:s3cret@a:1?db=2", "database 0"),
    ("redis+cluster://:s3cret@a:1/x", "database 0"),
    ("unix://run/redis.sock", "absolute"),
    ("unix://", "absolute"),
    ("rediss://:s3cret@h?ssl_cert_reqs=maybe", "ssl_cert_reqs"),
])
def test_a_bad_url_is_refused_with_the_reason_and_a_right_one_and_without_its_password(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught: read_address(url)
    assert says in str(caught.value)
    assert "redis" in str(caught.value) and "://" in str(caught.value)
    assert "s3" not in str(caught.value) and "cret" not in str(caught.value)


@given(st.text(min_size=1), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8))
def test_any_password_survives_percent_encoding_and_is_shown_nowhere(password: str, user: str) -> None:
    try: password.encode()
    except UnicodeEncodeError: return
    secret = f"<{password}>"
    hidden = quote(secret, safe="")
    at = read_address(f"redis+sentinel://{quote(user, safe='')}:{hidden}@h:1/main?sentinel_password={hidden}")
    assert (at.user, at.password, at.options["sentinel_password"]) == (user or None, secret, secret)
    for shown in (at.shown, repr(at)): assert secret not in shown and hidden not in shown


@given(st.text())
def test_no_url_at_all_makes_anything_but_an_address_or_a_config_error(url: str) -> None:
    for scheme in ("", "redis://", "unix://", "redis+sentinel://", "redis+cluster://"):
        try: assert isinstance(read_address(scheme + url), Address)
        except ConfigError: pass


def test_only_a_password_is_enough_and_an_empty_one_is_none() -> None:
    assert read_address("redis://:pw@h").user is None and read_address("redis://:pw@h").password == "pw"
    assert read_address("redis://me@h").password is None and read_address("redis://me@h").user == "me"
    assert read_address("redis://:@h").password is None


@pytest.mark.parametrize("url", ["redis://:s3\u2105cret@host/", "sqlite://:s3\u2105cret@host/"])
def test_a_store_url_that_cannot_be_read_is_not_repeated(url):
    from aurea_orchestrator.stores.urls import open_store
    with pytest.raises(ConfigError) as caught: open_store(url, 1.0)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://h/v1?key=s3@cret", "https://u:s3@cret@h/v1#x", "http://u:s3@cret@h h/v1"])
def test_a_base_url_that_cannot_be_used_is_shown_without_its_secrets(url):
    from aurea_orchestrator.backends.openai import OpenAIBackend
    with pytest.raises(ConfigError) as caught: OpenAIBackend(url)
    assert "cret" not in str(caught.value)
