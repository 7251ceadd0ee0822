"""`/openapi.json` and `/docs`: the API's description, for machines and for people.

The page is made from the document, once, and holds no script: a policy that forbids everything but its own
style sheet fits it, and nothing of it comes from elsewhere. Swagger's own page would be 1.5 MB of somebody
else's script that needs inline styles; what it adds, sending requests from the page, curl does here.
"""

import base64
import hashlib
from functools import cache

from fastapi import APIRouter, FastAPI, Response

from app.api.docs_page import STYLE, render_page
from app.api.respond import JsonResponse

_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
_HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def routes(app: FastAPI) -> APIRouter:
    """Routes that describe `app`, which is complete when the first of them is asked."""
    router = APIRouter(include_in_schema=False)

    @cache
    def page() -> str:
        return render_page(app.openapi())

    @router.get("/openapi.json", response_class=Response)
    async def openapi() -> Response:
        return JsonResponse(app.openapi())

    @router.get("/docs", response_class=Response)
    async def docs() -> Response:
        return Response(page(), media_type="text/html; charset=utf-8", headers=_HEADERS)

    return router
