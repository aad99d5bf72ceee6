#!/bin/sh
# Query a running endpoint (`dmm serve --prior DIR`) with curl. Rows have the width d of the prior's activations; here d = 4.
# If the endpoint requires a token: TOKEN=... sh curl.sh.
URL=${URL:-http://127.0.0.1:8000}
ask() { curl -sS ${TOKEN:+-H "Authorization: Bearer $TOKEN"} "$@"; echo; }

ask "$URL/v2/health/ready"
ask "$URL/v1/log_prob" -d '{"activations": [[0.1, -1.2, 0.7, 0.0]], "steps": 32, "probes": 2}'
ask "$URL/v1/denoise" -d '{"activations": [[0.1, -1.2, 0.7, 0.0]], "u": 0.5}'
ask "$URL/v1/sample" -d '{"n": 2, "seed": 1}'
