"""The HTTP API: routes in OpenAI's format, and what guards them."""
