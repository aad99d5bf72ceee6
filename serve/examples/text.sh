#!/bin/sh
# Query an endpoint with a language model (`dmm serve --prior DIR --model MODEL --directions FOLDER`) with curl.
# If the endpoint requires a token: TOKEN=... sh text.sh. The page at $URL/ does the same in a browser.
URL=${URL:-http://127.0.0.1:8000}
ask() { curl -sS ${TOKEN:+-H "Authorization: Bearer $TOKEN"} "$@"; echo; }

ask "$URL/v1/models"
ask "$URL/v1/directions"
ask "$URL/v1/score_text" -d '{"text": "Once upon a time there was a little dog."}'
ask "$URL/v1/nearest_tokens" -d '{"n": 3, "top": 5}'
ask "$URL/v1/generate" -d '{"prompt": "Once upon a time", "direction": null, "project": false, "max_tokens": 20}'
ask -N "$URL/v1/generate" -d '{"prompt": "Once upon a time", "u": 0.3, "max_tokens": 20, "stream": true}'
