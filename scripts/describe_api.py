"""Prints the OpenAPI document of a server with default settings: docs/openapi.json, which a test holds to it."""

import json
import sys
from typing import cast

from app import __version__
from app.api.admission import Admission, AdmissionLimits
from app.api.app import create_app
from app.api.deps import OpenAIDefaults, ServerContext
from app.client.engine_client import EngineClient
from app.observability.metrics import Metrics
from app.text.tokenizer import Tokenizer


def main() -> None:
    """Write the document to standard output."""
    metrics = Metrics(model_name="any", prefix="headwater_")
    # What the API looks like depends on no engine and no model; nothing asks for them here.
    context = ServerContext(
        engine=cast("EngineClient", None),
        tokenizer=cast("Tokenizer", None),
        model_names=("any",),
        metrics=metrics,
        admission=Admission(AdmissionLimits(), metrics=metrics),
        sampling_defaults=OpenAIDefaults(),
        version=__version__,
    )
    json.dump(create_app(context).openapi(), sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
