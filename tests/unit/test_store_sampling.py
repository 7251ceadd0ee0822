"""Sampling defaults: the model's own files come first, then what its makers recommend in the catalogue."""

from app.store import GenerationDefaults, catalogue, default_model
from tests.store_models import default_model_folder


def test_what_the_files_say_comes_before_the_catalogue() -> None:
    own = GenerationDefaults(temperature=0.6)
    merged = own.or_else(GenerationDefaults(temperature=0.2, top_p=0.9))
    assert merged == GenerationDefaults(temperature=0.6, top_p=0.9)


def test_zero_is_a_value() -> None:
    assert GenerationDefaults(temperature=0.0).or_else(GenerationDefaults(temperature=0.2)).temperature == 0.0


def test_the_default_model_has_the_defaults_of_its_card() -> None:
    recommended = catalogue()[default_model()].sampling
    assert (recommended.temperature, recommended.top_p) == (0.2, 0.9)
    assert default_model_folder().generation_defaults == recommended
