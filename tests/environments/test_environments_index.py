"""pip's configuration, told to uv."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.environments.package_index import INDEX_VARIABLES, parse_settings, uv_options, uv_variables

LISTING = """\
:env:.find-links='/wheels one'
global.cert='/certificates.pem'
global.extra-index-url='file:///a/simple\\nfile:///b/simple'
global.index-url='file:///global'
install.index-url='file:///install'
download.index-url='file:///download'
"""


def test_sections_override_one_another_as_in_pip() -> None:
    assert parse_settings(LISTING) == {
        "find-links": "/wheels one",
        "cert": "/certificates.pem",
        "extra-index-url": "file:///a/simple\nfile:///b/simple",
        "index-url": "file:///install",
    }


def test_translation() -> None:
    found = uv_variables(parse_settings(LISTING), {}, "cpu")
    assert found["UV_DEFAULT_INDEX"] == "file:///install"
    assert found["UV_INDEX"] == "file:///a/simple file:///b/simple"
    assert found["UV_FIND_LINKS"] == "/wheels,one"
    assert found["SSL_CERT_FILE"] == "/certificates.pem"
    assert found["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert "UV_TORCH_BACKEND" not in found


def test_without_any_index_torch_comes_from_its_own() -> None:
    assert uv_variables({}, {}, "cpu")["UV_TORCH_BACKEND"] == "cpu"
    assert "UV_TORCH_BACKEND" not in uv_variables({}, {}, "gpu")
    assert "UV_TORCH_BACKEND" not in uv_variables({"no-index": "1"}, {}, "cpu")


def test_no_index_is_an_option() -> None:
    assert uv_options({"no-index": "1"}) == ["--no-index"]
    assert uv_options({"no-index": "false"}) == uv_options({}) == []


@given(
    pip=st.dictionaries(
        st.sampled_from(["index-url", "extra-index-url", "find-links", "cert", "proxy", "trusted-host", "timeout"]),
        st.text("abc/:", min_size=1),
    ),
    environ=st.dictionaries(
        st.sampled_from([*INDEX_VARIABLES, "SSL_CERT_FILE", "HTTPS_PROXY", "UV_INDEX_STRATEGY", "UV_TORCH_BACKEND"]),
        st.text("xyz", min_size=1),
    ),
    variant=st.sampled_from(["cpu", "gpu"]),
)
def test_what_is_set_for_uv_stays(pip: dict[str, str], environ: dict[str, str], variant: str) -> None:
    found = uv_variables(pip, environ, variant)
    assert not found.keys() & environ.keys()
    if any(name in environ for name in INDEX_VARIABLES):
        assert not found.keys() & {*INDEX_VARIABLES, "UV_TORCH_BACKEND"}
