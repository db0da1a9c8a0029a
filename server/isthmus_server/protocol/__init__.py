"""The bodies of requests and answers."""

from isthmus_server.protocol.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
    Tool,
    UsageWish,
)

__all__ = ["ChatRequest", "CompletionRequest", "DetokenizeRequest", "Message", "TokenizeRequest", "Tool", "UsageWish"]
