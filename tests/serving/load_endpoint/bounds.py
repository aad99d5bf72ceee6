"""What the endpoint under load allows: little, so that no request takes long."""

from dmm_ray.serving.config import Limits

LIMITS = Limits(
    max_body_bytes=1 << 18,
    max_rows=40,
    max_steps=32,
    max_probes=4,
    max_work=1 << 13,
    max_text_chars=200,
    max_tokens=3,
)
