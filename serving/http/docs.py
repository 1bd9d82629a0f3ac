"""`/docs`: Swagger UI over the OpenAPI document, from the files of a package, so that no other server is asked."""

from __future__ import annotations

import importlib.resources

from fastapi import APIRouter, Response
from fastapi.openapi.docs import get_swagger_ui_html

from chameleon_jax.serving.http.errors import ApiError
from chameleon_jax.serving.http.pages import inline_hash, page_headers

FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
"""Content type of each file."""

router = APIRouter(include_in_schema=False)

PAGE = get_swagger_ui_html(  # relative addresses, for proxies that put a prefix before them
    openapi_url="openapi.json",
    title="chameleon-jax: HTTP API",
    swagger_js_url="docs/swagger-ui-bundle.js",
    swagger_css_url="docs/swagger-ui.css",
    swagger_favicon_url="docs/favicon-32x32.png",
).body
HEADERS = page_headers(
    script_src=f"'self' {inline_hash(bytes(PAGE).decode(), 'script')}",
    style_src="'self' 'unsafe-inline'",  # Swagger UI sets style attributes
    img_src="'self' data:",
)


@router.get("/docs")
async def get_page() -> Response:
    return Response(PAGE, headers=HEADERS, media_type="text/html")


@router.get("/docs/{name}")
async def get_file(name: str) -> Response:
    if name not in FILES:
        raise ApiError(404, "Not Found")
    content = (importlib.resources.files("fastapi_swagger.resources") / name).read_bytes()
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "max-age=3600"}
    return Response(content, headers=headers, media_type=FILES[name])
