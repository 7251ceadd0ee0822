"""Where models come from: any source becomes one canonical folder before the processes start.

Importing this package costs nothing: gguf, tokenizers, numpy and httpx are imported when a model is
fetched or converted, torch and transformers never.
"""

from app.store.background import Resolution
from app.store.catalog import CatalogEntry, catalogue, default_model
from app.store.folder import GenerationDefaults, ModelFolder
from app.store.resolve import GgufForm, ModelListing, list_models, pull, resolve

__all__ = [
    "CatalogEntry",
    "GenerationDefaults",
    "GgufForm",
    "ModelFolder",
    "ModelListing",
    "Resolution",
    "catalogue",
    "default_model",
    "list_models",
    "pull",
    "resolve",
]
