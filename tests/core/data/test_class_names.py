from __future__ import annotations

from spiralrope_cli.core.data.class_names import names_of


def test_names_are_known_or_numbers(image_folder):
    assert names_of("digits", 10) == list("0123456789")
    assert names_of("fashion-mnist", 10)[9] == "Ankle boot"
    assert names_of("", 1000)[207] == "golden retriever"
    assert names_of(str(image_folder), 2) == ["dark", "light"]
    assert names_of(str(image_folder), 3) == ["0", "1", "2"]
    assert names_of("gone", 2) == ["0", "1"]
