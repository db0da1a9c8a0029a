"""A vendor's whole test suite may be this: the certification kit, run on the installed plugin."""

from __future__ import annotations

from isthmus.testing.certify import certify


def test_the_plugin_is_certified() -> None:
    report = certify("numpy")
    assert report.certified, report.text()
