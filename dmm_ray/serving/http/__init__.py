"""The HTTP side: routes, schemas, middleware and the page. Needs no torch."""
