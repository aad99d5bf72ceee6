"""A client for the endpoint: numpy in, numpy out. Imports neither Ray nor torch.

``from dmm_ray.client import Client``
"""

from dmm_ray.client.client import Client
from dmm_ray.client.errors import ClientError, UnavailableError
from dmm_ray.client.results import (
    DirectionName,
    GeneratedText,
    LogProbArrays,
    Models,
    Prior,
    Subject,
    TextScore,
    Token,
)

__all__ = [
    "Client",
    "ClientError",
    "DirectionName",
    "GeneratedText",
    "LogProbArrays",
    "Models",
    "Prior",
    "Subject",
    "TextScore",
    "Token",
    "UnavailableError",
]
