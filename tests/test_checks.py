import pytest

from npp_kernels._checks import read_switch


@pytest.mark.parametrize("word", ["1", "true", "True", "YES", "on", " 1 "])
def test_switch_on(monkeypatch, word):
    monkeypatch.setenv("NPP_KERNELS_CHECK", word)
    assert read_switch("NPP_KERNELS_CHECK")


@pytest.mark.parametrize("word", ["", "0", "false", "FALSE", "no", "Off", " "])
def test_switch_off(monkeypatch, word):
    monkeypatch.setenv("NPP_KERNELS_CHECK", word)
    assert not read_switch("NPP_KERNELS_CHECK")


def test_switch_that_is_not_set(monkeypatch):
    monkeypatch.delenv("NPP_KERNELS_CHECK", raising=False)
    assert not read_switch("NPP_KERNELS_CHECK")


@pytest.mark.parametrize("word", ["2", "fasle", "-1"])
def test_switch_of_neither_word(monkeypatch, word):
    monkeypatch.setenv("NPP_KERNELS_CHECK", word)
    with pytest.raises(ValueError, match=f"NPP_KERNELS_CHECK: expected 1, true, yes or on, .* got '{word}'"):
        read_switch("NPP_KERNELS_CHECK")
